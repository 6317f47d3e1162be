"""In this process, one shard after the other: for laptops, debuggers and tests."""

from __future__ import annotations

from collections.abc import Iterator

from brainsynth.plan import ShardSpec
from brainsynth.storage.work import ShardResult, ShardRunner, Work


def run(work: Work, shards: list[ShardSpec]) -> Iterator[ShardResult]:
    """Make the given shards in order."""
    runner = ShardRunner(work.root, work.build_maker, work.arguments)
    for shard in shards:
        yield runner(shard)
