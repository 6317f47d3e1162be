"""Knobs of the trainings; the same rules as in schema.py."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from brainsynth.config.architectures import AnyAutoencoderArchitecture, DenoiserArchitecture
from brainsynth.records import left_out_at, record

Precision = Literal["float32", "bfloat16"]
DecoderChoice = Literal["own", "distilled", "rendered"]


@record
class ScheduleConfig:
    """What the denoiser predicts, and how noise is added."""

    prediction: Literal["epsilon", "v", "flow"]
    """`epsilon` is the paper's; `v` (2202.00512) and `flow` (rectified flow) reach good samples sooner."""
    num_train_timesteps: int = 1000
    beta_start: float = 0.0015
    beta_end: float = 0.0205
    """Betas are linear in their square root between start and end (the paper's bundle); unused by `flow`."""
    logit_mean: Annotated[float, left_out_at(0.0)] = 0.0
    logit_std: Annotated[float, left_out_at(1.0)] = 1.0
    """For `flow`: training times are logit-normal (2403.03206, section 3.1); a mean below 0 dwells on little noise."""
    zero_terminal_snr: Annotated[bool, left_out_at(False)] = False
    """For `v`: the betas are rescaled so that the last timestep is pure noise (2305.08891), as sampling starts there.
    `flow` is so anyway; `epsilon` cannot be, for at pure noise it says nothing about the image."""

    def __post_init__(self) -> None:
        if self.num_train_timesteps < 1 or not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError("need num_train_timesteps >= 1 and 0 < beta_start <= beta_end < 1")
        if not -5 <= self.logit_mean <= 5 or not 0 < self.logit_std <= 5:
            raise ValueError("need logit_mean between -5 and 5, and logit_std above 0 and at most 5")
        if self.prediction != "flow" and (self.logit_mean, self.logit_std) != (0.0, 1.0):
            raise ValueError("logit_mean and logit_std are for prediction: flow")
        if self.zero_terminal_snr and (self.prediction != "v" or self.num_train_timesteps < 2):
            raise ValueError("zero_terminal_snr needs prediction: v, and num_train_timesteps of at least 2")


@record
class OptimisationConfig:
    """One training run."""

    steps: int
    """Updates of the weights."""
    batch_size: int
    """Global: shared by all workers."""
    learning_rate: float
    """Reached after the warm-up; a cosine brings it down to a tenth."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises from 0."""
    gradient_clip: float = 1.0
    """Largest norm of a gradient; a larger one is scaled down."""
    ema_decay: float = 0.999
    """Of the averaged weights, which are what is used afterwards."""
    precision: Precision = "float32"
    """Of forward and backward passes; weights stay float32."""
    seed: int = 0
    """Of weights, order and noise."""
    log_every: int = 10
    """Steps between two lines of the log."""
    validate_every: int = 100
    """Steps between two validations, with pictures."""
    checkpoint_every: int = 100
    """Steps between two checkpoints."""
    keep_checkpoints: int = 3
    """How many of the newest are kept."""

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.log_every, self.validate_every, self.checkpoint_every) < 1:
            raise ValueError("steps, batch_size, log_every, validate_every and checkpoint_every must be at least 1")
        if min(self.seed, self.warmup_steps) < 0 or not self.gradient_clip > 0:
            raise ValueError("seed and warmup_steps must be at least 0, and gradient_clip above 0")
        if not 0 <= self.ema_decay < 1 or self.learning_rate <= 0 or self.keep_checkpoints < 1:
            raise ValueError("need 0 <= ema_decay < 1, learning_rate > 0 and keep_checkpoints >= 1")


