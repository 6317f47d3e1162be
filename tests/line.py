"""A real tiny model, trained for a few steps through the real stages, and its bundle: seconds on two cores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from brainsynth.cohort.phantom import phantom_grid
from brainsynth.config.load import load_config
from brainsynth.config.schema import EncodeConfig, ExportConfig, GenerateConfig, PrepareConfig
from brainsynth.config.training import AutoencoderTrainConfig, DiffusionTrainConfig

GRID = phantom_grid(7.0, (24, 32, 24))
COVARIATES = {
    "covariates": [
        {"name": "age", "kind": "continuous", "unit": "years", "low": 18.0, "high": 95.0},
        {"name": "sex", "kind": "binary", "categories": ["F", "M"]},
        {"name": "ventricular_volume", "kind": "continuous", "unit": "ml", "low": 3.0, "high": 150.0, "scale": "log"},
        {"name": "brain_volume", "kind": "continuous", "unit": "ml", "low": 800.0, "high": 1800.0},
    ]
}
LOCAL = {"workers": 0, "threads_per_worker": 1, "micro_batch": 4}
DENOISERS: dict[str, dict[str, Any]] = {
    "unet": {
        "channels": [8, 16],
        "attention": [False, True],
        "head_channels": 8,
        "num_res_blocks": 1,
        "norm_groups": 8,
    },
    "transformer": {"kind": "transformer", "patch_xyz": [1, 2, 2], "width": 16, "depth": 2, "heads": 2},
    "gaussian": {
        "kind": "gaussian",
        "rank": 4,
        "rank_channels": 1,
        "channels": [8, 16],
        "embedding": 16,
        "norm_groups": 4,
    },
}


class Line:
    """The configs of a tiny line below one folder, as dictionaries that a test may change before it uses them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepare(self) -> dict[str, Any]:
        return {
            "source": {"path": str(self.root / "phantoms")},
            "output": str(self.root / "cohort"),
            "covariates": COVARIATES,
            "volume": {
                "shape_xyz": list(GRID.shape_xyz),
                "spacing_mm": list(GRID.spacing_mm),
                "origin_mm": list(GRID.origin_mm),
            },
            "samples_per_shard": 8,
            "runtime": LOCAL,
        }

    def autoencoder(self, output: str = "autoencoder", **optimisation: Any) -> dict[str, Any]:
        options = {"steps": 6, "batch_size": 2, "learning_rate": 2e-3, "warmup_steps": 2, "log_every": 1}
        options |= {"validate_every": 3, "checkpoint_every": 2} | optimisation
        return {
            "cohort": str(self.root / "cohort"),
            "output": str(self.root / output),
            "architecture": {"channels": [8, 8, 8], "latent_channels": 2, "num_res_blocks": 1, "norm_groups": 4},
            "losses": {
                "adversarial_start": 2,
                "discriminator_channels": 4,
                "discriminator_layers": 1,
                "perceptual_weight": 0.0,
            },
            "optimisation": options,
            "runtime": {"workers": 0, "threads_per_worker": 1, "trackers": ["tensorboard"]},
        }

    def pyramid(self, output: str = "pyramid", **optimisation: Any) -> dict[str, Any]:
        config = self.autoencoder(output, **optimisation)
        stages = [{"width": 8, "blocks": 1, "noise": noise} for noise in (3, 2)]
        config["architecture"] = {"kind": "pyramid", "stages": stages, "intensity_scale": 1.2}
        config["losses"] = {
            "adversarial_start": 2,
            "discriminator_channels": 4,
            "kl_weight": 0.0,
            "perceptual_weight": 0.0,
        }
        config["crops"] = {"cells": 4, "balance": "sex", "critics_alone": 1}
        return config

    def latents(self) -> dict[str, Any]:
        return {
            "cohort": str(self.root / "cohort"),
            "autoencoder": str(self.root / "autoencoder"),
            "output": str(self.root / "latents"),
            "samples_per_shard": 16,
            "runtime": LOCAL,
        }

    def diffusion(
        self, output: str = "diffusion", prediction: str = "flow", kind: str = "unet", **optimisation: Any
    ) -> dict[str, Any]:
        options = {"steps": 6, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 2, "log_every": 1}
        options |= {"validate_every": 3, "checkpoint_every": 2} | optimisation
        return {
            "latents": str(self.root / "latents"),
            "autoencoder": str(self.root / "autoencoder"),
            "output": str(self.root / output),
            "architecture": DENOISERS[kind],
            "schedule": {"prediction": prediction},
            "optimisation": options,
            "figure_steps": 2,
            "runtime": {"workers": 0, "threads_per_worker": 1, "trackers": ["tensorboard"]},
        }

    def bundle(self, diffusion: str = "diffusion", output: str = "bundle") -> dict[str, Any]:
        return {
            "diffusion": str(self.root / diffusion),
            "output": str(self.root / output),
            "name": "tiny",
            "licence": "Apache-2.0",
            "training_data": "phantoms",
        }

    def distillation(self, output: str = "distilled", **optimisation: Any) -> dict[str, Any]:
        options = {"steps": 6, "batch_size": 4, "learning_rate": 4e-3, "warmup_steps": 2, "log_every": 1}
        options |= {"validate_every": 3, "checkpoint_every": 2} | optimisation
        return {
            "bundle": str(self.root / "bundle"),
            "latents": str(self.root / "latents"),
            "output": str(self.root / output),
            "bundle_output": str(self.root / f"{output}-bundle"),
            "architecture": {"channels": [16, 8], "blocks": [1, 0], "norm_groups": 4},
            "generated": {"sampler": {"method": "ab2", "steps": 2}, "count": 12, "validation_count": 4},
            "optimisation": options,
            "runtime": {"workers": 0, "threads_per_worker": 1, "trackers": []},
        }

    def step_distillation(self, output: str = "few-steps", **optimisation: Any) -> dict[str, Any]:
        options = {"steps": 6, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 2, "log_every": 1}
        options |= {"validate_every": 3, "checkpoint_every": 2} | optimisation
        return {
            "bundle": str(self.root / "bundle"),
            "output": str(self.root / output),
            "bundle_output": str(self.root / f"{output}-bundle"),
            "evaluations": 2,
            "trajectories": {
                "sampler": {"method": "ab2", "steps": 4, "guidance_scale": 1.5},
                "count": 12,
                "validation_count": 18,
                "reference_steps": 12,
            },
            "optimisation": options,
            "runtime": {"workers": 0, "threads_per_worker": 1, "trackers": []},
        }

    def generate(self, output: Path | str, **changes: Any) -> dict[str, Any]:
        config: dict[str, Any] = {
            "bundle": str(self.root / "bundle"),
            "output": str(output),
            "covariates": {"draw": 12},
            "sampler": {"method": "ab2", "steps": 3, "guidance_scale": 1.5},
            "samples_per_shard": 3,
            "runtime": LOCAL,
        }
        return config | changes


