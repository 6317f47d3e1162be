"""BundleSpec: everything generation needs, except the weights. A *bundle* is released for inference; a
*checkpoint* resumes training.

```
<bundle>/bundle.json              this record, sealed with its own sha256
<bundle>/autoencoder.safetensors  decoder and encoder, EMA weights
<bundle>/diffusion.safetensors    denoiser, EMA weights
<bundle>/gate.safetensors         the quality gate, if it was fitted
<bundle>/decoder.safetensors      distilled decoder, EMA weights, if there is one
```
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from brainsynth.config.architectures import AnyAutoencoderArchitecture, DecoderArchitecture, DenoiserArchitecture
from brainsynth.config.schema import SamplerConfig
from brainsynth.config.training import ScheduleConfig
from brainsynth.covariates.distribution import CovariateDistribution
from brainsynth.covariates.schema import CovariateSchema
from brainsynth.errors import UserError
from brainsynth.records import digest, left_out_at, record
from brainsynth.volume import VolumeSpec

BUNDLE_FILE = "bundle.json"
AUTOENCODER_FILE = "autoencoder.safetensors"
DIFFUSION_FILE = "diffusion.safetensors"
GATE_FILE = "gate.safetensors"
DECODER_FILE = "decoder.safetensors"


@record
class LatentSpec:
    """Shape of the latents and the affine map that whitens them: z = (raw - shift) * scale, per channel."""

    shape_cxyz: tuple[int, int, int, int]
    shift: tuple[float, ...]
    scale: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.shift) == len(self.scale) == self.shape_cxyz[0]:
            raise ValueError("latent shift and scale need one number per channel")
        if min(self.scale) <= 0:
            raise ValueError("latent scale must be positive")


@record
class DecoderFidelity:
    """How near a distilled decoder's images come to those of the bundle's own decoder: means over held-out latents."""

    count: int
    """Latents."""
    psnr_db: float
    ssim: float
    l1: float
    """Of intensities in [0, 1]."""
    sharpness_ratio: float
    """Mean absolute difference of neighbouring voxels, over that of the original decoder's images: below 1 is smoother."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError("a distilled decoder must be measured on at least one latent")


@record
class DistilledSpec:
    """A distilled decoder in addition to the original one: what it is, and its measured savings and losses."""

    architecture: DecoderArchitecture
    flops_ratio: float
    """Operations of one decode by the bundle's own decoder, as it was trained, over those of this one."""
    on_generated: DecoderFidelity
    """On latents that the bundle's own denoiser sampled."""
    on_encoded: DecoderFidelity | None
    """On latents of held-out scans; None when it was distilled without scans."""


@record
class MeasuredInterval:
    """A measured figure and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError("an interval needs low <= high")


@record
class StepFidelity:
    """How near latents of held-out rows come to the teacher's reference from the same noises."""

    latent_error: MeasuredInterval
    """Root mean square difference, relative to the reference's root mean square."""
    frechet: MeasuredInterval
    """Fréchet distance to the reference of 16 fixed random features of the latents, in units of their spread there."""


@record
class FewStepsSpec:
    """A denoiser that was distilled to need few evaluations: from what, for which sampler, and what it loses."""

    distilled_from: str
    """Digest of the teacher's bundle."""
    sampler: SamplerConfig
    """The only one that the denoiser was trained for: one evaluation a step, guidance folded in."""
    teacher_sampler: SamplerConfig
    """Of the trajectories that it learnt; its guidance_scale is the one folded in."""
    reference_sampler: SamplerConfig
    """Of the teacher's latents that everything below is measured against."""
    count: int
    """Held-out rows, the same rows and noises for student and teacher."""
    student: StepFidelity
    teacher: StepFidelity
    """By `teacher_sampler`."""
    teacher_in_as_few: StepFidelity
    """By `teacher_sampler` in as few steps as the student: a student that is no nearer was not worth it."""

    def __post_init__(self) -> None:
        if self.count < 17:
            raise ValueError("a distilled denoiser must be measured on at least 17 rows")
        if self.sampler.guidance_scale != 1:
            raise ValueError("the sampler of a distilled denoiser has guidance folded in: its guidance_scale is 1")


