"""One shard of work: make it, commit it, say so in one small row. What every executor runs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from brainsynth.manifest import SampleRecord
from brainsynth.plan import Plan, ShardSpec
from brainsynth.records import record
from brainsynth.storage.commit import commit_shard, committed_shards
from brainsynth.storage.filesystem import Store, open_store


class Made:
    """A shard before it is stored: arrays in stored dtype, one record a sample, circumstance."""

    def __init__(
        self,
        arrays: Sequence[npt.NDArray[Any]],
        samples: Sequence[SampleRecord],
        runtime: dict[str, str | int | float] | None = None,
    ) -> None:
        self.arrays, self.samples, self.runtime = arrays, samples, runtime or {}


class ShardMaker(Protocol):
    """Built once per worker; makes any shard of its plan. The same shard always holds the same values."""

    plan: Plan

    def make(self, shard: ShardSpec) -> Made:
        """Compute one shard."""


@record
class ShardResult:
    """What a worker tells the driver of a shard; the truth is in the commit record."""

    shard: int
    ok: int
    rejected: int
    failed: int
    size_bytes: int
    make_s: float
    commit_s: float


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

    def __init__(self, root: str, build_maker: Callable[..., ShardMaker], arguments: dict[str, Any]) -> None:
        self.store = open_store(root)
        self.maker = build_maker(**arguments)
        self._making = threading.Lock()

    def __call__(self, shard: ShardSpec) -> ShardResult:
        """Make and commit one shard."""
        with self._making:
            began = time.monotonic()
            made = self.maker.make(shard)
            make_s = time.monotonic() - began
        began = time.monotonic()
        runtime = {**made.runtime, "pid": os.getpid(), "make_s": round(make_s, 4)}
        committed = commit_shard(self.store, self.maker.plan, shard, made.arrays, made.samples, runtime)
        return ShardResult(
            shard=shard.index,
            ok=committed.count("ok"),
            rejected=committed.count("rejected"),
            failed=committed.count("failed"),
            size_bytes=sum(stored.size_bytes for stored in committed.objects),
            make_s=make_s,
            commit_s=time.monotonic() - began,
        )


def empty_arrays(plan: Plan, shard: ShardSpec) -> list[npt.NDArray[Any]]:
    """Arrays of a shard before any sample is in: fill values."""
    return [
        np.full(
            (shard.stop - shard.start, *a.sample_shape), np.nan if a.dtype.startswith("float") else 0, dtype=a.dtype
        )
        for a in plan.arrays
    ]
