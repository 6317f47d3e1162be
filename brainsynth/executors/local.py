"""In this process, one shard after the other: for laptops, debuggers and tests."""

from __future__ import annotations

from collections.abc import Iterator

from brainsynth.config.schema import RuntimeConfig
from brainsynth.executors.watch import Watch
from brainsynth.plan import ShardSpec
from brainsynth.storage.work import ShardResult, ShardRunner, Work


def run(work: Work, shards: list[ShardSpec], runtime: RuntimeConfig, watch: Watch) -> Iterator[ShardResult]:
    """Make the given shards in order."""
    watch.listen()
    runner = ShardRunner(work.root, work.build_maker, work.arguments, runtime.max_attempts)
    for shard in shards:
        if watch.leaving.is_set():
            return
        yield runner(shard)
