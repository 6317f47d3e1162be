"""Train the autoencoder: L1 + KL + patch-adversarial + perceptual, as in the paper."""

from __future__ import annotations

import copy
import logging
import time
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import PatchDiscriminator
from torch import Tensor, nn
from torch.func import functional_call

from brainsynth.bundle.spec import AUTOENCODER_FILE, check_latent_grid
from brainsynth.config.training import AutoencoderTrainConfig
from brainsynth.errors import UserError
from brainsynth.models.autoencoder import build_autoencoder
from brainsynth.models.device import able, autocast, layout
from brainsynth.models.patch_autoencoder import PatchAutoencoder, principal_components
from brainsynth.reading.dataset import SyntheticDataset, open_dataset
from brainsynth.records import to_dict
from brainsynth.report.montage import grid
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import local_folder, open_store
from brainsynth.storage.whole_file import full_disk_told
from brainsynth.training.data import Batches, flip_half
from brainsynth.training.ema import Ema
from brainsynth.training.image_quality import closeness, mean_closeness
from brainsynth.training.loop import Report, Worker, run
from brainsynth.training.losses import check_perceptual, kl_divergence, perceptual_loss
from brainsynth.training.preemption import Preempted, never
from brainsynth.training.runs import AutoencoderRun, finished, training_digest, write_run, write_weights
from brainsynth.training.state import TrainingState
from brainsynth.training.trackers import check_trackers

log = logging.getLogger(__name__)


class AutoencoderTask:
    """One step, validation and figures of the autoencoder."""

    def __init__(self, config: AutoencoderTrainConfig, worker: Worker) -> None:
        self.config, self.worker = config, worker
        options = config.optimisation
        self.precision = able(worker.device, options.precision)
        torch.manual_seed(options.seed)
        train = open_dataset(config.cohort, split="train")
        self.network = build_autoencoder(config.architecture)
        if isinstance(self.network, PatchAutoencoder):
            basis = patch_components(train, self.network.patch, self.network.analysis.out_channels)
            self.network.start_from(basis)
        self.network.to(worker.device)
        layout(self.network)
        self.discriminator = PatchDiscriminator(
            spatial_dims=3,
            channels=config.losses.discriminator_channels,
            in_channels=1,
            out_channels=1,
            num_layers_d=config.losses.discriminator_layers,
            norm="INSTANCE",
        ).to(worker.device)
        self.perceptual = perceptual_loss(config.losses, worker.device)
        self._network = worker.parallel(self.network)
        self._discriminator = worker.parallel(self.discriminator)
        self.average = Ema(self.network, options.ema_decay)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), options.learning_rate, weight_decay=0.0)
        self.discriminator_optimizer = torch.optim.AdamW(
            self.discriminator.parameters(), config.losses.discriminator_learning_rate, weight_decay=0.0
        )
        self.optimizer.param_groups[0]["lr_factor"] = 1.0
        ratio = config.losses.discriminator_learning_rate / options.learning_rate
        self.discriminator_optimizer.param_groups[0]["lr_factor"] = ratio
        self.state = TrainingState(
            {"autoencoder": self.network, "discriminator": self.discriminator},
            {"autoencoder": self.average},
            {"autoencoder": self.optimizer, "discriminator": self.discriminator_optimizer},
        )
        self.batches = Batches(train, options.batch_size, options.seed, worker.rank, worker.world_size)
        self.validation = open_dataset(config.cohort, split="validation")

    def step(self, step: int) -> dict[str, Tensor]:
        """One update of the autoencoder, and of the discriminator once the warm-up is over."""
        weights, options = self.config.losses, self.config.optimisation
        x = self.batches(step).to(self.worker.device, memory_format=torch.channels_last_3d)
        if self.config.flip_left_right:
            x = flip_half(x)
        with autocast(self.worker.device, self.precision):
            decoded, mu, sigma = self._network(x)
        decoded, mu, sigma = decoded.float(), mu.float(), sigma.float()
        values = {"l1": nn.functional.l1_loss(decoded, x)}
        loss = values["l1"]
        if self.config.architecture.kind == "kl":
            values["kl"] = kl_divergence(mu, sigma)
            loss = loss + weights.kl_weight * values["kl"]
        if weights.square_weight > 0:
            values["square"] = nn.functional.mse_loss(decoded, x)
            loss = loss + weights.square_weight * values["square"]
        if self.perceptual is not None:
            values["perceptual"] = self.perceptual(decoded, x)
            loss = loss + weights.perceptual_weight * values["perceptual"]
        adversarial = weights.adversarial_weight > 0 and step >= weights.adversarial_start
        if adversarial:
            values["adversarial"] = (self._frozen_discriminator(decoded) - 1).pow(2).mean()
            loss = loss + weights.adversarial_weight * values["adversarial"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        values["gradient_norm"] = nn.utils.clip_grad_norm_(self.network.parameters(), options.gradient_clip)
        self.optimizer.step()
        self.average.update(self.network)
        if adversarial:
            values["discriminator"] = self._discriminator_step(x, decoded.detach())
        return {"loss": loss, **values}

    def _frozen_discriminator(self, decoded: Tensor) -> Tensor:
        """Scores of decoded images with gradients to the images alone."""
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        with autocast(self.worker.device, self.precision):
            scores: Tensor = functional_call(self.discriminator, frozen, (decoded,))[-1]
        return scores.float()

    def _discriminator_step(self, real: Tensor, fake: Tensor) -> Tensor:
        """Least-squares patch loss (1611.04076): real → 1, decoded → 0."""
        with autocast(self.worker.device, self.precision):
            scores = self._discriminator(torch.cat([real, fake]))[-1]
        on_real, on_fake = scores.float().chunk(2)
        loss = 0.5 * ((on_real - 1).pow(2).mean() + on_fake.pow(2).mean())
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.discriminator.parameters(), self.config.optimisation.gradient_clip)
        self.discriminator_optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def reconstruct(self, x_B1XYZ: Tensor) -> Tensor:  # noqa: N803
        """Averaged weights, mean latents, no noise: what the bundle will do."""
        network = copy.deepcopy(self.network)
        network.load_state_dict(self.average.state())
        network.eval()
        mu, _ = network.encode(x_B1XYZ.to(self.worker.device))
        decoded: Tensor = network.decode(mu).float().clamp(0, 1).cpu()
        return decoded

    def validate(self) -> dict[str, float]:
        """L1, PSNR (dB) and SSIM of reconstructions of at most 32 validation scans."""
        return reconstruction_quality(self.validation, self.reconstruct, limit=32)

    def figures(self) -> dict[str, Any]:
        """Validation scans (top) and their reconstructions (below)."""
        x = torch.from_numpy(self.validation.volumes(range(min(4, len(self.validation)))))[:, None]
        return {"reconstructions": grid([list(x[:, 0].numpy()), list(self.reconstruct(x)[:, 0].numpy())])}


