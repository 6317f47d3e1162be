"""THE LINE: covariate rows → latents → volumes → one shard, stored. One actor runs this; no tensor leaves it."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from brainsynth.bundle.files import bundle_folder, read_bundle
from brainsynth.errors import UserError, WorkerBroken
from brainsynth.gate.drawn import Drawn
from brainsynth.manifest import SampleRecord
from brainsynth.models import device as devices
from brainsynth.models.loading import load_models
from brainsynth.models.sampling import sample_rows
from brainsynth.models.schedule import NoiseSchedule
from brainsynth.plan import GeneratorSettings, Plan, ShardSpec, attempt_seed, generation_identity
from brainsynth.storage.arrays import empty_arrays
from brainsynth.storage.commit import read_samples
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.work import ShardOutput

if TYPE_CHECKING:
    from brainsynth.gate.rules import Gatekeeper

log = logging.getLogger(__name__)
Images = npt.NDArray[np.float32]
Labeller = Callable[[Images], npt.NDArray[np.uint8]]
"""(B, X, Y, Z) intensities in [0, 1] as readers see them → (B, X, Y, Z) label maps of the plan's table."""


@dataclass
class DrawnShard:
    """The volumes of a shard, or of some rows of one, as they left the device."""

    shard: ShardSpec
    rows: list[Drawn]
    runtime: dict[str, str | int | float]


class VolumeGenerator:
    """Makes shards of synthetic volumes."""

    def __init__(self, plan: Plan, settings: GeneratorSettings) -> None:
        self.plan, self.settings, self.micro_batch = plan, settings, settings.micro_batch
        self.identity = generation_identity(plan)
        devices.set_threads(settings.threads, settings.workers)
        self.device = devices.choose_device(settings.use_gpu)
        folder = bundle_folder(settings.bundle)
        self.bundle = read_bundle(folder)
        if self.bundle.digest != self.identity.bundle:
            raise UserError(f"the bundle {folder} changed while the dataset was being made")
        precision, rewrites = self.identity.precision, settings.exact_rewrites
        self.autoencoder, self.denoiser = load_models(
            folder, self.bundle, self.device, precision, rewrites, self.identity.decoder
        )
        devices.explain(self.device, precision, rewrites)
        self.schedule = NoiseSchedule(self.bundle.schedule)
        self.labeller: Labeller | None = None
        self.gatekeeper: Gatekeeper | None = None
        if self.identity.gate is not None:
            from brainsynth.gate.file import load_bundle_gate  # and with it SciPy's image filters
            from brainsynth.gate.rules import Gatekeeper

            self.gatekeeper = Gatekeeper(load_bundle_gate(folder, self.bundle), self.identity.gate)

    @functools.cached_property
    def samples(self) -> pd.DataFrame:
        """The planned rows."""
        return read_samples(open_store(self.settings.root), self.plan)

    def make(self, shard: ShardSpec) -> DrawnShard:
        """Sample and decode the volumes of one shard, or of any rows, a micro-batch at a time.

        A micro-batch that does not fit into memory is halved, for the rest of this worker's life; rows and seeds stay.
        """
        rows = self.samples.iloc[shard.start : shard.stop]
        seconds = {"sample_s": 0.0, "decode_s": 0.0}
        drawn: list[Drawn] = []
        while len(drawn) < len(rows):
            try:
                drawn += self._draw(rows.iloc[len(drawn) : len(drawn) + self.micro_batch], seconds)
            except Exception as error:
                self._recover(error)
        how = {"micro_batch": self.micro_batch, "exact_rewrites": int(self.settings.exact_rewrites)}
        return DrawnShard(shard, drawn, {**devices.describe(self.device), **how, **seconds})

    def finish(self, made: DrawnShard) -> ShardOutput:
        """Quantise, digest and describe what was made, on the CPU, while the device makes the next shard."""
        arrays = empty_arrays(self.plan, made.shard)
        ids = self.samples["sample_id"].iloc[made.shard.start : made.shard.stop].astype(str).tolist()

        def store(offset: int) -> SampleRecord:
            drawn = made.rows[offset]
            if drawn.volume is not None and np.isfinite(drawn.volume).all():
                arrays[0][offset] = self.plan.volume.quantise(drawn.volume)
                if drawn.labels is not None:
                    arrays[1][offset] = drawn.labels
            drawn.volume = drawn.labels = None  # a float32 volume takes twice the memory of what is stored
            stored = [array[offset] for array in arrays]
            return drawn.record(ids[offset], made.shard.start + offset, stored, self.plan)

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            samples = list(pool.map(store, range(len(ids))))
        return ShardOutput(arrays, samples, made.runtime)

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
        self._label(drawn, seconds)
        return drawn

    def _label(self, drawn: list[Drawn], seconds: dict[str, float]) -> None:
        """The label map of each volume that is kept. One at a time: it then follows from the stored image alone."""
        if self.labeller is None:
            return
        began = time.monotonic()
        for one in drawn:
            if one.volume is not None and np.isfinite(one.volume).all():
                (one.labels,) = self.labeller(self._as_read(one.volume)[None])
        seconds["label_s"] = seconds.get("label_s", 0.0) + time.monotonic() - began

    def _as_read(self, volume: Images) -> Images:
        """A volume as readers of the dataset will see it; one that is not finite as it is."""
        if not np.isfinite(volume).all():
            return volume
        return self.plan.volume.dequantise(self.plan.volume.quantise(volume))

    def _recover(self, error: Exception) -> None:
        """Prepare another try with a smaller micro-batch; raises where that cannot help."""
        if devices.is_broken(error):
            raise WorkerBroken(f"the accelerator failed: {error}") from error
        if not devices.is_out_of_memory(error) or self.micro_batch == 1:
            raise error
        self.micro_batch //= 2
        devices.free_memory()
        log.warning("out of memory: the micro-batch is now %d", self.micro_batch)

    @torch.no_grad()
    def volumes(self, rows: pd.DataFrame, seconds: dict[str, float]) -> Images:
        """(B, X, Y, Z) float32 images in [0, 1]."""
        began = time.monotonic()
        context = torch.from_numpy(self.bundle.covariates.encode(rows)).to(self.device)
        seeds, shape = rows["seed"].tolist(), self.bundle.latents.shape_cxyz
        with devices.autocast(self.device, self.identity.precision):
            z = sample_rows(self.denoiser, context, seeds, shape, self.schedule, self.identity.sampler)
            middle = time.monotonic()
            x = self.autoencoder.decode(z, context, seeds)
        images: Images = x[:, 0].cpu().numpy()
        seconds["sample_s"] += middle - began
        seconds["decode_s"] += time.monotonic() - middle
        return images


def seconds_per_volume(plan: Plan, samples: pd.DataFrame, settings: GeneratorSettings) -> float:
    """Timed on one micro-batch, made here on this machine; writes nothing."""
    maker = VolumeGenerator(plan, settings)
    rows = samples.iloc[: settings.micro_batch]
    began = time.monotonic()
    maker.volumes(rows, {"sample_s": 0.0, "decode_s": 0.0})
    return (time.monotonic() - began) / len(rows)
