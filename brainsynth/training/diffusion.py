"""Train the denoiser on cached latents, with conditioning dropout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from brainsynth.bundle.spec import AUTOENCODER_FILE, DIFFUSION_FILE, LatentSpec, check_latent_grid
from brainsynth.config.architectures import GaussianArchitecture
from brainsynth.config.schema import SamplerConfig
from brainsynth.config.training import DiffusionTrainConfig
from brainsynth.covariates.distribution import fit_distribution
from brainsynth.covariates.schema import CovariateSchema
from brainsynth.errors import UserError
from brainsynth.models.autoencoder import Autoencoder, build_autoencoder
from brainsynth.models.device import able, autocast
from brainsynth.models.diffusion import Denoiser, drop_context
from brainsynth.models.gaussian_denoiser import ADDED, GAUSSIAN
from brainsynth.models.sampling import draw_noise, guided, sample_latents
from brainsynth.models.schedule import NoiseSchedule
from brainsynth.models.weights import load_weights
from brainsynth.reading.dataset import open_dataset
from brainsynth.report.montage import grid
from brainsynth.storage.commit import read_plan, read_samples
from brainsynth.storage.filesystem import local_folder, open_store
from brainsynth.training.data import batch_indices, check_training, weights_seed
from brainsynth.training.gaussian_fit import emphasise, fit_asymmetry, fit_gaussian
from brainsynth.training.latents import WHITENED_AS, read_latent_spec
from brainsynth.training.learner import Learner
from brainsynth.training.loop import Worker
from brainsynth.training.runner import Training
from brainsynth.training.runs import (
    AutoencoderRun,
    DenoiserRun,
    DiffusionRun,
    Finished,
    copy_weights,
    trained_autoencoder,
    write_weights,
)
from brainsynth.training.starting import load_start, with_start

NUM_BINS = 5
VALIDATED_TOGETHER = 8
"""Rows of a validation in one forward pass: 64 of the paper's would need more memory than a step."""


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
        self.mirrored = torch.tensor(again)
        self.scans = self.table[~again]
        """The rows that are scans, not mirror images of scans."""

    def __len__(self) -> int:
        return len(self.mean)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a denoiser is trained from."""

    autoencoder: AutoencoderRun
    autoencoder_file: Path
    covariates: CovariateSchema
    latents: LatentSpec
    fingerprint: str
    of_bundle: bool = False
    """Whether a bundle's autoencoder made the latents. A denoiser that starts from the bundle's then keeps its Gaussian
    model, as few people cannot say more about the covariance, and a covariate may have one category in this cohort."""


class DiffusionTask:
    """One step, validation and figures of the denoiser."""

    def __init__(self, config: DiffusionTrainConfig, inputs: Inputs, worker: Worker) -> None:
        self.config, self.inputs, self.worker = config, inputs, worker
        self.schema, self.latents = inputs.covariates, inputs.latents
        options = config.optimisation
        self.precision = able(worker.device, options.precision)
        torch.manual_seed(weights_seed(options.seed))
        self.schedule = NoiseSchedule(config.schedule)
        self.train = LatentTable(config.latents, "train", self.schema, self.latents)
        self.validation = LatentTable(config.latents, "validation", self.schema, self.latents)
        self.distribution = fit_distribution(self.train.scans, self.schema, config.latents, inputs.of_bundle)
        channels, x, y, z = self.latents.shape_cxyz
        denoiser = Denoiser(config.architecture, channels, self.schema.context_size, (x, y, z), self.schema)
        keeps = inputs.of_bundle and config.start_from is not None
        model = None if denoiser.gaussian is None else denoiser.gaussian.latents
        fitted = () if model is None or keeps else (GAUSSIAN,)
        load_start(denoiser, config.start_from, DIFFUSION_FILE, "denoiser", may_lack=ADDED, fitted=fitted)
        train = self.train
        if model is not None and not keeps:
            fit_gaussian(model, train.mean, train.context, train.subjects, train.mirrored, self.schema.logarithmic())
        elif model is not None and train.mirrored.any():
            fit_asymmetry(model, train.mean, train.context, train.mirrored)
        self.learner = Learner(denoiser.to(worker.device), worker, options, weight_decay=0.01)
        self.state = self.learner.state("denoiser")

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
        options = self.config.optimisation
        index = self.worker.share(batch_indices(len(self.train), options.batch_size, step, options.seed))
        x0 = self.train.mean[index] + self.train.sigma[index] * torch.randn(len(index), *self.latents.shape_cxyz)
        drop = torch.rand(len(index)) < self.config.conditioning_dropout
        context = drop_context(self.train.context[index], drop)

        def loss_of(*part: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return self._loss(self.learner.parallel, *part).mean(), {}

        batch = (x0, context, self._timesteps(len(index)), torch.randn_like(x0), self.train.mirrored[index])
        return self.learner.update_in_parts(batch, loss_of)

    def _loss(
        self, network: nn.Module, x0: Tensor, context: Tensor, t: Tensor, noise: Tensor, mirrored: Tensor
    ) -> Tensor:
        """(B,) squared error of the prediction; of a Gaussian denoiser, in units of what its diagonal part leaves open."""
        device = self.worker.device
        x0, noise, context, mirrored = (part.to(device) for part in (x0, noise, context, mirrored))
        noisy = self.schedule.add_noise(x0, noise, t)
        with autocast(device, self.precision):
            prediction = network(noisy, t.to(device, torch.float32), context, mirrored)
        error: Tensor = (prediction.float() - self.schedule.target(x0, noise, t)).pow(2).flatten(1).mean(1)
        gaussian = self.learner.network.gaussian
        return error if gaussian is None else error / gaussian.expected_error(t.to(device))

    @torch.no_grad()
    def validate(self) -> list[dict[str, float]]:
        """Squared error on at most 64 validation subjects, overall and per bin of time; the same noise every time."""
        network, total = self.learner.averaged(), self.config.schedule.num_train_timesteps
        held = self.validation
        count = min(64, len(held))
        generator = torch.Generator().manual_seed(1)
        mine = torch.tensor(self.worker.part(range(count)))
        losses: dict[str, list[float]] = {}
        for number in range(NUM_BINS):
            low, high = number * total // NUM_BINS, (number + 1) * total // NUM_BINS
            t = torch.randint(low, high, (count,), generator=generator)
            noise = torch.randn(count, *self.latents.shape_cxyz, generator=generator)
            parts = (
                self._loss(network, held.mean[i], held.context[i], t[i], noise[i], held.mirrored[i])
                for i in torch.split(mine, VALIDATED_TOGETHER)
            )
            losses[f"loss_t{low}-{high}"] = [loss for part in parts for loss in part.tolist()]
        rows = [dict(zip(losses, row, strict=True)) for row in zip(*losses.values(), strict=True)]
        return [{"loss": sum(row.values()) / NUM_BINS, **row} for row in rows]

    @torch.no_grad()
    def figures(self) -> dict[str, Any]:
        """Samples on a fixed grid: the first continuous covariate across, the second down, at 10, 50 and 90 %."""
        rows = covariate_grid(self.train.table, self.schema)
        network, device = self.learner.averaged(), self.worker.device
        context = torch.from_numpy(self.schema.encode(rows)).to(device)
        noise = draw_noise([7] * len(rows), self.latents.shape_cxyz).to(device)
        flow = self.config.schedule.prediction == "flow"
        sampler = SamplerConfig(method="ab2" if flow else "unipc", steps=self.config.figure_steps)
        decoder = Autoencoder(
            build_autoencoder(self.inputs.autoencoder.architecture, self.schema.context_size), self.latents
        )
        load_weights(decoder.network, self.inputs.autoencoder_file)
        decoder.eval().to(device)
        with autocast(device, self.precision):
            z = sample_latents(guided(network, context, 1.0), noise, self.schedule, sampler)
            pairs = zip(torch.split(z, 1), torch.split(context, 1), strict=True)
            x = [decoder.decode(one, known)[0, 0].cpu().numpy() for one, known in pairs]
        across = len(rows) // 3 or 1
        return {"samples": grid([x[i : i + across] for i in range(0, len(rows), across)], scale=1)}

    def record(self, finished: Finished) -> DenoiserRun:
        """Write the averaged weights, and the autoencoder's next to them; returns the record of the training."""
        copy_weights(self.inputs.autoencoder_file, self.worker.folder / AUTOENCODER_FILE)
        network = self.learner.averaged()
        if network.gaussian is not None and self.config.emphasis:
            factors = self.schema.by_position(self.config.emphasis, "emphasis")
            emphasise(network.gaussian.latents, self.train.context, factors, self.schema.missing == "indicator")
        return DenoiserRun(
            config_digest=finished.config_digest,
            autoencoder=self.inputs.autoencoder,
            architecture=self.config.architecture,
            schedule=self.config.schedule,
            latents=self.latents,
            distribution=self.distribution,
            subjects=len(self.train.scans),
            steps=self.config.optimisation.steps,
            weights_sha256=write_weights(network, self.worker.folder / DIFFUSION_FILE),
            metrics=finished.metrics,
            elapsed_s=finished.elapsed_s,
        )


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