def as_config(value: dict[str, Any], cls: type[Any], folder: Path) -> Any:
    """Through a YAML file and the strict loader, as a user's would go."""
    path = write_yaml(value, folder)
    return load_config(path, cls)


def write_yaml(value: dict[str, Any], folder: Path, name: str = "config.yaml") -> Path:
    """A config file."""
    path = folder / name
    path.write_text(yaml.safe_dump(value))
    return path


@pytest.fixture(scope="session")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """Phantoms, cohort, both trainings, bundle: made once."""
    from brainsynth.cohort.phantom_cohort import write_phantom_cohort
    from brainsynth.stages import (
        encode_latents,
        export_bundle,
        prepare_cohort,
        train_autoencoder,
        train_diffusion,
    )

    root = tmp_path_factory.mktemp("line")
    line = Line(root)
    write_phantom_cohort(root / "phantoms", 48, 3, GRID)
    prepare_cohort.run(as_config(line.prepare(), PrepareConfig, root))
    train_autoencoder.run(as_config(line.autoencoder(), AutoencoderTrainConfig, root))
    encode_latents.run(as_config(line.latents(), EncodeConfig, root))
    train_diffusion.run(as_config(line.diffusion(), DiffusionTrainConfig, root))
    export_bundle.run(as_config(line.bundle(), ExportConfig, root))
    return line


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One private Ray session for all tests that only need some Ray."""
    from brainsynth.executors.session import ray_session

    with ray_session():
        yield


@pytest.fixture
def generated(line: Line, tmp_path: Path) -> Path:
    """A freshly generated dataset."""
    from brainsynth.stages import (
        generate,
    )

    root = tmp_path / "generated"
    generate.run(as_config(line.generate(root), GenerateConfig, tmp_path))
    return root
