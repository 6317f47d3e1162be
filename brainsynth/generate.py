"""THE LINE: covariate rows → latents → volumes → one shard, committed. One actor runs this; no tensor leaves it."""

from __future__ import annotations

import functools
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from brainsynth.bundle.files import bundle_folder, check_bundle_files, check_decoder, read_bundle
from brainsynth.bundle.spec import GATE_FILE, BundleSpec
from brainsynth.config.gate import GateConfig
from brainsynth.config.schema import SHIPPED_BUNDLE, CovariateSource, GenerateConfig
from brainsynth.errors import UserError, WorkerBroken
from brainsynth.gate.drawn import Drawn
from brainsynth.gate.file import load_gate
from brainsynth.gate.gate import QualityGate
from brainsynth.gate.rules import Gatekeeper, GateRules, gate_rules
from brainsynth.manifest import MODEL_KEY, ModelRecord, SampleRecord
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
from brainsynth.models.sampler_rules import check_bundle_sampler
from brainsynth.models.sampling import sample_rows
from brainsynth.models.schedule import NoiseSchedule
from brainsynth.models.weights import load_models
from brainsynth.plan import Plan, ShardSpec, attempt_seed, generation_plan, generation_samples
from brainsynth.records import from_dict, record, seal, to_dict
from brainsynth.storage.arrays import empty_arrays
from brainsynth.storage.commit import read_samples
from brainsynth.storage.filesystem import open_store, read_table, resolve_uri
from brainsynth.storage.work import Made, Work
from brainsynth.volume import VolumeSpec

log = logging.getLogger(__name__)


def plan_generation(config: GenerateConfig) -> Work:
    """Check everything, and plan: rows, seeds, shards. Needs no network weights in memory; writes nothing.

    Raises:
        UserError: bad bundle, table, covariates or sampler.
    """
    folder = bundle_folder(config.bundle)
    bundle = read_bundle(folder)
    check_bundle_files(folder, bundle)
    check_decoder(folder, bundle, config.decoder)
    check_bundle_sampler(bundle, config.sampler)
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
    empty = rows[list(bundle.covariates.names)].isna().sum()
    if empty.any():
        told = ", ".join(f"{name} in {count}" for name, count in empty.items() if count)
        log.warning("empty cells: %s of %d rows; there the model is told that the value is not known", told, len(rows))
    rules = None if config.gate is None else to_dict(planned_rules(config.gate, folder, bundle))
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
        rules,
        config.decoder,
    )
    root = resolve_uri(config.output, "output")
    settings = GeneratorSettings(
        root=root,
        bundle=config.bundle if config.bundle == SHIPPED_BUNDLE else str(folder),  # each node has its own copy
        micro_batch=config.runtime.micro_batch,
        threads=config.runtime.threads_per_worker,
        workers=config.runtime.workers,
        use_gpu=config.runtime.gpus_per_worker > 0,
        exact_rewrites=config.runtime.exact_rewrites,
    )
    return Work(root, plan, samples, GeneratedShards, {"plan": plan, "config": config, "settings": settings})


def planned_rules(config: GateConfig, folder: Path, bundle: BundleSpec) -> GateRules:
    """What the bundle's gate may refuse. Raises UserError when it has none, or the config does not suit it."""
    if GATE_FILE not in bundle.weights:
        raise UserError(
            f"gate: the bundle {folder} has no quality gate; export it again with gate in the config of "
            "jobs/export_bundle.py, or leave gate out here"
        )
    return gate_rules(config, bundle_gate(folder, bundle), bundle.weights[GATE_FILE])


def bundle_gate(folder: Path, bundle: BundleSpec) -> QualityGate:
    """The gate of a bundle whose files were checked. Raises UserError when it is damaged or for another grid."""
    gate = load_gate(folder / GATE_FILE)
    if (gate.spec.volume.shape_xyz, gate.spec.volume.spacing_mm) != (bundle.volume.shape_xyz, bundle.volume.spacing_mm):
        raise UserError(f"{folder / GATE_FILE} is for volumes of another grid than the bundle's")
    return gate


