"""Knobs of the trainings on label maps, labeller and renderer; the same rules as in schema.py."""

from __future__ import annotations

from typing import Annotated

from brainsynth.config.architectures import LabellerArchitecture, RendererArchitecture
from brainsynth.config.training import CropsConfig, OptimisationConfig, TrainRuntimeConfig, check_keeps, check_shares
from brainsynth.records import left_out_at, record


@record
class LabelAugmentation:
    """What a scan may look like otherwise. Each amount is drawn evenly up to the one here."""

    box_xyz: tuple[int, int, int] | None = None
    """Voxels of a random box around a place in the head, of which a step sees no more; the whole scan by default."""
    warp_probability: float = 0.5
    """Share of scans that are turned, shifted, resized and warped."""
    turn_degrees: float = 8.0
    shift_mm: float = 8.0
    size_ratio: float = 1.12
    """Largest factor of the size along an axis, and 1 over the smallest."""
    warp_mm: float = 4.0
    """Farthest that a smooth warp moves a voxel."""
    mirror: bool = True
    """Half of the scans are mirrored; structures named left and right change sides. Off where a side has no other."""
    bias: float = 0.3
    """Standard deviation of the logarithm of a smooth bias field."""
    blur_mm: float = 4.0
    """Full width at half maximum of a Gaussian: generated volumes are softer than scans."""
    gamma: float = 1.4
    """Largest exponent of the intensities, and 1 over the smallest."""
    gain: float = 1.2
    """Largest factor of the intensities, and 1 over the smallest."""
    noise: float = 0.06
    """Standard deviation, where white matter is about 0.8."""

    def __post_init__(self) -> None:
        amounts = (self.turn_degrees, self.shift_mm, self.warp_mm, self.bias, self.blur_mm, self.noise)
        if min(amounts) < 0 or min(self.size_ratio, self.gamma, self.gain) < 1:
            raise ValueError("amounts must be at least 0, and size_ratio, gamma and gain at least 1")
        if not 0 <= self.warp_probability <= 1 or (self.box_xyz is not None and min(self.box_xyz) < 1):
            raise ValueError("need warp_probability between 0 and 1 and a box_xyz of at least one voxel")


@record
class LabellerTrainConfig:
    """`brainsynth train-labeller`."""

    cohort: str
    """A prepared cohort with label maps (docs/labels.md)."""
    output: str
    """Folder of weights, checkpoints, curves and pictures."""
    architecture: LabellerArchitecture
    optimisation: OptimisationConfig
    augmentation: LabelAugmentation = LabelAugmentation()
    bundle: str | None = None
    """A bundle, or `t1w-2mm`; with `bundle_output`, which becomes a copy of it that has this labeller, in float16."""
    bundle_output: str | None = None
    """Folder of that copy, new. Its digest is that of `bundle`."""
    start_from: Annotated[str | None, left_out_at(None)] = None
    """A training's folder, a bundle (its folder, or `t1w-2mm`), or `labeller.safetensors` of either, with whose weights it
    begins. Its structures must be the same, in their order."""
    dice_weight: float = 1.0
    """Of the soft Dice loss; that of the cross-entropy is 1."""
    runtime: TrainRuntimeConfig = TrainRuntimeConfig()

    def __post_init__(self) -> None:
        if self.dice_weight < 0:
            raise ValueError("dice_weight must be at least 0")
        _check(self, "train-labeller: its losses are of a whole batch")


@record
class RendererLossConfig:
    """L1 and square at first, then an adversarial loss. `crops` has the weights of what comes with the critic."""

    square_weight: float = 4.0
    """Weight of the mean squared error; that of the L1 is 1. It ends as the critic comes in."""
    gradient_weight: float = 0.5
    """Of the L1 distance of the differences between neighbouring voxels (1511.05440): sharp edges, and no checkerboard."""
    energy_weight: Annotated[float, left_out_at(4.0)] = 4.0
    """Of the energy of high frequencies that a place has more than in the scan (`excess_energy`): a critic alone brings
    noise with the texture."""
    adversarial_weight: float = 0.2
    """Of the adversarial loss; 0 trains without a critic."""
    adversarial_start: int = 500
    """Step at which the critic joins."""
    discriminator_channels: int = 64
    """Of its first layer."""
    discriminator_learning_rate: float = 5e-4
    """Its own."""

    def __post_init__(self) -> None:
        weights = ("square_weight", "gradient_weight", "energy_weight", "adversarial_weight")
        for name in (*weights, "adversarial_start"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} cannot be negative")
        if not 1 <= self.discriminator_channels <= 4096 or self.discriminator_learning_rate <= 0:
            raise ValueError("need discriminator_channels between 1 and 4096, discriminator_learning_rate above 0")


@record
class RendererTrainConfig:
    """`brainsynth train-renderer`."""

    cohort: str
    """A prepared cohort with label maps (docs/labels.md)."""
    output: str
    """Folder of weights, checkpoints, curves and pictures."""
    optimisation: OptimisationConfig
    architecture: RendererArchitecture = RendererArchitecture()
    losses: RendererLossConfig = RendererLossConfig()
    crops: CropsConfig = CropsConfig()
    """Cells are of 2 voxels; `noise` and `pooled_weight` are of the averages that `architecture.coarse` shows."""
    coarse_share: float = 0.6
    """Share of crops that are shown with the scan's averages, where `architecture.coarse` is not 0."""
    flip_left_right: bool = True
    """Augmentation: half of the scans are mirrored; structures named left and right change sides. Off where a side has no
    other."""
    bundle: str | None = None
    """A bundle, or `t1w-2mm`; with `bundle_output`, which becomes a copy of it that has this renderer, in float16."""
    bundle_output: str | None = None
    """Folder of that copy, new. Its digest is that of `bundle`."""
    start_from: Annotated[str | None, left_out_at(None)] = None
    """The same for a renderer, `renderer.safetensors`; its covariates must be the same too. The critic is a new one:
    `losses.adversarial_start: 0` brings it in at once."""
    runtime: TrainRuntimeConfig = TrainRuntimeConfig()

    def __post_init__(self) -> None:
        _check(self, "train-renderer: its crops are small")
        if not 0 <= self.coarse_share <= 1:
            raise ValueError("coarse_share must be between 0 and 1")
        whole, rest = divmod(2 * self.crops.cells, self.architecture.coarse or 1)
        if self.architecture.coarse and (rest or whole < 3):
            raise ValueError("2 * crops.cells must be a multiple of architecture.coarse, and at least 3 times as much")


def _check(config: LabellerTrainConfig | RendererTrainConfig, why: str) -> None:
    """What holds for both. Raises ValueError; `why` says why a micro-batch does nothing."""
    if (config.bundle is None) != (config.bundle_output is None):
        raise ValueError("bundle and bundle_output need each other")
    check_shares(config.optimisation, config.runtime)
    check_keeps(config.runtime)
    if config.runtime.micro_batch:
        raise ValueError(f"runtime.micro_batch does nothing for {why}")
