"""Knobs of the networks and their trainings; the same rules as in schema.py."""

from __future__ import annotations

from typing import Annotated, Literal

from brainsynth.records import left_out_at, of_kind, record, told_apart_by_kind

Precision = Literal["float32", "bfloat16"]
DecoderChoice = Literal["own", "distilled"]


def _check_size(channels: tuple[int, ...], *counts: int) -> None:
    """A bundle comes from others: what it asks for must be a network, not a way to take all memory."""
    if not 1 <= len(channels) <= 8 or not all(1 <= c <= 4096 for c in channels):
        raise ValueError("channels must be 1 to 8 levels of 1 to 4096 channels")
    if not all(1 <= count <= 64 for count in counts):
        raise ValueError("num_res_blocks, latent_channels and transformer_layers must be between 1 and 64")


@record
class AutoencoderArchitecture:
    """MONAI `AutoencoderKL`, one channel in and out, no attention (as in the paper)."""

    channels: tuple[int, ...]
    """Per level; each further level halves the grid."""
    latent_channels: int
    num_res_blocks: int = 2
    norm_groups: int = 32

    def __post_init__(self) -> None:
        _check_size(self.channels, self.num_res_blocks, self.latent_channels)
        if any(c % self.norm_groups for c in self.channels):
            raise ValueError(f"channels must be multiples of norm_groups ({self.norm_groups})")

    @property
    def factor(self) -> int:
        """Voxels per latent cell along each axis."""
        return 1 << (len(self.channels) - 1)


@record
class DiffusionArchitecture:
    """MONAI `DiffusionModelUNet`, covariates by concatenation and by cross-attention (as in the paper)."""

    kind: Annotated[Literal["unet"], left_out_at("unet")] = "unet"
    channels: tuple[int, ...]
    attention: tuple[bool, ...]
    """Per level: transformer blocks with self-attention and cross-attention to the covariates."""
    head_channels: int
    """Channels of each attention head; 0: one head a level, as wide as the level (the paper's layout)."""
    num_res_blocks: int = 2
    norm_groups: int = 32
    resblock_updown: bool = False
    transformer_layers: int = 1
    upcast_attention: bool = False

    def __post_init__(self) -> None:
        _check_size(self.channels, self.num_res_blocks, self.transformer_layers)
        if self.head_channels < 0:
            raise ValueError("head_channels must be at least 1, or 0 for one head a level")
        if len(self.attention) != len(self.channels) or not any(self.attention):
            raise ValueError("attention needs one flag per level, and at least one true")
        if any(c % self.norm_groups for c in self.channels):
            raise ValueError(f"channels must be multiples of norm_groups ({self.norm_groups})")
        if any(c % (self.head_channels or c) for c, a in zip(self.channels, self.attention, strict=True) if a):
            raise ValueError("channels of a level with attention must be multiples of head_channels")

    @property
    def cells_xyz(self) -> tuple[int, int, int]:
        """Along each axis the latent grid must be a multiple of these."""
        return (1 << (len(self.channels) - 1),) * 3


@record
class TransformerArchitecture:
    """Diffusion transformer (2212.09748) on patches of latent cells, covariates and time by adaLN-zero."""

    kind: Literal["transformer"]
    patch_xyz: tuple[int, int, int]
    """Latent cells of a token along each axis; the latent grid must be a multiple. Attention costs tokens squared."""
    width: int
    """Numbers of a token; a multiple of `heads`."""
    depth: int
    """Blocks of self-attention and MLP."""
    heads: int
    mlp_ratio: int = 4
    """Width of the MLP inside a block, in widths of a token."""

    def __post_init__(self) -> None:
        counts = (self.depth, self.heads, self.mlp_ratio, *self.patch_xyz)
        if not 1 <= self.width <= 4096 or not all(1 <= count <= 64 for count in counts):
            raise ValueError("width must be 1 to 4096, depth, heads, mlp_ratio and patch_xyz 1 to 64")
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")

    @property
    def cells_xyz(self) -> tuple[int, int, int]:
        """Along each axis the latent cells must be a multiple of these."""
        return self.patch_xyz


DenoiserArchitecture = Annotated[
    Annotated[DiffusionArchitecture, of_kind("unet")] | Annotated[TransformerArchitecture, of_kind("transformer")],
    told_apart_by_kind("unet", ("unet", "transformer")),
]
"""Chosen by the key `kind`; without it the UNet."""


@record
class DecoderArchitecture:
    """A distilled decoder: residual blocks at the latent grid, then depth to space; no convolution at full resolution.

    Level 0 is the latent grid, and each further level is twice as fine. The last depth to space makes up the rest.
    """

    channels: tuple[int, ...]
    blocks: tuple[int, ...]
    """Residual blocks of two convolutions, per level."""
    norm_groups: int = 8

    def __post_init__(self) -> None:
        if not 1 <= len(self.channels) <= 4 or not all(1 <= c <= 512 for c in self.channels):
            raise ValueError("channels must be 1 to 4 levels of 1 to 512 channels")
        if len(self.blocks) != len(self.channels) or not all(0 <= b <= 16 for b in self.blocks):
            raise ValueError("blocks needs one number per level, between 0 and 16")
        if self.norm_groups < 1 or any(c % self.norm_groups for c in self.channels):
            raise ValueError(f"channels must be multiples of norm_groups ({self.norm_groups})")

    def last_factor(self, factor: int) -> int:
        """By how much the last depth to space refines, for `factor` voxels per latent cell along each axis.

        Raises:
            ValueError: the levels leave nothing for it to do, or more than a factor of 8.
        """
        last = factor >> (len(self.channels) - 1)
        if not 2 <= last <= 8:
            raise ValueError(
                f"a decoder of {len(self.channels)} levels does not fit {factor} voxels per latent cell: the last depth to "
                f"space would refine by {last}, and may by 2 to 8"
            )
        return last