def patch_components(train: SyntheticDataset, patch: int, count: int) -> Tensor:
    """(P, count): the principal components of the patches of at most 64 training scans."""
    chosen = range(0, len(train), -(-len(train) // 64))
    return principal_components((torch.from_numpy(train.volume(i))[None, None] for i in chosen), patch, count)


def reconstruction_quality(dataset: SyntheticDataset, reconstruct: Any, limit: int) -> dict[str, float]:
    """Mean L1, PSNR and SSIM over the first `limit` volumes."""
    scans = (torch.from_numpy(dataset.volume(index))[None, None] for index in range(min(limit, len(dataset))))
    return mean_closeness(closeness(reconstruct(x), x) for x in scans)


def check(config: AutoencoderTrainConfig) -> None:
    """Everything that can be refused before a worker starts. Raises UserError."""
    plan = read_plan(open_store(config.cohort))
    check_latent_grid(plan.volume, config.architecture)
    local_folder(config.output, "output")
    check_trackers(config.runtime.trackers)
    check_perceptual(config.losses)
    try:
        for split in ("train", "validation"):
            open_dataset(config.cohort, split=split)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"cohort: {error}") from None


def fit(config: AutoencoderTrainConfig, report: Report = lambda metrics: None, preempted: Preempted = never) -> None:
    """Train, or go on training, and leave averaged weights and run.json in `config.output`.

    Raises:
        Left: `preempted` asked for it; what was done is saved.
    """
    check(config)
    folder = local_folder(config.output, "output")
    with full_disk_told(folder, "the training's output"):
        folder.mkdir(parents=True, exist_ok=True)
        _fit(config, folder, report, preempted)


def _fit(config: AutoencoderTrainConfig, folder: Path, report: Report, preempted: Preempted) -> None:
    plan = read_plan(open_store(config.cohort))
    config_digest = training_digest(config, plan.fingerprint)
    if finished(folder, AutoencoderRun, config_digest):
        log.info("already trained: %s", folder)
        return
    began = time.monotonic()
    worker = Worker(config.runtime)
    task = AutoencoderTask(config, worker)
    options, trackers = config.optimisation, config.runtime.trackers
    metrics = run(task, worker, options, folder, config_digest, trackers, to_dict(config), report, preempted)
    if worker.rank == 0:
        task.network.load_state_dict(task.average.state())
        sha = write_weights(task.network, folder / AUTOENCODER_FILE)
        record = AutoencoderRun(
            config_digest=config_digest,
            architecture=config.architecture,
            volume=plan.volume,
            covariates=plan.covariates,
            cohort_fingerprint=plan.fingerprint,
            weights_sha256=sha,
            metrics=metrics,
            elapsed_s=time.monotonic() - began,
        )
        write_run(folder, record)