def write_model_record(work: Work, bundle: str) -> None:
    """Beside a dataset: which model made it, and on what terms; exports carry that on."""
    spec = read_bundle(bundle_folder(bundle))
    made = ModelRecord(bundle=spec.digest, name=spec.name, licence=spec.licence, training_data=spec.training_data)
    work.store.write(MODEL_KEY, seal(made))


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
        folder = bundle_folder(settings.bundle)
        self.bundle = read_bundle(folder)
        if self.bundle.digest != plan.identity["bundle"]:
            raise UserError(f"the bundle {folder} changed while the dataset was being made")
        how = (config.precision, settings.exact_rewrites)
        self.autoencoder, self.denoiser = load_models(folder, self.bundle, self.device, *how, config.decoder)
        explain(self.device, *how)
        self.schedule = NoiseSchedule(self.bundle.schedule)
        self.gatekeeper: Gatekeeper | None = None
        if "gate" in plan.identity:
            rules = from_dict(GateRules, plan.identity["gate"], "the plan's gate")
            self.gatekeeper = Gatekeeper(bundle_gate(folder, self.bundle), rules)

    @functools.cached_property
    def samples(self) -> pd.DataFrame:
        """The planned rows."""
        return read_samples(open_store(self.settings.root), self.plan)

    def make(self, shard: ShardSpec) -> Made:
        """Sample and decode the volumes of one shard, or of any rows, a micro-batch at a time.

        What needs no device (quantising, digests, quality figures) waits until the samples are asked for. A micro-batch
        that does not fit into memory is halved, for the rest of this worker's life; rows and seeds stay.
        """
        rows = self.samples.iloc[shard.start : shard.stop]
        (array,) = self.plan.arrays
        voxels = np.empty((len(rows), *array.sample_shape), array.dtype)  # each row is written when it is finished
        seconds = {"sample_s": 0.0, "decode_s": 0.0}
        drawn: list[Drawn] = []
        while len(drawn) < len(rows):
            part = rows.iloc[len(drawn) : len(drawn) + self.micro_batch]
            try:
                drawn += self._draw(part, seconds)
            except Exception as error:
                self._after(error)

        def finish(offset: int) -> SampleRecord:
            volume, row = drawn[offset].volume, shard.start + offset
            if volume is not None and np.isfinite(volume).all():
                voxels[offset] = self.plan.volume.quantise(volume)
            else:
                voxels[offset] = empty_arrays(self.plan, ShardSpec(index=shard.index, start=row, stop=row + 1))[0][0]
            drawn[offset].volume = None
            return drawn[offset].record(str(rows["sample_id"].iloc[offset]), row, voxels[offset])

        def finished() -> list[SampleRecord]:
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                return list(pool.map(finish, range(len(rows))))

        runtime = {
            **describe(self.device),
            "micro_batch": self.micro_batch,
            "exact_rewrites": int(self.settings.exact_rewrites),
        }
        return Made([voxels], finished, {**runtime, **seconds})

    def _draw(self, rows: pd.DataFrame, seconds: dict[str, float]) -> list[Drawn]:
        """The volumes of one micro-batch. Those that the gate refuses are drawn again, together, from their next seeds."""
        drawn = [Drawn() for _ in range(len(rows))]
        waiting = list(range(len(rows)))
        for attempt in range(self.gatekeeper.rules.max_attempts if self.gatekeeper else 1):
            part = rows.iloc[waiting]
            seeds = [attempt_seed(int(seed), attempt) for seed in part["seed"]]
            volumes = self.volumes(part.assign(seed=seeds), seconds)
            began = time.monotonic()
            for place, volume in zip(waiting, volumes, strict=True):
                verdict = None
                if self.gatekeeper is not None:
                    asked = {name: float(rows[name].iloc[place]) for name in self.gatekeeper.rules.tolerance}
                    verdict = self.gatekeeper.judge(self._as_read(volume), asked)
                drawn[place].add(volume, verdict)
            if self.gatekeeper is not None:
                seconds["gate_s"] = seconds.get("gate_s", 0.0) + time.monotonic() - began
            waiting = [place for place in waiting if drawn[place].refused]
            if not waiting:
                break
        return drawn

    def _as_read(self, volume: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """A volume as readers of the dataset will see it; one that is not finite as it is."""
        if not np.isfinite(volume).all():
            return volume
        return self.plan.volume.dequantise(self.plan.volume.quantise(volume))

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
        seeds, shape = rows["seed"].tolist(), self.bundle.latents.shape_cxyz
        with autocast(self.device, self.config.precision):
            z = sample_rows(self.denoiser, context, seeds, shape, self.schedule, self.config.sampler)
            middle = time.monotonic()
            x = self.autoencoder.decode(z)
        images: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = x[:, 0].cpu().numpy()
        seconds["sample_s"] += middle - began
        seconds["decode_s"] += time.monotonic() - middle
        return images
