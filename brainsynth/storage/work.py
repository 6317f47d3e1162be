"""One shard of work: make it, commit it, say so in one small row. What every executor runs.

Errors become data: a shard that cannot be made whole is made row by row, and a row that fails again and again, or kills
its worker again and again, is set aside with its reason.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy.typing as npt
import pandas as pd

from brainsynth.errors import UserError, WorkerBroken
from brainsynth.manifest import SampleRecord, ShardManifest
from brainsynth.plan import Plan, ShardSpec
from brainsynth.records import record
from brainsynth.storage.arrays import empty_arrays
from brainsynth.storage.attempts import Attempts
from brainsynth.storage.commit import commit_shard, committed_shards, read_commit, read_samples
from brainsynth.storage.filesystem import Store, open_store
from brainsynth.storage.repair import Salvage, close_ticket, read_salvage

log = logging.getLogger(__name__)
MAX_ROW_DEATHS = 5
"""A row on which this many workers died while it was made alone is at fault; kills from outside spread over rows."""


@dataclass
class ShardOutput:
    """A shard, or some rows, ready to be stored."""

    arrays: Sequence[npt.NDArray[Any]]
    """One array (n, *sample_shape) in stored dtype for each of the plan's."""
    samples: Sequence[SampleRecord]
    """One record a sample, in row order."""
    runtime: dict[str, str | int | float] = field(default_factory=dict)
    """Circumstance."""
    threads: int = 1
    """With which samples may be encoded."""


class ShardMaker(Protocol):
    """Built once per worker; makes any rows of its plan. The same rows always hold the same values."""

    plan: Plan

    def make(self, shard: ShardSpec) -> Any:
        """Compute rows [start, stop) of a shard, as a ShardOutput, or as what `finish` makes one of. Never in parallel."""


class FinishingMaker(ShardMaker, Protocol):
    """A maker that leaves what needs no device for later."""

    def finish(self, made: Any) -> ShardOutput:
        """Complete what `make` made. May run while the same maker makes the next shard."""


def finished(maker: ShardMaker, made: Any) -> ShardOutput:
    """The output of a maker, which finishes it where it left something to do."""
    return made if isinstance(made, ShardOutput) else cast(FinishingMaker, maker).finish(made)


@record
class ShardResult:
    """What a worker reports of a shard; the truth is in the commit record."""

    shard: int
    ok: int
    rejected: int
    failed: int
    size_bytes: int
    make_s: float
    commit_s: float
    reason: str
    """Why the first of the failed rows failed."""


class Work:
    """A dataset to be made: its plan, its samples, where it goes, and how a worker builds its maker."""

    def __init__(
        self,
        root: str,
        plan: Plan,
        samples: pd.DataFrame,
        build_maker: Callable[..., ShardMaker],
        arguments: dict[str, Any],
        preview: str = "",
    ) -> None:
        self.root, self.plan, self.samples = root, plan, samples
        self.build_maker, self.arguments = build_maker, arguments
        self.preview = preview
        """One line for --dry-run about what the work will take."""

    @property
    def store(self) -> Store:
        """The dataset's folder."""
        return open_store(self.root)

    def missing(self) -> list[ShardSpec]:
        """Shards without a commit record, in order."""
        done = committed_shards(self.store)
        return [self.plan.shard(index) for index in range(self.plan.num_shards) if index not in done]