@record
class ScheduleConfig:
    """What the denoiser predicts, and how noise is added."""

    prediction: Literal["epsilon", "v", "flow"]
    """`epsilon` is the paper's; `v` (2202.00512) and `flow` (rectified flow) reach good samples sooner."""
    num_train_timesteps: int = 1000
    beta_start: float = 0.0015
    beta_end: float = 0.0205
    """Betas are linear in their square root between start and end (the paper's bundle); unused by `flow`."""
    zero_terminal_snr: Annotated[bool, left_out_at(False)] = False
    """For `v`: the betas are rescaled so that the last timestep is pure noise (2305.08891), as sampling starts there.
    `flow` is so anyway; `epsilon` cannot be, for at pure noise it says nothing about the image."""

    def __post_init__(self) -> None:
        if self.num_train_timesteps < 1 or not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError("need num_train_timesteps >= 1 and 0 < beta_start <= beta_end < 1")
        if self.zero_terminal_snr and (self.prediction != "v" or self.num_train_timesteps < 2):
            raise ValueError("zero_terminal_snr needs prediction: v, and num_train_timesteps of at least 2")


@record
class OptimisationConfig:
    """One training run."""

    steps: int
    batch_size: int
    """Global: shared by all workers."""
    learning_rate: float
    warmup_steps: int = 50
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    precision: Precision = "float32"
    seed: int = 0
    log_every: int = 10
    validate_every: int = 100
    checkpoint_every: int = 100
    keep_checkpoints: int = 3

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.log_every, self.validate_every, self.checkpoint_every) < 1:
            raise ValueError("steps, batch_size, log_every, validate_every and checkpoint_every must be at least 1")
        if not 0 <= self.ema_decay < 1 or self.learning_rate <= 0 or self.keep_checkpoints < 1:
            raise ValueError("need 0 <= ema_decay < 1, learning_rate > 0 and keep_checkpoints >= 1")


@record
class TrainRuntimeConfig:
    """How a training runs; a run may be resumed under another one."""

    workers: int = 1
    """Data-parallel workers (Ray Train); 0 trains in this process without Ray."""
    cpus_per_worker: float = 1.0
    use_gpu: bool = False
    threads_per_worker: int = 0
    max_failures: int = 3
    wait_for_nodes: bool = False
    """On a cluster that grows: start although not all workers fit yet. Else such a layout is refused."""
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        if self.workers < 0 or self.threads_per_worker < 0:
            raise ValueError("workers and threads_per_worker cannot be negative")


@record
class AutoencoderLossConfig:
    """L1 + KL + patch-adversarial + perceptual. Weights after Pinaya's later public training code."""

    kl_weight: float = 1e-8
    adversarial_weight: float = 0.005
    adversarial_start: int = 1000
    """Step at which the adversarial loss joins (warm-up)."""
    discriminator_channels: int = 32
    discriminator_layers: int = 3
    discriminator_learning_rate: float = 1e-4
    perceptual_weight: float = 0.002
    perceptual_weights: str | None = None
    """Local file with the weights of a 3D ResNet (MedicalNet layout); without it the perceptual loss is off."""
    perceptual_depth: Literal[10, 18, 50] = 10


@record
class AutoencoderTrainConfig:
    """`jobs/train_autoencoder.py`."""

    cohort: str
    output: str
    architecture: AutoencoderArchitecture
    losses: AutoencoderLossConfig
    optimisation: OptimisationConfig
    flip_left_right: bool = True
    """Augmentation: half of the volumes are mirrored."""
    runtime: TrainRuntimeConfig = TrainRuntimeConfig()


@record
class DiffusionTrainConfig:
    """`jobs/train_diffusion.py`."""

    latents: str
    autoencoder: str
    """Output folder of the autoencoder's training: decodes the sample figures, and travels into the bundle."""
    output: str
    architecture: DenoiserArchitecture
    schedule: ScheduleConfig
    optimisation: OptimisationConfig
    conditioning_dropout: float = 0.1
    """Share of samples that train without covariates, so that guidance works."""
    figure_steps: int = 20
    """Network evaluations per sample of the sample figures."""
    runtime: TrainRuntimeConfig = TrainRuntimeConfig()

    def __post_init__(self) -> None:
        if not 0 <= self.conditioning_dropout < 1 or self.figure_steps < 1:
            raise ValueError("need 0 <= conditioning_dropout < 1 and figure_steps >= 1")
