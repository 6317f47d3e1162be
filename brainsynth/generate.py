"""THE LINE: covariate rows → latents → volumes → one shard, stored. One actor runs this; no tensor leaves it."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from brainsynth.bundle.files import bundle_folder, read_bundle
from brainsynth.bundle.generator import (
    Generator,
    GeneratorSpec,
    described,
    generator_folder,
    open_generator,
)
from brainsynth.errors import UserError
from brainsynth.gate.drawn import Drawn
from brainsynth.manifest import SampleRecord
from brainsynth.models import device as devices
from brainsynth.models.bundle_generator import BundleGenerator
from brainsynth.models.loading import load_labeller
from brainsynth.places import is_generator
from brainsynth.plan import GenerationIdentity, GeneratorSettings, Plan, ShardSpec, attempt_seed, generation_identity
from brainsynth.storage.commit import read_samples
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.work import ShardOutput

if TYPE_CHECKING:
    from brainsynth.gate.rules import Gatekeeper, Verdict

Images = npt.NDArray[np.float32]
Voxels = npt.NDArray[Any]
"""In the stored dtype."""
Labeller = Callable[[Images], npt.NDArray[np.uint8]]
"""(B, X, Y, Z) intensities in [0, 1] as readers see them → (B, X, Y, Z) label maps of the plan's table."""


@dataclass
class _Attempt:
    """Some rows, drawn: their volumes, as they will be stored, and what the gate says of them are being made."""

    places: list[int]
    number: int
    maps: npt.NDArray[np.uint8] | None
    judged: list[Future[tuple[Voxels | None, Verdict | None, float]]]


@dataclass
class DrawnShard:
    """The volumes of a shard, or of some rows of one, as they left the device."""

    shard: ShardSpec
    rows: list[Drawn]
    runtime: dict[str, str | int | float]


