"""Train the denoiser on cached latents, with conditioning dropout."""

from __future__ import annotations

import copy
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from brainsynth.bundle.files import file_sha256
from brainsynth.bundle.spec import AUTOENCODER_FILE, DIFFUSION_FILE, BundleSpec, LatentSpec, check_latent_grid
from brainsynth.config.schema import SamplerConfig
from brainsynth.config.training import DiffusionTrainConfig
from brainsynth.covariates.distribution import fit_distribution
from brainsynth.covariates.schema import CovariateSchema
from brainsynth.errors import UserError
from brainsynth.models.autoencoder import Autoencoder, build_autoencoder
from brainsynth.models.device import able, autocast
from brainsynth.models.diffusion import Denoiser, drop_context
from brainsynth.models.gaussian_denoiser import FINEST
from brainsynth.models.sampling import draw_noise, guided, sample_latents
from brainsynth.models.schedule import NoiseSchedule
from brainsynth.models.weights import load_weights
from brainsynth.reading.dataset import open_dataset
from brainsynth.records import digest, to_dict
from brainsynth.report.montage import grid
from brainsynth.storage.commit import read_plan, read_samples
from brainsynth.storage.filesystem import local_folder, open_store
from brainsynth.storage.whole_file import full_disk_told
from brainsynth.training.data import batch_indices
from brainsynth.training.ema import Ema
from brainsynth.training.gaussian_fit import fit_gaussian
from brainsynth.training.latents import read_latent_spec
from brainsynth.training.loop import Report, Worker, run
from brainsynth.training.preemption import Preempted, never
from brainsynth.training.runs import (
    AutoencoderRun,
    DiffusionRun,
    autoencoder_weights,
    copy_weights,
    finished,
    read_run,
    training_digest,
    write_run,
    write_weights,
)
from brainsynth.training.state import TrainingState
from brainsynth.training.trackers import check_trackers

log = logging.getLogger(__name__)
NUM_BINS = 5


class LatentTable:
    """One split's latents and contexts, whole in memory (33 600 numbers a subject at paper size)."""

    def __init__(self, uri: str, split: str, schema: CovariateSchema, latents: LatentSpec) -> None:
        means = open_dataset(uri, split=split, array="mean")
        self.table = means.table
        shift = torch.tensor(latents.shift).view(1, -1, 1, 1, 1)
        scale = torch.tensor(latents.scale).view(1, -1, 1, 1, 1)
        self.mean = (torch.from_numpy(means.volumes()) - shift) * scale
        sigma = torch.from_numpy(open_dataset(uri, split=split, array="sigma").volumes())
        # An autoencoder of patches has none; one number stands for all.
        self.sigma = sigma * scale if bool(sigma.any()) else sigma.new_zeros(()).expand(len(sigma), 1, 1, 1, 1)
        self.context = torch.from_numpy(schema.encode(self.table))
        store = open_store(uri)
        samples = read_samples(store, read_plan(store)).iloc[self.table["row"]]
        self.subjects = [str(subject) for subject in samples["subject"]]
        again = samples["mirrored"].to_numpy(bool) if "mirrored" in samples else np.zeros(len(samples), bool)
        self.scans = self.table[~again]
        """The rows that are scans, not mirror images of scans."""

    def __len__(self) -> int:
        return len(self.mean)


