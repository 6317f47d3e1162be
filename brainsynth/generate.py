"""THE LINE: covariate rows → latents → volumes → one shard, committed. One actor runs this; no tensor leaves it."""

from __future__ import annotations

import functools
import logging
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from brainsynth.bundle import BundleSpec
from brainsynth.config.schema import CovariateSource, GenerateConfig
from brainsynth.errors import UserError, WorkerBroken
from brainsynth.manifest import describe_sample
from brainsynth.models.device import (
    autocast,
    choose_device,
    describe,
    explain,
    free_memory,
    is_broken,
    is_out_of_memory,
    set_threads,
)
from brainsynth.models.sampling import check_sampler, draw_noise, guided, sample_latents
from brainsynth.models.schedule import NoiseSchedule
from brainsynth.models.weights import check_bundle_files, load_models, read_bundle
from brainsynth.plan import Plan, ShardSpec, generation_plan, generation_samples
from brainsynth.records import record
from brainsynth.storage.arrays import empty_arrays
from brainsynth.storage.commit import read_samples
from brainsynth.storage.filesystem import local_folder, open_store, read_table, resolve_uri
from brainsynth.storage.work import Made, Work
from brainsynth.volume import VolumeSpec

log = logging.getLogger(__name__)


def plan_generation(config: GenerateConfig) -> Work:
    """Check everything, and plan: rows, seeds, shards. Needs no network weights in memory; writes nothing.

    Raises:
        UserError: bad bundle, table, covariates or sampler.
    """
    folder = local_folder(config.bundle, "bundle")
    bundle = read_bundle(folder)
    check_bundle_files(folder, bundle)
    check_sampler(bundle.schedule, config.sampler)
    if config.sampler.guidance_scale != 1 and bundle.covariates.missing == "refuse":
        raise UserError("sampler.guidance_scale must be 1: this model was trained without conditioning dropout")
    rows = covariate_rows(config.covariates, bundle)
    volume = VolumeSpec(
        shape_xyz=bundle.volume.shape_xyz,
        spacing_mm=bundle.volume.spacing_mm,
        origin_mm=bundle.volume.origin_mm,
        dtype=config.stored_dtype,
        step=bundle.volume.step,
    )
    extrapolated = bundle.covariates.out_of_range(rows)
    if bundle.distribution is not None:
        extrapolated |= ~bundle.distribution.in_support(rows)
    if extrapolated.any():
        log.warning(
            "%d of %d rows lie outside the training support (a value, or an unusual combination of values): they are made, "
            "and flagged `extrapolated` in the manifest",
            extrapolated.sum(),
            len(rows),
        )
    samples = generation_samples(rows, bundle.covariates, config.base_seed, extrapolated)
    plan = generation_plan(
        bundle.digest,
        volume,
        bundle.covariates,
        samples,
        config.sampler,
        config.precision,
        config.base_seed,
        config.samples_per_shard,
    )
    root = resolve_uri(config.output, "output")
    settings = GeneratorSettings(
        root=root,
        bundle=str(folder),
        micro_batch=config.runtime.micro_batch,
        threads=config.runtime.threads_per_worker,
        workers=config.runtime.workers,
        use_gpu=config.runtime.gpus_per_worker > 0,
        exact_rewrites=config.runtime.exact_rewrites,
    )
    return Work(root, plan, samples, GeneratedShards, {"plan": plan, "config": config, "settings": settings})


def covariate_rows(source: CovariateSource, bundle: BundleSpec) -> pd.DataFrame:
    """The validated rows to generate, from a table or drawn from the bundle's distribution."""
    if source.draw is not None:
        if bundle.distribution is None:
            raise UserError(
                f"covariates.draw: the bundle {bundle.name} has no covariate distribution to draw from, because that of its "
                f"training cohort is not known; give covariates.table with the columns {', '.join(bundle.covariates.names)}"
            )
        return bundle.distribution.draw(source.draw, source.draw_seed, source.constraints)
    path = str(source.table)
    table = read_table(path, "covariates.table")
    if table.empty:
        raise UserError(f"covariates.table: {path} has no rows")
    rows = bundle.covariates.validate(table, path, allow_out_of_range=source.allow_extrapolation)
    if "sample_id" in table.columns:
        rows.insert(0, "sample_id", table["sample_id"].to_numpy())
    if "noise_seed" in table.columns:
        seeds = pd.to_numeric(table["noise_seed"], errors="coerce")
        if not (np.isfinite(seeds) & (seeds >= 0) & (seeds % 1 == 0)).all():
            raise UserError(f"covariates.table: {path}: noise_seed must be a whole number of 0 or more in every row")
        rows.insert(0, "noise_seed", seeds.astype(int).to_numpy())
    return rows