class ShardRunner:
    """Makes shards one at a time and commits them; another thread may make the next while one is being written."""

    def __init__(
        self,
        root: str,
        build_maker: Callable[..., ShardMaker],
        arguments: dict[str, Any],
        max_attempts: int = 3,
        note: Callable[[ShardManifest, bool], None] = lambda committed, made_now: None,
    ) -> None:
        """`note` gets each commit record, and whether this call made the shard; it must not raise."""
        self.store = open_store(root)
        self.maker = build_maker(**arguments)
        self.max_attempts, self.note = max_attempts, note
        self._making = threading.Lock()

    def __call__(self, shard: ShardSpec) -> ShardResult:
        """Make and commit one shard; one that is committed already (its worker died before it could say so) is not made."""
        try:
            committed = read_commit(self.store, self.maker.plan, shard.index)
        except FileNotFoundError:
            pass
        else:
            self.note(committed, False)
            return _result(committed, 0.0, 0.0)
        attempts = Attempts(self.store, shard.index)
        try:
            with self._making:
                began_at, began = time.time(), time.monotonic()
                made = self._make(shard, attempts)
                make_s = time.monotonic() - began
            began = time.monotonic()
            output = self._finish(made, shard, attempts)
            finish_s = time.monotonic() - began
            runtime = {**output.runtime, "pid": os.getpid(), "began_at": round(began_at, 3)}
            runtime |= {"make_s": round(make_s, 4), "finish_s": round(finish_s, 4)}
            committed = commit_shard(
                self.store, self.maker.plan, shard, output.arrays, output.samples, runtime, output.threads
            )
        except Exception:  # WorkerBroken, too: the rows are not at fault when a device is broken
            attempts.survived()
            raise
        close_ticket(self.store, self.maker.plan, shard.index)
        attempts.clear()
        self.note(committed, True)
        return _result(committed, make_s, time.monotonic() - began)

    def _make(self, shard: ShardSpec, attempts: Attempts) -> Any:
        """The whole shard at once if that works, else what can be generated of it."""
        deaths = attempts.begin()
        salvage = read_salvage(self.store, self.maker.plan, shard)
        if salvage is not None:
            log.info("shard %d: %d rows are made again", shard.index, len(salvage.lost))
        elif deaths < self.max_attempts:
            try:
                return self.maker.make(shard)
            except (UserError, WorkerBroken):
                raise
            except Exception as error:
                log.warning("shard %d: %s: %s; making it row by row", shard.index, type(error).__name__, error)
        else:
            log.warning("shard %d: %d workers died on it; making it row by row", shard.index, deaths)
        return self._row_by_row(shard, salvage or Salvage.nothing(self.maker.plan, shard), attempts)

    def _finish(self, made: Any, shard: ShardSpec, attempts: Attempts) -> ShardOutput:
        """What is left to do without the device; where that fails the shard is made row by row."""
        try:
            return finished(self.maker, made)
        except Exception as error:
            log.warning("shard %d: %s: %s; making it row by row", shard.index, type(error).__name__, error)
            with self._making:
                return self._row_by_row(shard, Salvage.nothing(self.maker.plan, shard), attempts)

    def _row_by_row(self, shard: ShardSpec, salvage: Salvage, attempts: Attempts) -> ShardOutput:
        runtime: dict[str, str | int | float] = {}
        for row in salvage.lost:
            arrays, sample, facts = self._row(shard, row, attempts.begin(row))
            attempts.survived(row)
            for whole, part in zip(salvage.arrays, arrays, strict=True):
                whole[row - shard.start] = part
            salvage.samples[row - shard.start] = sample
            runtime |= facts
        samples = [sample for sample in salvage.samples if sample is not None]
        return ShardOutput(salvage.arrays, samples, {**runtime, "rows_remade": len(salvage.lost)})

    def _row(
        self, shard: ShardSpec, row: int, deaths: int
    ) -> tuple[Sequence[npt.NDArray[Any]], SampleRecord, dict[str, str | int | float]]:
        """One row, tried as often as allowed, unless it killed that many workers before; then it is a failed record."""
        reason = f"the worker died {deaths} times while it made this row"
        if deaths < MAX_ROW_DEATHS:
            for _ in range(self.max_attempts):
                try:
                    output = finished(
                        self.maker, self.maker.make(ShardSpec(index=shard.index, start=row, stop=row + 1))
                    )
                    return [array[0] for array in output.arrays], output.samples[0], output.runtime
                except (UserError, WorkerBroken):
                    raise
                except Exception as error:
                    reason = f"{type(error).__name__}: {str(error)[:200] or 'no message'}"
        log.warning("row %d is set aside: %s", row, reason)
        empty = empty_arrays(self.maker.plan, ShardSpec(index=shard.index, start=row, stop=row + 1))
        sample_id = str(read_samples(self.store, self.maker.plan)["sample_id"].iloc[row])
        failed = SampleRecord(sample_id=sample_id, row=row, status="failed", reason=reason)
        return [array[0] for array in empty], failed, {}


def _result(committed: ShardManifest, make_s: float, commit_s: float) -> ShardResult:
    reasons: Iterator[str] = (s.reason for s in committed.samples if s.status == "failed")
    return ShardResult(
        shard=committed.shard,
        ok=committed.count("ok"),
        rejected=committed.count("rejected"),
        failed=committed.count("failed"),
        size_bytes=sum(stored.size_bytes for stored in committed.objects),
        make_s=make_s,
        commit_s=commit_s,
        reason=next(reasons, ""),
    )