class DiffusionTask:
    """One step, validation and figures of the denoiser."""

    def __init__(
        self,
        config: DiffusionTrainConfig,
        worker: Worker,
        schema: CovariateSchema,
        latents: LatentSpec,
        decoder: Autoencoder,
    ) -> None:
        self.config, self.worker, self.schema, self.latents, self.decoder = config, worker, schema, latents, decoder
        options = config.optimisation
        self.precision = able(worker.device, options.precision)
        torch.manual_seed(options.seed)
        self.schedule = NoiseSchedule(config.schedule)
        self.train = LatentTable(config.latents, "train", schema, latents)
        self.validation = LatentTable(config.latents, "validation", schema, latents)
        channels, x, y, z = latents.shape_cxyz
        self.denoiser = Denoiser(config.architecture, channels, schema.context_size, (x, y, z))
        if config.start_from is not None:
            load_weights(self.denoiser, Path(config.start_from), may_lack=FINEST)
        if self.denoiser.gaussian is not None:
            model = self.denoiser.gaussian.latents
            fit_gaussian(model, self.train.mean, self.train.context, self.train.subjects)
        self.denoiser.to(worker.device)
        self._denoiser = worker.parallel(self.denoiser)
        self.average = Ema(self.denoiser, options.ema_decay)
        self.optimizer = torch.optim.AdamW(self.denoiser.parameters(), options.learning_rate, weight_decay=0.01)
        self.optimizer.param_groups[0]["lr_factor"] = 1.0
        self.state = TrainingState(
            {"denoiser": self.denoiser}, {"denoiser": self.average}, {"denoiser": self.optimizer}
        )

    def _timesteps(self, count: int) -> Tensor:
        """Training timesteps: stratified uniform, or logit-normal for flow (2403.03206, section 3.1)."""
        total = self.config.schedule.num_train_timesteps
        u = (torch.arange(count) + torch.rand(count)) / count
        if self.config.schedule.prediction == "flow":
            logits = torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4))
            u = torch.sigmoid(self.config.schedule.logit_mean + self.config.schedule.logit_std * logits)
        return (u * total).long().clamp(0, total - 1)

    def step(self, step: int) -> dict[str, Tensor]:
        """One update."""
        options, device = self.config.optimisation, self.worker.device
        mine = batch_indices(len(self.train), options.batch_size, step, options.seed)[
            self.worker.rank :: self.worker.world_size
        ]
        index = torch.from_numpy(mine)
        x0 = self.train.mean[index] + self.train.sigma[index] * torch.randn(len(index), *self.latents.shape_cxyz)
        drop = torch.rand(len(index)) < self.config.conditioning_dropout
        context = drop_context(self.train.context[index], drop)
        loss = self._loss(self._denoiser, x0, context, self._timesteps(len(index)), torch.randn_like(x0)).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.denoiser.parameters(), options.gradient_clip)
        self.optimizer.step()
        self.average.update(self.denoiser)
        return {"loss": loss.to(device), "gradient_norm": norm}

    def _loss(self, network: nn.Module, x0: Tensor, context: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """(B,) squared error of the prediction; of a Gaussian denoiser, in units of what its diagonal part leaves open."""
        device = self.worker.device
        x0, noise, context = x0.to(device), noise.to(device), context.to(device)
        noisy = self.schedule.add_noise(x0, noise, t)
        with autocast(device, self.precision):
            prediction = network(noisy, t.to(device, torch.float32), context)
        error = (prediction.float() - self.schedule.target(x0, noise, t)).pow(2).flatten(1).mean(1)
        if self.denoiser.gaussian is None:
            return error
        return error / self.denoiser.gaussian.expected_error(t.to(device))

    def averaged(self) -> Denoiser:
        """The denoiser with averaged weights, in evaluation mode."""
        network = copy.deepcopy(self.denoiser)
        network.load_state_dict(self.average.state())
        return network.eval()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Squared error on at most 64 validation subjects, overall and per bin of time; the same noise every time."""
        network, total = self.averaged(), self.config.schedule.num_train_timesteps
        count = min(64, len(self.validation))
        generator = torch.Generator().manual_seed(1)
        losses = {}
        for number in range(NUM_BINS):
            low, high = number * total // NUM_BINS, (number + 1) * total // NUM_BINS
            t = torch.randint(low, high, (count,), generator=generator)
            noise = torch.randn(count, *self.latents.shape_cxyz, generator=generator)
            loss = self._loss(network, self.validation.mean[:count], self.validation.context[:count], t, noise)
            losses[f"loss_t{low}-{high}"] = float(loss.mean())
        return {"loss": sum(losses.values()) / NUM_BINS, **losses}

    @torch.no_grad()
    def figures(self) -> dict[str, Any]:
        """Samples on a fixed grid: the first continuous covariate across, the second down, at 10, 50 and 90 %."""
        rows = covariate_grid(self.train.table, self.schema)
        network, device = self.averaged(), self.worker.device
        context = torch.from_numpy(self.schema.encode(rows)).to(device)
        noise = draw_noise([7] * len(rows), self.latents.shape_cxyz).to(device)
        method = "ab2" if self.config.schedule.prediction == "flow" else "unipc"
        sampler = SamplerConfig(method=method, steps=self.config.figure_steps)
        z = sample_latents(guided(network, context, 1.0), noise, self.schedule, sampler)
        x = self.decoder.decode(z)[:, 0].cpu().numpy()
        across = len(rows) // 3 or 1
        return {"samples": grid([list(x[i : i + across]) for i in range(0, len(rows), across)], scale=1)}


def covariate_grid(table: pd.DataFrame, schema: CovariateSchema) -> pd.DataFrame:
    """Nine rows (three with one continuous covariate) that span the first two; the rest at median or commonest value."""
    continuous = [c.name for c in schema.covariates if c.kind == "continuous"]
    base = {
        c.name: float(table[c.name].median()) if c.kind == "continuous" else table[c.name].mode().iloc[0]
        for c in schema.covariates
    }
    rows = [dict(base)]
    for name in continuous[:2]:
        levels = np.quantile(table[name].dropna(), [0.1, 0.5, 0.9])
        rows = [{**row, name: float(level)} for level in levels for row in rows]
    return pd.DataFrame(rows)


def check(config: DiffusionTrainConfig) -> tuple[CovariateSchema, AutoencoderRun]:
    """Everything that can be refused before a worker starts. Raises UserError."""
    check_trackers(config.runtime.trackers)
    folder = local_folder(config.autoencoder, "autoencoder")
    run_record = read_run(folder, AutoencoderRun, "jobs/train_autoencoder.py")
    autoencoder_weights(folder, run_record)
    plan = read_plan(open_store(config.latents))
    if plan.identity.get("autoencoder") != run_record.weights_sha256:
        raise UserError(
            f"latents {config.latents} were made by another autoencoder than {config.autoencoder}; encode again"
        )
    check_latent_grid(run_record.volume, run_record.architecture, config.architecture)
    if config.start_from is not None and not Path(config.start_from).is_file():
        raise UserError(
            f"start_from: {config.start_from} is no file; give diffusion.safetensors of a training or a bundle"
        )
    if config.conditioning_dropout > 0 and plan.covariates.missing == "refuse":
        raise UserError(
            "conditioning_dropout must be 0 with covariates.missing = refuse: there the all-zero context is a real subject "
            "(every covariate at its lowest), not an unknown one"
        )
    return plan.covariates, run_record


def _data(config: DiffusionTrainConfig) -> str:
    """What the training begins with: latents, and the weights that it goes on from."""
    latents, start = read_plan(open_store(config.latents)).fingerprint, config.start_from
    return latents if start is None else digest({"latents": latents, "start_from": file_sha256(Path(start))})


def fit(config: DiffusionTrainConfig, report: Report = lambda metrics: None, preempted: Preempted = never) -> None:
    """Train, or go on training, and leave averaged weights, the autoencoder and run.json in `config.output`.

    Raises:
        Left: `preempted` asked for it; what was done is saved.
    """
    schema, autoencoder = check(config)
    folder = local_folder(config.output, "output")
    with full_disk_told(folder, "the training's output"):
        folder.mkdir(parents=True, exist_ok=True)
        _fit(config, folder, schema, autoencoder, report, preempted)


def _fit(
    config: DiffusionTrainConfig,
    folder: Path,
    schema: CovariateSchema,
    autoencoder: AutoencoderRun,
    report: Report,
    preempted: Preempted,
) -> None:
    latents = read_latent_spec(open_store(config.latents))
    config_digest = training_digest(config, _data(config))
    if finished(folder, DiffusionRun, config_digest):
        log.info("already trained: %s", folder)
        return
    began = time.monotonic()
    worker = Worker(config.runtime)
    weights = autoencoder_weights(local_folder(config.autoencoder, "autoencoder"), autoencoder)
    decoder = Autoencoder(build_autoencoder(autoencoder.architecture), latents)
    load_weights(decoder.network, weights)
    task = DiffusionTask(config, worker, schema, latents, decoder.eval().to(worker.device))
    distribution = fit_distribution(task.train.scans, schema, config.latents)
    options, trackers = config.optimisation, config.runtime.trackers
    metrics = run(task, worker, options, folder, config_digest, trackers, to_dict(config), report, preempted)
    if worker.rank == 0:
        copy_weights(weights, folder / AUTOENCODER_FILE)
        sha = write_weights(task.averaged(), folder / DIFFUSION_FILE)
        bundle = BundleSpec(
            name="unreleased",
            autoencoder=autoencoder.architecture,
            diffusion=config.architecture,
            schedule=config.schedule,
            latents=latents,
            covariates=schema,
            distribution=distribution,
            volume=autoencoder.volume,
            weights={AUTOENCODER_FILE: autoencoder.weights_sha256, DIFFUSION_FILE: sha},
            licence="unreleased",
            training_data="unreleased",
            provenance={
                "autoencoder_config": autoencoder.config_digest,
                "diffusion_config": config_digest,
                "cohort_fingerprint": autoencoder.cohort_fingerprint,
                "subjects": len(task.train.scans),
                "steps": config.optimisation.steps,
                **{f"autoencoder_{key}": value for key, value in autoencoder.metrics.items()},
                **{f"diffusion_{key}": value for key, value in metrics.items()},
            },
        )
        elapsed_s = time.monotonic() - began
        write_run(
            folder, DiffusionRun(config_digest=config_digest, bundle=bundle, metrics=metrics, elapsed_s=elapsed_s)
        )
