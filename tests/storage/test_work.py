"""A worker finishes a shard while its device makes the next one, and says when and for how long it did what."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from brainsynth.manifest import describe_sample
from brainsynth.plan import Plan, ShardSpec
from brainsynth.storage.commit import read_commit, write_plan
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.work import ShardOutput, ShardRunner
from tests.storage.conftest import tiny_plan, values


class Maker:
    """Shard 0 is finished only when shard 1 is being made; of shards of `broken` nothing but single rows can be finished."""

    def __init__(self, plan: Plan, broken: tuple[int, ...] = ()) -> None:
        self.plan, self.broken = plan, broken
        self.second = threading.Event()

    def make(self, shard: ShardSpec) -> ShardSpec:
        if shard.index == 1:
            self.second.set()
        return shard

    def finish(self, made: ShardSpec) -> ShardOutput:
        rows = range(made.start, made.stop)
        arrays = np.stack([values(self.plan, row) for row in rows])
        if made.index in self.broken and len(rows) > 1:
            raise MemoryError("no room to finish a whole shard")
        if not self.broken and made.index == 0:
            assert self.second.wait(20), "the next shard was not begun"
        return ShardOutput(
            [arrays], [describe_sample(f"syn{row:06d}", row, [arrays[row - made.start]]) for row in rows]
        )


def test_a_shard_is_finished_while_the_next_one_is_made(tmp_path: Path) -> None:
    plan, samples = tiny_plan(rows=6)
    store = open_store(str(tmp_path))
    write_plan(store, plan, samples)
    runner = ShardRunner(str(tmp_path), Maker, {"plan": plan})
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(runner, [plan.shard(0), plan.shard(1)]))
    assert [(r.ok, r.failed) for r in results] == [(3, 0), (3, 0)]
    first, second = (read_commit(store, plan, index).runtime for index in (0, 1))
    assert all(float(runtime["began_at"]) > 0 for runtime in (first, second))  # which thread came first is not promised
    assert float(first["finish_s"]) > 0
    assert float(first["make_s"]) >= 0


def test_a_shard_that_cannot_be_finished_is_made_row_by_row(tmp_path: Path) -> None:
    plan, samples = tiny_plan(rows=6)
    store = open_store(str(tmp_path))
    write_plan(store, plan, samples)
    runner = ShardRunner(str(tmp_path), Maker, {"plan": plan, "broken": (0,)})
    assert [runner(plan.shard(index)).ok for index in (0, 1)] == [3, 3]
    assert [read_commit(store, plan, index).runtime.get("rows_remade", 0) for index in (0, 1)] == [3, 0]