class VolumeGenerator:
    """Makes shards of synthetic volumes."""

    def __init__(self, plan: Plan, settings: GeneratorSettings, scan: Images | None = None) -> None:
        """`scan`: of a dataset that is derived from one, as it was prepared."""
        self.plan, self.settings, self.micro_batch = plan, settings, devices.MicroBatch(settings.micro_batch)
        self.identity = generation_identity(plan)
        devices.set_threads(settings.threads, settings.workers)
        self.device = devices.choose_device(settings.use_gpu)
        self.ahead = int(self.device.type != "cpu")
        """Micro-batches that are drawn while the gate still judges; a CPU has no time to spare."""
        self.generator = built_generator(settings, self.identity, scan)
        self.bundle, folder = described(self.generator, settings.bundle), generator_folder(self.generator)
        if self.bundle.digest != self.identity.bundle:
            raise UserError(f"{settings.bundle} changed while the dataset was being made")
        if isinstance(self.generator, BundleGenerator):
            self.generator.stored = plan.volume
        self.generator.load(str(self.device))
        self.maps: npt.NDArray[np.uint8] | None = None
        self._makes_labels = isinstance(self.bundle, GeneratorSpec) and self.bundle.labels is not None
        self.labeller: Labeller | None = None
        if self.identity.labeller is not None and self.identity.renderer is None:
            self.labeller = load_labeller(folder, self.device, self.identity.labeller)
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
        drawn = [Drawn() for _ in range(len(rows))]
        judged: deque[_Attempt] = deque()
        done = 0
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            while done < len(rows) or judged:
                if done < len(rows) and len(judged) <= self.ahead:
                    places = list(range(done, min(done + self.micro_batch.size, len(rows))))
                    made = self._attempt(places, 0, rows, pool, seconds)
                    done += len(places) if made else 0
                else:
                    made = self._follow(judged.popleft(), drawn, rows, pool, seconds)
                judged.extend(made)
        how = {"micro_batch": self.micro_batch.size, "exact_rewrites": int(self.settings.exact_rewrites)}
        return DrawnShard(shard, drawn, {**devices.describe(self.device), **how, **seconds})

    def finish(self, made: DrawnShard) -> ShardOutput:
        """Digest and describe what was made, on the CPU, while the device makes the next shard."""
        arrays: list[Voxels] = [np.empty((len(made.rows), *a.sample_shape), a.dtype) for a in self.plan.arrays]
        ids = self.samples["sample_id"].iloc[made.shard.start : made.shard.stop].astype(str).tolist()

        def store(offset: int) -> SampleRecord:
            drawn = made.rows[offset]
            for spec, array, voxels in zip(self.plan.arrays, arrays, (drawn.volume, drawn.labels), strict=False):
                array[offset] = spec.fill_value if drawn.volume is None or voxels is None else voxels
            drawn.volume = drawn.labels = None
            stored = [array[offset] for array in arrays]
            return drawn.record(ids[offset], made.shard.start + offset, stored, self.plan)

        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads) as pool:
            samples = list(pool.map(store, range(len(ids))))
        return ShardOutput(arrays, samples, made.runtime, threads)

    def _attempt(
        self, places: list[int], number: int, rows: pd.DataFrame, pool: ThreadPoolExecutor, seconds: dict[str, float]
    ) -> list[_Attempt]:
        """Draw some rows, from the seeds of this attempt, and have the gate judge them; empty where they did not fit."""
        part = rows.iloc[places]
        seeds = [attempt_seed(int(seed), number) for seed in part["seed"]]
        try:
            volumes = self.volumes(part.assign(seed=seeds), seconds)
        except Exception as error:
            self.micro_batch.shrink(error)
            return []
        judged = [pool.submit(self._judge, volume, part.iloc[i]) for i, volume in enumerate(volumes)]
        return [_Attempt(places, number, self.maps, judged)]

    def _follow(
        self,
        last: _Attempt,
        drawn: list[Drawn],
        rows: pd.DataFrame,
        pool: ThreadPoolExecutor,
        seconds: dict[str, float],
    ) -> list[_Attempt]:
        """Keep what passed. Those that the gate refuses are drawn again, together, from their next seeds."""
        for index, (place, judged) in enumerate(zip(last.places, last.judged, strict=True)):
            volume, verdict, took_s = judged.result()
            labels = None if last.maps is None else last.maps[index]
            if verdict is not None and volume is not None:
                labels, verdict = self._count(volume, labels, verdict, rows.iloc[place], seconds)
            drawn[place].add(volume, verdict)
            drawn[place].labels = labels
            if verdict is not None:
                seconds["gate_s"] = seconds.get("gate_s", 0.0) + took_s
        self._label([drawn[place] for place in last.places], seconds)
        refused, number = [place for place in last.places if drawn[place].refused], last.number + 1
        again: list[_Attempt] = []
        while refused and self.gatekeeper is not None and number < self.gatekeeper.rules.max_attempts:
            fit = refused[: self.micro_batch.size]
            made = self._attempt(fit, number, rows, pool, seconds)
            again += made
            refused = refused[len(fit) :] if made else refused
        return again

    def _judge(self, volume: Voxels, row: pd.Series) -> tuple[Voxels | None, Verdict | None, float]:
        """A volume as it will be stored, None if it is not finite; what the gate says of it, and how long it took."""
        stored: Voxels | None = volume
        if volume.dtype == np.float32:  # the device has not quantised it, or not had to; twice is as good as once
            stored = self.plan.volume.quantise(volume) if np.isfinite(volume).all() else None
        if self.gatekeeper is None:
            return stored, None, 0.0
        began = time.monotonic()
        asked = {name: float(row[name]) for name in self.gatekeeper.rules.tolerance}
        read = volume if stored is None else self.plan.volume.dequantise(stored)
        return stored, self.gatekeeper.judge(read, asked), time.monotonic() - began

    def _count(
        self,
        volume: Voxels,
        labels: npt.NDArray[np.uint8] | None,
        verdict: Verdict,
        row: pd.Series,
        seconds: dict[str, float],
    ) -> tuple[npt.NDArray[np.uint8] | None, Verdict]:
        """Label map and verdict, where the gate counts volumes and has let this one pass so far."""
        if (
            self.gatekeeper is None
            or self.plan.labels is None
            or not (self.gatekeeper.rules.counted and verdict.passed)
        ):
            return labels, verdict
        labels = self._labelled(volume, seconds) if labels is None else labels
        volumes_ml = self.plan.labels.volumes_ml(labels, self.plan.volume.voxel_ml)
        named = {label.name: volumes_ml[label.column] for label in self.plan.labels.labels}
        asked = {name: float(row[name]) for name in self.gatekeeper.rules.counted}
        return labels, self.gatekeeper.count(verdict, named, asked)

    def _label(self, drawn: list[Drawn], seconds: dict[str, float]) -> None:
        """The label map of each volume that is kept and has none yet."""
        for one in drawn:
            if self.labeller is not None and one.volume is not None and one.labels is None:
                one.labels = self._labelled(one.volume, seconds)

    def _labelled(self, volume: Voxels, seconds: dict[str, float]) -> npt.NDArray[np.uint8]:
        """One volume's label map. One at a time: it then follows from the stored image alone."""
        assert self.labeller is not None
        began = time.monotonic()
        labels: npt.NDArray[np.uint8] = self.labeller(self.plan.volume.dequantise(volume)[None])[0]
        seconds["label_s"] = seconds.get("label_s", 0.0) + time.monotonic() - began
        return labels

    def volumes(self, rows: pd.DataFrame, seconds: dict[str, float]) -> Voxels:
        """(B, X, Y, Z) stored voxels, where the device has quantised them, else float32 images in [0, 1].

        The generator's label maps of them, if it makes any, are in `maps`.
        """
        began, decoded = time.monotonic(), getattr(self.generator, "decode_s", 0.0)
        made = self.generator.sample(rows, [int(seed) for seed in rows["seed"]])
        images, self.maps = made if isinstance(made, tuple) else (made, None)
        decode_s = getattr(self.generator, "decode_s", 0.0) - decoded
        wanted = (len(rows), *self.plan.volume.shape_xyz)
        labelled = self.maps is not None and self.maps.shape == wanted and self.maps.dtype == np.uint8
        stored = isinstance(self.generator, BundleGenerator) and images.dtype == self.plan.volume.dtype
        floats = stored or images.dtype.kind == "f"
        if images.shape != wanted or not floats or (self._makes_labels and not labelled):
            and_labels = " and uint8 label maps of that shape" if self._makes_labels else ""
            raise UserError(
                f"{self.settings.bundle}: sample() must give float volumes {wanted}{and_labels}, and gave {images.dtype} "
                f"{images.shape}"
            )
        seconds["sample_s"] += time.monotonic() - began - decode_s
        seconds["decode_s"] += decode_s
        return images if stored else images.astype(np.float32, copy=False)


