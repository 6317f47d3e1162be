"""Our own Ray metrics: what each worker has committed and where its time went, and what is left. For watching a run.

Ray exports them from every node as `ray_<name>`, with its own; cluster/grafana/brainsynth.json shows them. The manifest is
authoritative: a killed worker loses up to one report interval of counts, and a metric never fails a run.

Two facts of Ray 2.60 shape them. It exports the sum of a histogram as if every value were the middle of its bucket, so
seconds are counters. A gauge that is not set again vanishes after two report intervals, and a shard takes longer than that:
so the share of time that the devices are busy is the rate of a counter, and what is left is set again and again.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

from brainsynth.manifest import STATUSES, ShardManifest
from brainsynth.storage.work import Work

log = logging.getLogger(__name__)
VOLUMES = "brainsynth_volumes_total"
BYTES = "brainsynth_bytes_total"
STAGE_SECONDS = "brainsynth_stage_seconds_total"
VOLUMES_LEFT = "brainsynth_volumes_left"
NAMES = (VOLUMES, BYTES, STAGE_SECONDS, VOLUMES_LEFT)
DEVICE_STAGES = ("sample", "decode")
"""Stages in which the device works, or the CPU in its place."""
STAGES = (*DEVICE_STAGES, "gate", "other", "finish", "encode", "write")
"""In a worker's order. `other` is the rest of generation; `finish` quantises, digests and measures."""
REFRESH_S = 5.0


def stage_seconds(runtime: dict[str, str | int | float]) -> dict[str, float]:
    """Seconds per stage of a commit record; only stages that took any."""
    seconds = {stage: float(runtime.get(f"{stage}_s", 0.0)) for stage in STAGES}
    seconds["other"] = float(runtime.get("make_s", 0.0)) - sum(seconds[stage] for stage in (*DEVICE_STAGES, "gate"))
    return {stage: spent for stage, spent in seconds.items() if spent > 0}


def labels_of(work: Work) -> dict[str, str]:
    """What tells one dataset's numbers from another's."""
    return {"dataset": work.root, "kind": work.plan.kind}


class ShardMetrics:
    """Counts what one worker commits. Several threads may count at a time."""

    def __init__(self, labels: dict[str, str]) -> None:
        from ray.util.metrics import Counter

        def counter(name: str, description: str, *more: str) -> Counter:
            made = Counter(name, description, (*labels, *more))
            made.set_default_tags(labels)
            return made

        self._volumes = counter(
            VOLUMES, "Rows that have a commit record, by outcome: ok, rejected or failed.", "outcome"
        )
        self._bytes = counter(BYTES, "Bytes of committed shard objects.")
        self._seconds = counter(STAGE_SECONDS, "Seconds of the workers, by stage.", "stage")

    def __call__(self, committed: ShardManifest, made_now: bool) -> None:
        """A shard has its commit record. One that a worker made, who died before it could say so, has no seconds."""
        try:
            for outcome in STATUSES:
                if number := committed.count(outcome):
                    self._volumes.inc(number, {"outcome": outcome})
            self._bytes.inc(sum(stored.size_bytes for stored in committed.objects))
            if made_now:
                for stage, spent in stage_seconds(committed.runtime).items():
                    self._seconds.inc(spent, {"stage": stage})
        except Exception as error:
            log.warning("shard %d is not counted in the metrics: %s", committed.shard, error)


class VolumesLeft:
    """How many rows of a run have no commit record yet, as its driver counts."""

    def __init__(self, labels: dict[str, str], rows: int) -> None:
        from ray.util.metrics import Gauge

        self.rows = rows
        self._gauge: Any = Gauge(VOLUMES_LEFT, "Rows of the run that have no commit record yet.", tuple(labels))
        self._gauge.set_default_tags(labels)
        self._over = threading.Event()

    def _tell(self) -> None:
        over = False
        while not over:
            over = self._over.wait(REFRESH_S)
            with contextlib.suppress(Exception):
                self._gauge.set(self.rows)

    @contextlib.contextmanager
    def told(self) -> Iterator[VolumesLeft]:
        """Say it every few seconds, until the run is over."""
        thread = threading.Thread(target=self._tell, name="volumes-left", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            thread.join(REFRESH_S)
