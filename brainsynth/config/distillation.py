"""Knobs of the distilled decoder's training and of few-step distillation; the same rules as in schema.py."""

from __future__ import annotations

from typing import Literal

from brainsynth.config.architectures import DecoderArchitecture
from brainsynth.config.schema import SamplerConfig
from brainsynth.config.training import OptimisationConfig, TrainRuntimeConfig, check_keeps, check_shares
from brainsynth.records import record


@record
class DistillLossConfig:
    """L1 + gradient difference + perceptual distance between the two decoders' images."""

    gradient_weight: float = 1.0
    """Of the L1 distance of differences between neighbouring voxels: without it the images are smoother."""
    gradient_scales: int = 3
    """Full resolution, and further ones by averaging 2×2×2 voxels."""
    perceptual_weight: float = 0.0
    perceptual_weights: str | None = None
    """Local file with the weights of a 3D ResNet (MedicalNet layout), needed when perceptual_weight is above 0."""
    perceptual_depth: Literal[10, 18, 50] = 10

    def __post_init__(self) -> None:
        if self.gradient_weight < 0 or self.perceptual_weight < 0 or not 1 <= self.gradient_scales <= 5:
            raise ValueError("weights must be at least 0 and gradient_scales between 1 and 5")
        if (self.perceptual_weight > 0) != (self.perceptual_weights is not None):
            raise ValueError("perceptual_weight above 0 and perceptual_weights (a local file) need each other")


@record
class GeneratedLatentsConfig:
    """Latents that the bundle's own denoiser samples, for rows drawn from its covariate distribution."""

    sampler: SamplerConfig
    """As for the datasets that will be made with the distilled decoder."""
    count: int
    """Sampled once, before the training starts."""
    validation_count: int = 32
    """Others, on which the loss of quality is measured."""
    share: float = 0.5
    """Of each batch; the rest are latents of scans. Must be 1 without `latents`."""

    def __post_init__(self) -> None:
        if self.count < 1 or self.validation_count < 1 or not 0 <= self.share <= 1:
            raise ValueError("need count and validation_count of at least 1 and share between 0 and 1")


@record
class DistillConfig:
    """Bundle → the same bundle with a distilled decoder in addition to its own (`brainsynth distill-decoder`)."""

    bundle: str
    output: str
    """Folder of the training."""
    bundle_output: str
    """The new bundle: all of the old one, the distilled decoder and its measured loss of quality."""
    architecture: DecoderArchitecture
    generated: GeneratedLatentsConfig
    optimisation: OptimisationConfig
    latents: str | None = None
    """Latents of scans, made by the bundle's autoencoder (`brainsynth encode-latents`); without them no data are needed."""
    losses: DistillLossConfig = DistillLossConfig()
    runtime: TrainRuntimeConfig = TrainRuntimeConfig()

    def __post_init__(self) -> None:
        if self.latents is None and self.generated.share != 1:
            raise ValueError("generated.share must be 1 without latents: there is nothing else to train on")
        check_shares(self.optimisation, self.runtime)
        check_keeps(self.runtime)


@record
class TrajectoriesConfig:
    """Trajectories of the bundle's own denoiser from noise to latents, which a few-step student learns."""

    sampler: SamplerConfig
    """The denoiser's best, with the guidance that is to be folded in; deterministic, and at least twice the student's steps
    (a multiple of them for flow and `ddim`)."""
    count: int
    """Sampled once, before the training starts."""
    validation_count: int = 64
    """Others, on which the loss of quality is measured."""
    reference_steps: int = 100
    """Of `sampler`, for the latents that the others are measured against."""

    def __post_init__(self) -> None:
        if self.count < 1 or self.validation_count < 17:
            raise ValueError("need count of at least 1 and validation_count of at least 17")
        if self.reference_steps < 2 * self.sampler.steps:
            raise ValueError(
                "reference_steps must be at least twice sampler.steps, or there is nothing to measure against"
            )


@record
class StepDistillConfig:
    """Bundle → bundle whose denoiser needs `evaluations` evaluations a volume (`brainsynth distill-steps`)."""

    bundle: str
    output: str
    """Folder of the training."""
    bundle_output: str
    """The new bundle: the old one's autoencoder (and gate, and distilled decoder), and the distilled denoiser."""
    evaluations: Literal[1, 2, 4]
    trajectories: TrajectoriesConfig
    optimisation: OptimisationConfig
    latents: str | None = None
    """Latents of scans (`brainsynth encode-latents`), for whose covariates the trajectories are sampled: for a bundle
    without a covariate distribution. Without them rows are drawn from the bundle's distribution."""
    runtime: TrainRuntimeConfig = TrainRuntimeConfig()