@record
class TrainRuntimeConfig:
    """How a training runs; a run may be resumed under another one."""

    workers: int = 1
    """Data-parallel workers (Ray Train); 0 trains in this process without Ray."""
    cpus_per_worker: float = 1.0
    """CPUs that Ray reserves for each worker."""
    use_gpu: bool = False
    """One GPU for each worker."""
    threads_per_worker: int = 0
    """CPU threads of each worker; 0: an even share of the CPUs that one machine may use, `cpus_per_worker` on several."""
    micro_batch: Annotated[int, left_out_at(0)] = 0
    """Rows of a worker's share of a batch that are in memory together; their gradients are added up. 0: all of them."""
    recompute: Annotated[bool, left_out_at(False)] = False
    """For `train-autoencoder`: the backward pass computes the activations of each block again. A sixth of the memory, a
    third more work."""
    checkpoint_every_s: Annotated[float, left_out_at(0.0)] = 0.0
    """Seconds between two checkpoints at least, except for the last; `checkpoint_every` says at which steps they are
    considered."""
    compress_gradients: Annotated[bool, left_out_at(False)] = False
    """Workers exchange gradients in bfloat16: half of the bytes, where machines are joined by a network alone."""
    max_failures: int = 3
    """Workers may die this often before the run gives up."""
    wait_for_nodes: bool = False
    """On a cluster that grows: start although not all workers fit yet. Else such a layout is refused."""
    trackers: tuple[Literal["tensorboard"], ...] = ("tensorboard",)
    """Where curves are written in addition to metrics.jsonl."""

    def __post_init__(self) -> None:
        counts = (
            self.workers,
            self.threads_per_worker,
            self.cpus_per_worker,
            self.micro_batch,
            self.checkpoint_every_s,
        )
        if not self.checkpoint_every_s < float("inf") or min(counts) < 0 or self.max_failures < -1:
            raise ValueError(
                "workers, threads_per_worker, cpus_per_worker, micro_batch and checkpoint_every_s cannot be negative; "
                "max_failures may be -1: any number"
            )


def check_keeps(runtime: TrainRuntimeConfig) -> None:
    """Raises ValueError where a training that does not recompute is asked to."""
    if runtime.recompute:
        raise ValueError("runtime.recompute is for train-autoencoder alone: no other training needs it")


def check_shares(optimisation: OptimisationConfig, runtime: TrainRuntimeConfig) -> None:
    """Raises ValueError where the workers could not share a batch evenly."""
    if runtime.workers and optimisation.batch_size % runtime.workers:
        raise ValueError(
            f"optimisation.batch_size {optimisation.batch_size} must be a multiple of runtime.workers {runtime.workers}"
        )


@record
class AutoencoderLossConfig:
    """L1 + KL + patch-adversarial + perceptual. Weights after Pinaya's later public training code."""

    kl_weight: float = 1e-8
    """Must be 0 for `architecture.kind: patch` and `pyramid`, whose latents have no spread."""
    square_weight: Annotated[float, left_out_at(0.0)] = 0.0
    """Weight of the mean squared error; that of the L1 is 1."""
    adversarial_weight: float = 0.005
    """Of the adversarial loss."""
    adversarial_start: int = 1000
    """Step at which the adversarial loss joins (warm-up)."""
    discriminator_channels: int = 32
    """Of its first layer."""
    discriminator_layers: int = 3
    """Each halves the grid; a pyramid's critics always look at two grids."""
    discriminator_learning_rate: float = 1e-4
    """Its own."""
    perceptual_weight: float = 0.002
    """Of the perceptual loss."""
    perceptual_weights: str | None = None
    """Local file with the weights of a 3D ResNet (MedicalNet layout); without it the perceptual loss is off."""
    perceptual_depth: Literal[10, 18, 50] = 10
    """Layers of that ResNet."""


@record
class CropsConfig:
    """For `architecture.kind: pyramid` and renderers: the crops that local generators are trained on, and losses only they
    have."""

    cells: int = 16
    """Coarse cells of a crop along each axis; where the grid has fewer, all of them."""
    noise: float = 0.08
    """Largest SD of the noise on the coarse volume, in the networks' units of intensity: drawn volumes have errors."""
    pooled_weight: float = 2.0
    """Of the L1 distance of the result's averages to the coarse volume."""
    l1_weight: float = 0.3
    """Of the L1 distance to the scan once the critics take part; before, it is 1. What is left of it makes details soft."""
    matching_weight: float = 0.1
    """Of the L1 distance of the critic's features of result and scan."""
    penalty_weight: float = 10.0
    """Of the critic's gradient penalty (R1 by finite differences)."""
    critics_alone: int = 50
    """Steps from `losses.adversarial_start` on in which critics learn and generators rest; in as many more steps the part of
    the critics in the loss grows."""
    balance: str | None = None
    """A binary or categorical covariate: scans of each of its values are drawn equally often. None: each scan is."""

    def __post_init__(self) -> None:
        if not 4 <= self.cells <= 64 or not 0 <= self.noise <= 1:
            raise ValueError("cells must be between 4 and 64, and noise between 0 and 1")
        for name in ("pooled_weight", "l1_weight", "matching_weight", "penalty_weight", "critics_alone"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} cannot be negative")


