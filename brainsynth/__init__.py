"""brainsynth: synthetic 3D brain MRI at scale.

The public API; docs/reference/python.md documents it and says what is stable. Each name is imported on first use,
 so `open_dataset` needs only zarr and NumPy. See README.md for the jobs.
"""

import importlib
from typing import TYPE_CHECKING, Any

from brainsynth.version import __version__ as __version__

__all__ = [
    "BundleSpec",
    "Covariate",
    "CovariateSchema",
    "GenerateConfig",
    "GeneratorSpec",
    "OtherVersion",
    "Sample",
    "ShardSampler",
    "SyntheticDataset",
    "UserError",
    "VerifyReport",
    "VolumeReader",
    "VolumeSpec",
    "bundle_folder",
    "generate_dataset",
    "load_config",
    "monai_items",
    "open_dataset",
    "ray_dataset",
    "read_bundle",
    "sample",
    "verify_dataset",
]

if TYPE_CHECKING:
    from brainsynth.bundle.files import bundle_folder, read_bundle
    from brainsynth.bundle.generator import GeneratorSpec
    from brainsynth.bundle.spec import BundleSpec
    from brainsynth.config.load import load_config
    from brainsynth.config.schema import GenerateConfig
    from brainsynth.covariates.schema import Covariate, CovariateSchema
    from brainsynth.errors import OtherVersion, UserError
    from brainsynth.reading.dataset import SyntheticDataset, open_dataset
    from brainsynth.reading.monai import VolumeReader, monai_items
    from brainsynth.reading.ray import ray_dataset
    from brainsynth.reading.torch import ShardSampler
    from brainsynth.stages.generate import generate_dataset
    from brainsynth.stages.sample import Sample, sample
    from brainsynth.storage.verify import VerifyReport, verify_dataset
    from brainsynth.volume import VolumeSpec

_PLACES = {
    "BundleSpec": "bundle.spec.BundleSpec",
    "Covariate": "covariates.schema.Covariate",
    "CovariateSchema": "covariates.schema.CovariateSchema",
    "GenerateConfig": "config.schema.GenerateConfig",
    "GeneratorSpec": "bundle.generator.GeneratorSpec",
    "OtherVersion": "errors.OtherVersion",
    "Sample": "stages.sample.Sample",
    "ShardSampler": "reading.torch.ShardSampler",
    "SyntheticDataset": "reading.dataset.SyntheticDataset",
    "UserError": "errors.UserError",
    "VerifyReport": "storage.verify.VerifyReport",
    "VolumeReader": "reading.monai.VolumeReader",
    "VolumeSpec": "volume.VolumeSpec",
    "bundle_folder": "bundle.files.bundle_folder",
    "generate_dataset": "stages.generate.generate_dataset",
    "load_config": "config.load.load_config",
    "monai_items": "reading.monai.monai_items",
    "open_dataset": "reading.dataset.open_dataset",
    "ray_dataset": "reading.ray.ray_dataset",
    "read_bundle": "bundle.files.read_bundle",
    "sample": "stages.sample.sample",
    "verify_dataset": "storage.verify.verify_dataset",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PLACES[name].rpartition(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