def check(config: DiffusionTrainConfig) -> Inputs:
    """Everything that can be refused before a worker starts, and what was read for it. Raises UserError."""
    local_folder(config.output, "output")
    store = open_store(config.latents)
    plan = read_plan(store)
    autoencoder, file, _ = trained_autoencoder(
        config.autoencoder, plan.covariates, str(plan.identity.get("cohort", ""))
    )
    if plan.identity.get("autoencoder") != autoencoder.weights_sha256:
        raise UserError(
            f"latents {config.latents} were made by another autoencoder than {config.autoencoder}; encode again"
        )
    check_latent_grid(autoencoder.volume, autoencoder.architecture, config.architecture)
    if isinstance(config.architecture, GaussianArchitecture) and config.architecture.crossed:
        plan.covariates.products(config.architecture.crossed)
    if config.conditioning_dropout > 0 and plan.covariates.missing == "refuse":
        raise UserError(
            "conditioning_dropout must be 0 with covariates.missing = refuse: there the all-zero context is a real subject "
            "(every covariate at its lowest), not an unknown one"
        )
    plan.covariates.by_position(config.emphasis, "emphasis")
    data = with_start(plan.fingerprint, config.start_from, DIFFUSION_FILE)
    of_bundle = WHITENED_AS in plan.identity
    if config.emphasis and of_bundle and config.start_from is not None:
        raise UserError("emphasis: the Gaussian model of the bundle is kept, with the slopes it has; leave it out")
    check_training(config, config.latents, "latents", plan.covariates, array="mean", one_category=of_bundle)
    return Inputs(autoencoder, file, plan.covariates, read_latent_spec(store), data, of_bundle)


TRAINING = Training("diffusion", check, DiffusionTask, DenoiserRun, older=(DiffusionRun,))