def estimate_s(work: Work, workers: int) -> float:
    """Seconds that the whole plan will take, from one micro-batch made here on this machine; writes nothing."""
    maker: GeneratedShards = work.build_maker(**work.arguments)  # type: ignore[assignment]
    rows = work.samples.iloc[: maker.settings.micro_batch]
    began = time.monotonic()
    maker.volumes(rows, {"sample_s": 0.0, "decode_s": 0.0})
    return (time.monotonic() - began) / len(rows) * work.plan.num_samples / max(1, workers)


@record
class GeneratorSettings:
    """Where a generator finds things and how it runs."""

    root: str
    bundle: str
    micro_batch: int
    threads: int
    workers: int
    use_gpu: bool
    exact_rewrites: bool


class GeneratedShards:
    """Makes shards of synthetic volumes."""

    def __init__(self, plan: Plan, config: GenerateConfig, settings: GeneratorSettings) -> None:
        self.plan, self.config, self.settings = plan, config, settings
        self.micro_batch = settings.micro_batch
        set_threads(settings.threads, settings.workers)
        self.device = choose_device(settings.use_gpu)
        folder = Path(settings.bundle)
        self.bundle = read_bundle(folder)
        if self.bundle.digest != plan.identity["bundle"]:
            raise UserError(f"the bundle {folder} changed while the dataset was being made")
        how = (config.precision, settings.exact_rewrites)
        self.autoencoder, self.denoiser = load_models(folder, self.bundle, self.device, *how)
        explain(self.device, *how)
        self.schedule = NoiseSchedule(self.bundle.schedule)

    @functools.cached_property
    def samples(self) -> pd.DataFrame:
        """The planned rows."""
        return read_samples(open_store(self.settings.root), self.plan)

    def make(self, shard: ShardSpec) -> Made:
        """Sample, decode and quantise the volumes of one shard, or of any rows, a micro-batch at a time.

        A micro-batch that does not fit into memory is halved, for the rest of this worker's life; rows and seeds stay.
        """
        rows = self.samples.iloc[shard.start : shard.stop]
        (voxels,) = empty_arrays(self.plan, shard)
        seconds = {"sample_s": 0.0, "decode_s": 0.0}
        start = 0
        while start < len(rows):
            part = rows.iloc[start : start + self.micro_batch]
            try:
                volumes = self.volumes(part, seconds)
            except Exception as error:
                self._after(error)
                continue
            for offset, volume in enumerate(volumes):
                if np.isfinite(volume).all():
                    voxels[start + offset] = self.plan.volume.quantise(volume)
            start += len(part)
        ids = rows["sample_id"].tolist()
        records = [describe_sample(ids[i], shard.start + i, [voxels[i]]) for i in range(len(rows))]
        runtime = {
            **describe(self.device),
            "micro_batch": self.micro_batch,
            "exact_rewrites": int(self.settings.exact_rewrites),
        }
        return Made([voxels], records, {**runtime, **seconds})

    def _after(self, error: Exception) -> None:
        """Make ready for another try with a smaller micro-batch; raises where none can help."""
        if is_broken(error):
            raise WorkerBroken(f"the accelerator failed: {error}") from error
        if not is_out_of_memory(error) or self.micro_batch == 1:
            raise error
        self.micro_batch //= 2
        free_memory()
        log.warning("out of memory: the micro-batch is now %d", self.micro_batch)

    @torch.no_grad()
    def volumes(
        self, rows: pd.DataFrame, seconds: dict[str, float]
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        """(B, X, Y, Z) float32 images in [0, 1]."""
        began = time.monotonic()
        context = torch.from_numpy(self.bundle.covariates.encode(rows)).to(self.device)
        draw = functools.partial(draw_noise, rows["seed"].tolist(), self.bundle.latents.shape_cxyz)
        sampler = self.config.sampler
        predict = guided(self.denoiser, context, sampler.guidance_scale, sampler.guidance_interval, self.schedule)
        with autocast(self.device, self.config.precision):
            noise = draw(0).to(self.device)
            z = sample_latents(predict, noise, self.schedule, sampler, draw)
            middle = time.monotonic()
            x = self.autoencoder.decode(z)
        images: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = x[:, 0].cpu().numpy()
        seconds["sample_s"] += middle - began
        seconds["decode_s"] += time.monotonic() - middle
        return images
