"""BundleSpec: everything generation needs, beside its files of numbers. A *bundle* is released for inference; a
*checkpoint* resumes training.

```
<bundle>/bundle.json              this record, sealed with its own sha256
<bundle>/autoencoder.safetensors  decoder and encoder, EMA weights
<bundle>/diffusion.safetensors    denoiser, EMA weights
<bundle>/gate.safetensors         the quality gate, if it was fitted
```
"""

from __future__ import annotations

from typing import Annotated, Literal

from brainsynth.config.training import AutoencoderArchitecture, DiffusionArchitecture, ScheduleConfig
from brainsynth.covariates import CovariateSchema
from brainsynth.distribution import CovariateDistribution
from brainsynth.errors import UserError
from brainsynth.records import digest, left_out_at, record
from brainsynth.volume import VolumeSpec

BUNDLE_FILE = "bundle.json"
AUTOENCODER_FILE = "autoencoder.safetensors"
DIFFUSION_FILE = "diffusion.safetensors"
GATE_FILE = "gate.safetensors"


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
class BundleSpec:
    """A released model: architectures, latent scale, schedule, covariates with units and ranges, geometry, digests."""

    schema_version: Literal[1] = 1
    name: str
    autoencoder: AutoencoderArchitecture
    diffusion: DiffusionArchitecture
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
    licence: str
    training_data: str
    provenance: dict[str, str | int | float]

    def __post_init__(self) -> None:
        if set(self.weights) - {GATE_FILE} != {AUTOENCODER_FILE, DIFFUSION_FILE}:
            raise ValueError(
                f"weights must name {AUTOENCODER_FILE} and {DIFFUSION_FILE}, perhaps {GATE_FILE}, and nothing else"
            )
        if len(set(self.flipped_axes)) != len(self.flipped_axes):
            raise ValueError("flipped_axes names an axis twice")

    @property
    def digest(self) -> str:
        """sha256 of the record; covers the weights through their digests."""
        return digest(self)


def check_latent_grid(
    volume: VolumeSpec, autoencoder: AutoencoderArchitecture, diffusion: DiffusionArchitecture | None = None
) -> tuple[int, int, int, int]:
    """(C, X, Y, Z) of the latents. Raises UserError when a grid cannot be halved as often as an architecture asks."""
    levels = [("the autoencoder", autoencoder.factor)]
    if diffusion is not None:
        levels.append(("the autoencoder and the denoiser", autoencoder.factor * 2 ** (len(diffusion.channels) - 1)))
    for who, factor in levels:
        if any(size % factor for size in volume.shape_xyz):
            raise UserError(
                f"volume.shape_xyz {volume.shape_xyz} must be a multiple of {factor} on every axis: {who} halve"
                f"{'s' if who == 'the autoencoder' else ''} it {factor.bit_length() - 1} times; "
                "pad the volume or take fewer levels"
            )
    x, y, z = (size // autoencoder.factor for size in volume.shape_xyz)
    return (autoencoder.latent_channels, x, y, z)