@record
class BundleSpec:
    """A released model: architectures, latent scale, schedule, covariates with units and ranges, geometry, digests."""

    schema_version: Literal[1] = 1
    name: str
    autoencoder: AnyAutoencoderArchitecture
    diffusion: DenoiserArchitecture
    schedule: ScheduleConfig
    latents: LatentSpec
    covariates: CovariateSchema
    distribution: CovariateDistribution | None
    """The joint distribution of the training cohort's covariates, from which rows are drawn; None where it is unknown: then
    rows come from a table only."""
    volume: VolumeSpec
    flipped_axes: Annotated[tuple[Literal[0, 1, 2], ...], left_out_at(())] = ()
    """Axes (0 X, 1 Y, 2 Z) along which the networks run against RAS+: (0,) for networks that make LAS volumes."""
    weights: dict[str, str]
    """File name → sha256."""
    distilled: Annotated[DistilledSpec | None, left_out_at(None)] = None
    """Of the distilled decoder, where there is one."""
    few_steps: Annotated[FewStepsSpec | None, left_out_at(None)] = None
    """Of a denoiser that was distilled for few evaluations; None for one that was trained on latents."""
    licence: str
    training_data: str
    provenance: dict[str, str | int | float]

    def __post_init__(self) -> None:
        if set(self.weights) - {GATE_FILE, DECODER_FILE} != {AUTOENCODER_FILE, DIFFUSION_FILE}:
            raise ValueError(
                f"weights must name {AUTOENCODER_FILE} and {DIFFUSION_FILE}, perhaps {GATE_FILE} and {DECODER_FILE}, "
                "and nothing else"
            )
        if len(set(self.flipped_axes)) != len(self.flipped_axes):
            raise ValueError("flipped_axes names an axis twice")
        if any(n % of for n, of in zip(self.latents.shape_cxyz[1:], self.diffusion.cells_xyz, strict=True)):
            raise ValueError(f"latents.shape_cxyz must be a multiple of {self.diffusion.cells_xyz} on its axes XYZ")
        if (self.distilled is not None) != (DECODER_FILE in self.weights):
            raise ValueError(
                f"{DECODER_FILE} among the weights needs its record under distilled, and the other way round"
            )
        if (self.few_steps is not None) != ("steps_distilled_from" in self.provenance):
            raise ValueError(
                "a denoiser distilled for few evaluations needs its record under few_steps, and the other way round"
            )
        if self.distilled is not None:
            self.distilled.architecture.last_factor(self.autoencoder.factor)

    @property
    def digest(self) -> str:
        """sha256 of the record; covers the weights through their digests."""
        return digest(self)

    def extrapolated(self, rows: pd.DataFrame) -> npt.NDArray[np.bool_]:
        """(B,) True for validated rows outside the training support: by a value, or, where the distribution is known, by an
        unusual combination of values."""
        outside = self.covariates.out_of_range(rows)
        return outside if self.distribution is None else outside | ~self.distribution.in_support(rows)


def check_latent_grid(
    volume: VolumeSpec, autoencoder: AnyAutoencoderArchitecture, denoiser: DenoiserArchitecture | None = None
) -> tuple[int, int, int, int]:
    """(C, X, Y, Z) of the latents. Raises UserError when a grid cannot be divided as an architecture asks."""
    factor = autoencoder.factor
    _check_multiple(volume, (factor,) * 3, f"the autoencoder halves it {_halvings(factor)} times; take fewer levels")
    if denoiser is not None:
        if denoiser.kind == "unet":
            halvings = _halvings(factor * denoiser.cells_xyz[0])
            why = f"the autoencoder and the denoiser halve it {halvings} times; take fewer levels"
        else:
            why = f"a voxel in {factor} becomes a latent cell, {denoiser.cells_xyz} of which a patch; take smaller patches"
        x, y, z = denoiser.cells_xyz
        _check_multiple(volume, (factor * x, factor * y, factor * z), why)
    x, y, z = (size // factor for size in volume.shape_xyz)
    return (autoencoder.latent_channels, x, y, z)


def _halvings(factor: int) -> int:
    return factor.bit_length() - 1


def _check_multiple(volume: VolumeSpec, of_xyz: tuple[int, int, int], why: str) -> None:
    if any(size % of for size, of in zip(volume.shape_xyz, of_xyz, strict=True)):
        multiple = f"{of_xyz[0]} on every axis" if len(set(of_xyz)) == 1 else str(of_xyz)
        raise UserError(
            f"volume.shape_xyz {volume.shape_xyz} must be a multiple of {multiple}: {why}, or pad the volume"
        )
