"""Bundles with random weights: their volumes are noise; their cost is that of a trained model of the same size."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from brainsynth.bundle.spec import AUTOENCODER_FILE, BUNDLE_FILE, DIFFUSION_FILE, BundleSpec, LatentSpec
from brainsynth.cohort.phantom import phantom_covariates
from brainsynth.config.architectures import AutoencoderArchitecture, DiffusionArchitecture
from brainsynth.config.training import ScheduleConfig
from brainsynth.covariates.distribution import fit_distribution
from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.models.autoencoder import build_autoencoder
from brainsynth.models.diffusion import Denoiser
from brainsynth.models.weights import save_weights
from brainsynth.records import seal
from brainsynth.volume import VolumeSpec

SCHEMA = CovariateSchema(
    covariates=(
        Covariate(name="age", kind="continuous", unit="years", low=18.0, high=95.0),
        Covariate(name="sex", kind="binary", categories=("F", "M")),
        Covariate(name="ventricular_volume", kind="continuous", unit="ml", low=3.0, high=150.0, scale="log"),
        Covariate(name="brain_volume", kind="continuous", unit="ml", low=800.0, high=1800.0),
    )
)


@dataclasses.dataclass(frozen=True)
class Size:
    """Architectures of both networks."""

    autoencoder: AutoencoderArchitecture
    diffusion: DiffusionArchitecture


TINY = Size(
    AutoencoderArchitecture(channels=(4, 4, 4), latent_channels=2, num_res_blocks=1, norm_groups=2),
    DiffusionArchitecture(channels=(4, 8), attention=(False, True), head_channels=4, num_res_blocks=1, norm_groups=4),
)
SMALL = Size(  # as in configs/ixi-4mm
    AutoencoderArchitecture(channels=(16, 32, 64), latent_channels=4, num_res_blocks=1, norm_groups=4),
    DiffusionArchitecture(
        channels=(64, 128), attention=(False, True), head_channels=32, num_res_blocks=1, norm_groups=32
    ),
)


def make_random_bundle(folder: Path, size: Size, shape_xyz: tuple[int, int, int], spacing_mm: float = 4.0) -> None:
    """Write a bundle for volumes of that many voxels."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    latents = (size.autoencoder.latent_channels, *(n // size.autoencoder.factor for n in shape_xyz))
    spec = BundleSpec(
        name="random",
        autoencoder=size.autoencoder,
        diffusion=size.diffusion,
        schedule=ScheduleConfig(prediction="flow"),
        latents=LatentSpec(shape_cxyz=latents, shift=(0.0,) * latents[0], scale=(1.0,) * latents[0]),
        covariates=SCHEMA,
        distribution=fit_distribution(phantom_covariates(500, 0), SCHEMA, "phantoms"),
        volume=VolumeSpec(shape_xyz=shape_xyz, spacing_mm=(spacing_mm,) * 3, origin_mm=(0.0,) * 3),
        weights={
            AUTOENCODER_FILE: save_weights(build_autoencoder(size.autoencoder), folder / AUTOENCODER_FILE),
            DIFFUSION_FILE: save_weights(
                Denoiser(size.diffusion, latents[0], SCHEMA.context_size), folder / DIFFUSION_FILE
            ),
        },
        licence="CC0-1.0",
        training_data="none: random weights",
        provenance={},
    )
    (folder / BUNDLE_FILE).write_bytes(seal(spec))
