"""One volume in this process, without Ray and without a dataset: for notebooks and for looking."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from brainsynth.bundle.files import bundle_folder, read_bundle
from brainsynth.bundle.recommended import recommended_generation
from brainsynth.config.schema import SHIPPED_BUNDLE
from brainsynth.errors import UserError
from brainsynth.generate import VolumeGenerator
from brainsynth.planning import plan_generation
from brainsynth.reading.html import sample_html


@dataclasses.dataclass(frozen=True)
class Sample:
    """One synthetic volume."""

    image: npt.NDArray[np.float32]
    """(X, Y, Z) intensities in [0, 1], axes RAS+."""
    affine: npt.NDArray[np.float64]
    """(4, 4) voxel index → world, in mm."""
    covariates: dict[str, float | str]
    """In physical units: as asked, or as drawn where the value was left out; NaN or "" if the bundle has no distribution."""
    units: dict[str, str]
    """Of the covariates; empty for categories."""
    seed: int
    attempts: int
    """How many volumes were drawn until one passed the quality gate; 1 without a gate."""
    labels: npt.NDArray[np.uint8] | None = None
    """(X, Y, Z) label map, where the bundle makes label maps."""

    def save(self, path: str) -> None:
        """Write a NIfTI file (.nii or .nii.gz), float32, in mm."""
        import nibabel as nib

        if not str(path).endswith((".nii", ".nii.gz")):
            raise UserError(f"{path}: give a name that ends in .nii or .nii.gz")
        volume = nib.Nifti1Image(self.image, self.affine)
        volume.header.set_xyzt_units("mm")
        nib.save(volume, path)

    def _repr_html_(self) -> str:
        return sample_html(self.image, self.covariates, self.units, f"synthetic, seed {self.seed}")


def sample(
    *, seed: int = 0, bundle: str = SHIPPED_BUNDLE, allow_extrapolation: bool = False, **covariates: float | str
) -> Sample:
    """Sample one brain with these covariates: `brainsynth.sample(age=70, sex="F", seed=1)`.

    Sampler and quality gate are those that the bundle recommends. A covariate that is left out is drawn from the
    bundle's distribution, given the others; the same arguments give the same volume. It is the volume of a dataset of one
    row that is generated with `--seed seed`.

    Args:
        seed: another number is another brain.
        bundle: folder of a bundle, or the name of the bundled model.
        allow_extrapolation: take values outside the training support.
        covariates: by name, in the units of the bundle: years, ml, …

    Raises:
        UserError: an unknown name, a value that the model cannot take, a bundle without a recommendation, or no volume
            that passed the quality gate.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UserError(f"seed must be a whole number of 0 or more, and is {seed!r}")
    spec = read_bundle(bundle_folder(bundle))
    schema = spec.covariates
    unknown = sorted(set(covariates) - set(schema.names))
    if unknown:
        raise UserError(f"{', '.join(unknown)}: not a covariate of {spec.name}, which has {', '.join(schema.names)}")
    asked = pd.DataFrame([{name: covariates.get(name, np.nan) for name in schema.names}])
    rows = schema.validate(asked, f"sample, covariates of {spec.name}", allow_out_of_range=allow_extrapolation)
    config = recommended_generation("unused", bundle, None, seed=seed, workers=0)
    work = plan_generation(config, rows)
    generator = VolumeGenerator(**work.arguments)
    generator.samples = work.samples  # nothing is stored: the planned rows are not read back
    output = generator.finish(generator.make(work.plan.shard(0)))
    (record,) = output.samples
    if record.status != "ok":
        raise UserError(f"no volume passed the quality gate ({record.reason}); give another seed or other covariates")
    return Sample(
        image=work.plan.volume.dequantise(output.arrays[0][0]),
        affine=np.array(work.plan.volume.affine),
        covariates=_values(work.samples[list(schema.names)]),
        units={c.name: c.unit for c in schema.covariates},
        seed=seed,
        attempts=int(record.extra.get("gate_attempts", 1)),
        labels=output.arrays[1][0] if work.plan.labels is not None else None,
    )


def _values(rows: pd.DataFrame) -> dict[str, Any]:
    line = rows.iloc[0]
    return {
        str(name): float(value) if pd.api.types.is_numeric_dtype(rows[name]) else "" if pd.isna(value) else str(value)
        for name, value in line.items()
    }