def built_generator(settings: GeneratorSettings, identity: GenerationIdentity, scan: Images | None = None) -> Generator:
    """The generator of a plan: a bundle, or a class of another package. Raises UserError where its scan is not given."""
    if is_generator(settings.bundle):
        return open_generator(settings.bundle, identity.options)
    folder = bundle_folder(settings.bundle)
    if identity.scan is not None:
        if scan is None:
            raise UserError(
                "the dataset is derived from a real person's scan: only `brainsynth vary --scan` makes its volumes"
            )
        from brainsynth.models.counterfactual import ScanGenerator  # of no other dataset

        return ScanGenerator(folder, read_bundle(folder), identity, settings.exact_rewrites, scan)
    return BundleGenerator(folder, read_bundle(folder), identity, settings.exact_rewrites)


def seconds_per_volume(
    plan: Plan, samples: pd.DataFrame, settings: GeneratorSettings, scan: Images | None = None
) -> float:
    """Timed on one micro-batch, made here on this machine; writes nothing."""
    maker = VolumeGenerator(plan, settings, scan)
    rows = samples.iloc[: settings.micro_batch]
    began = time.monotonic()
    maker.volumes(rows, {"sample_s": 0.0, "decode_s": 0.0})
    return (time.monotonic() - began) / len(rows)