@record
class AutoencoderTrainConfig:
    """`brainsynth train-autoencoder`."""

    cohort: str
    """The prepared cohort."""
    output: str
    """Folder of weights, checkpoints, curves and pictures."""
    architecture: AnyAutoencoderArchitecture
    losses: AutoencoderLossConfig
    optimisation: OptimisationConfig
    flip_left_right: bool = True
    """Augmentation: half of the volumes are mirrored."""
    crops: Annotated[CropsConfig | None, left_out_at(None)] = None
    """For `architecture.kind: pyramid` only, which is trained on crops; without it by the defaults."""
    start_from: Annotated[str | None, left_out_at(None)] = None
    """A training's folder, or `autoencoder.safetensors` of a training or a bundle, whose weights it begins with: to train
    further, with more steps or another learning rate. The discriminator starts from random weights."""
    denoiser_follows: Annotated[bool, left_out_at(True)] = True
    """Refuse, before anything is trained, a cohort whose covariates are too few for the denoiser's training: it needs the
    distribution of 20 known values of each. `false`: the autoencoder alone is wanted."""
    runtime: TrainRuntimeConfig = TrainRuntimeConfig()

    def __post_init__(self) -> None:
        kind = self.architecture.kind
        if kind != "kl" and self.losses.kl_weight != 0:
            raise ValueError(f"losses.kl_weight must be 0 with architecture.kind: {kind}, whose latents have no spread")
        if kind == "pyramid" and self.losses.perceptual_weight != 0:
            raise ValueError(
                "losses.perceptual_weight must be 0 with architecture.kind: pyramid, which has no such loss"
            )
        if kind != "pyramid" and self.crops is not None:
            raise ValueError(f"crops is for architecture.kind: pyramid; {kind} is trained on whole volumes")
        if kind == "pyramid" and (self.runtime.micro_batch or self.runtime.recompute):
            raise ValueError(
                "runtime.micro_batch and recompute do nothing for architecture.kind: pyramid: its crops are small"
            )
        check_shares(self.optimisation, self.runtime)


@record
class DiffusionTrainConfig:
    """`brainsynth train-diffusion`."""

    latents: str
    """Output folder of `brainsynth encode-latents`."""
    autoencoder: str
    """Output folder of the autoencoder's training, or the bundle whose autoencoder made the latents: decodes the sample
    figures, and is copied into the bundle."""
    output: str
    """Folder of weights, checkpoints, curves and pictures."""
    architecture: DenoiserArchitecture
    schedule: ScheduleConfig
    optimisation: OptimisationConfig
    conditioning_dropout: float = 0.1
    """Share of samples that train without covariates, so that guidance works."""
    figure_steps: int = 20
    """Network evaluations per sample of the sample figures."""
    start_from: Annotated[str | None, left_out_at(None)] = None
    """A training's folder, a bundle (its folder, or `t1w-2mm`), or `diffusion.safetensors` of either, with whose weights it
    begins: to train further, with more steps or another learning rate. The network may have had fewer `finest_blocks`: the
    others begin as the identity. Covariates and grid must be the same in number and size; a Gaussian model is fitted to
    these latents anyway, unless a bundle's autoencoder made them: then the one that it begins with is kept."""
    emphasis: Annotated[dict[str, float], left_out_at({})] = field(default_factory=dict)
    """Continuous covariate → factor on its slopes in the mean of a fitted Gaussian model, for instance
    `ventricular_volume: 1.2`; applied to the weights at the end. What is decoded from a mean shows less than the mean was
    asked for: a mean of scans has blurred borders. Measure the slope on generated volumes, and give its inverse."""
    runtime: TrainRuntimeConfig = TrainRuntimeConfig()

    def __post_init__(self) -> None:
        if self.emphasis and self.architecture.kind != "gaussian":
            raise ValueError("emphasis is for architecture.kind: gaussian")
        if any(not 0.5 <= factor <= 2 for factor in self.emphasis.values()):
            raise ValueError("emphasis: a factor must be 0.5 to 2")
        if not 0 <= self.conditioning_dropout < 1 or self.figure_steps < 1:
            raise ValueError("need 0 <= conditioning_dropout < 1 and figure_steps >= 1")
        check_shares(self.optimisation, self.runtime)
        check_keeps(self.runtime)
        flow = self.schedule.prediction == "flow" and self.schedule.num_train_timesteps == 1000
        if self.architecture.kind == "gaussian" and not flow:
            raise ValueError(
                "architecture.kind: gaussian needs schedule.prediction: flow with 1000 num_train_timesteps"
            )
