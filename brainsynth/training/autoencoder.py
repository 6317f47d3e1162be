"""Train the autoencoder: L1 + KL + patch-adversarial + perceptual, as in the paper."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from monai.networks.nets.autoencoderkl import AutoencoderKL
from monai.networks.nets.patchgan_discriminator import PatchDiscriminator
from torch import Tensor, nn
from torch.func import functional_call

from brainsynth.bundle.spec import AUTOENCODER_FILE, check_latent_grid
from brainsynth.config.training import AutoencoderTrainConfig, CropsConfig
from brainsynth.models.autoencoder import build_autoencoder
from brainsynth.models.device import able, autocast, layout
from brainsynth.models.patch_autoencoder import PatchAutoencoder, principal_components
from brainsynth.models.pyramid import PyramidAutoencoder
from brainsynth.plan import Plan
from brainsynth.reading.dataset import SyntheticDataset, open_dataset
from brainsynth.report.montage import grid
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import local_folder, open_store
from brainsynth.training.crops import check_balance
from brainsynth.training.data import Batches, check_training, flip_half, weights_seed
from brainsynth.training.image_quality import closeness
from brainsynth.training.learner import Learner, adamw, descend_in_parts, recompute
from brainsynth.training.loop import Task, Worker
from brainsynth.training.losses import check_perceptual, kl_divergence, perceptual_loss
from brainsynth.training.pyramid import PyramidTask
from brainsynth.training.runner import Training
from brainsynth.training.runs import AutoencoderRun, Finished, write_autoencoder
from brainsynth.training.starting import load_start, with_start
from brainsynth.training.state import TrainingState


class AutoencoderTask:
    """One step, validation and figures of the autoencoder."""

    def __init__(self, config: AutoencoderTrainConfig, inputs: Inputs, worker: Worker) -> None:
        self.config, self.cohort, self.worker = config, inputs.cohort, worker
        options = config.optimisation
        self.precision = able(worker.device, options.precision)
        torch.manual_seed(weights_seed(options.seed))
        train = open_dataset(config.cohort, split="train")
        network = build_autoencoder(config.architecture)
        assert not isinstance(network, PyramidAutoencoder)
        if isinstance(network, PatchAutoencoder):
            network.start_from(patch_components(train, network.patch, network.analysis.out_channels))
        load_start(network, config.start_from, AUTOENCODER_FILE, "autoencoder")
        layout(network.to(worker.device))
        if config.runtime.recompute:
            recompute(network)
        self.discriminator = PatchDiscriminator(
            spatial_dims=3,
            channels=config.losses.discriminator_channels,
            in_channels=1,
            out_channels=1,
            num_layers_d=config.losses.discriminator_layers,
            norm="INSTANCE",
        ).to(worker.device)
        self.perceptual = perceptual_loss(config.losses, worker.device)
        self.learner = Learner(network, worker, options)
        self._discriminator = worker.parallel(self.discriminator)
        self.discriminator_optimizer = adamw(self.discriminator, config.losses.discriminator_learning_rate, 0.0)
        ratio = config.losses.discriminator_learning_rate / options.learning_rate
        self.discriminator_optimizer.param_groups[0]["lr_factor"] = ratio
        self.state = TrainingState(
            {"autoencoder": network, "discriminator": self.discriminator},
            {"autoencoder": self.learner.average},
            {"autoencoder": self.learner.optimizer, "discriminator": self.discriminator_optimizer},
        )
        self.batches = Batches(train, options.batch_size, options.seed, worker.rank, worker.world_size)
        self.validation = open_dataset(config.cohort, split="validation")

    def step(self, step: int) -> dict[str, Tensor]:
        """One update of the autoencoder, and of the discriminator once the warm-up is over."""
        x = self.batches(step).to(self.worker.device, memory_format=torch.channels_last_3d)
        if self.config.flip_left_right:
            x = flip_half(x)
        weights = self.config.losses
        adversarial = weights.adversarial_weight > 0 and step >= weights.adversarial_start
        decoded: list[Tensor] = []
        values = self.learner.update_in_parts((x,), lambda part: self._loss(part, adversarial, decoded))
        if adversarial:
            values["discriminator"] = self._discriminator_step(x, torch.cat(decoded))
        return values

    def _loss(self, x: Tensor, adversarial: bool, kept: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of some images; what was decoded is added to `kept`."""
        weights = self.config.losses
        with autocast(self.worker.device, self.precision):
            decoded, mu, sigma = self.learner.parallel(x)
        decoded, mu, sigma = decoded.float(), mu.float(), sigma.float()
        kept.append(decoded.detach())
        values = {"l1": nn.functional.l1_loss(decoded, x)}
        loss = values["l1"]
        if self.config.architecture.kind == "kl":
            values["kl"] = kl_divergence(mu, sigma)
            loss = loss + weights.kl_weight * values["kl"]
        if weights.square_weight > 0:
            values["square"] = nn.functional.mse_loss(decoded, x)
            loss = loss + weights.square_weight * values["square"]
        if self.perceptual is not None:
            with autocast(self.worker.device, self.precision):
                values["perceptual"] = self.perceptual(decoded, x)
            loss = loss + weights.perceptual_weight * values["perceptual"]
        if adversarial:
            values["adversarial"] = (self._frozen_discriminator(decoded) - 1).pow(2).mean()
            loss = loss + weights.adversarial_weight * values["adversarial"]
        return loss, values

    def _frozen_discriminator(self, decoded: Tensor) -> Tensor:
        """Scores of decoded images with gradients to the images alone."""
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        with autocast(self.worker.device, self.precision):
            scores: Tensor = functional_call(self.discriminator, frozen, (decoded,))[-1]
        return scores.float()

    def _discriminator_step(self, real: Tensor, fake: Tensor) -> Tensor:
        """Least-squares patch loss (1611.04076): real → 1, decoded → 0."""

        def loss_of(real: Tensor, fake: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            with autocast(self.worker.device, self.precision):
                scores = self._discriminator(torch.cat([real, fake]))[-1]
            on_real, on_fake = scores.float().chunk(2)
            return 0.5 * ((on_real - 1).pow(2).mean() + on_fake.pow(2).mean()), {}

        parts = self.learner.split(real, fake)
        clip = self.config.optimisation.gradient_clip
        return descend_in_parts(self._discriminator, self.discriminator_optimizer, clip, parts, loss_of)["loss"]

    @torch.no_grad()
    def reconstruct(self, network: AutoencoderKL | PatchAutoencoder, x_B1XYZ: Tensor) -> Tensor:  # noqa: N803
        """By averaged weights, from mean latents, without noise: what the bundle will do."""
        with autocast(self.worker.device, self.precision):
            mu, _ = network.encode(x_B1XYZ)
            decoded: Tensor = network.decode(mu)
        return decoded.float().clamp(0, 1)

    def _scan(self, index: int) -> Tensor:
        return torch.from_numpy(self.validation.volume(index))[None, None].to(self.worker.device)

    def validate(self) -> list[dict[str, float]]:
        """L1, PSNR (dB) and SSIM of reconstructions of at most 32 validation scans, one at a time on the device."""
        network, count = self.learner.averaged(), min(32, len(self.validation))
        scans = (self._scan(index) for index in self.worker.part(range(count)))
        return [closeness(self.reconstruct(network, x), x) for x in scans]

    def figures(self) -> dict[str, Any]:
        """Validation scans (top) and their reconstructions (below)."""
        network = self.learner.averaged()
        scans = [self._scan(index) for index in range(min(4, len(self.validation)))]
        made = [self.reconstruct(network, x) for x in scans]
        return {"reconstructions": grid([[x[0, 0].cpu().numpy() for x in row] for row in (scans, made)])}

    def record(self, finished: Finished) -> AutoencoderRun:
        """Write the averaged weights; returns the record of the training."""
        return write_autoencoder(self.learner.averaged(), self.worker.folder, self.config, self.cohort, finished)


def patch_components(train: SyntheticDataset, patch: int, count: int) -> Tensor:
    """(P, count): the principal components of the patches of at most 64 training scans."""
    chosen = range(0, len(train), -(-len(train) // 64))
    return principal_components((torch.from_numpy(train.volume(i))[None, None] for i in chosen), patch, count)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What an autoencoder is trained from."""

    cohort: Plan
    fingerprint: str


def check(config: AutoencoderTrainConfig) -> Inputs:
    """Everything that can be refused before a worker starts, and what was read for it. Raises UserError."""
    plan = read_plan(open_store(config.cohort))
    check_latent_grid(plan.volume, config.architecture)
    local_folder(config.output, "output")
    check_perceptual(config.losses)
    check_balance(config.crops or CropsConfig(), plan.covariates)
    data = with_start(plan.fingerprint, config.start_from, AUTOENCODER_FILE)
    check_training(config, config.cohort, "cohort", plan.covariates)
    return Inputs(plan, data)


def task(config: AutoencoderTrainConfig, inputs: Inputs, worker: Worker) -> Task:
    """That of the architecture's kind."""
    if config.architecture.kind == "pyramid":
        return PyramidTask(config, inputs.cohort, worker)
    return AutoencoderTask(config, inputs, worker)


TRAINING = Training("autoencoder", check, task, AutoencoderRun)
