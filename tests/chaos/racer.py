"""One of several workers that were all given every shard; run until nothing is missing. Without Ray it starts fast."""

from __future__ import annotations

import random
import sys

from brainsynth.storage.work import ShardRunner
from tests.chaos.noise import noise_work


def main(root: str, diary: str, rows: int, per_shard: int, seconds: float, seed: int, labels: bool) -> None:
    """Make what is missing, in an order of its own."""
    task = noise_work(root, rows, per_shard, seconds, diary, labels=labels)
    runner = ShardRunner(task.root, task.build_maker, task.arguments)
    dice = random.Random(seed)
    while missing := task.missing():
        runner(dice.choice(missing[:3]))


if __name__ == "__main__":
    _, root, diary, rows, per_shard, seconds, seed, labels = sys.argv
    main(root, diary, int(rows), int(per_shard), float(seconds), int(seed), labels == "True")
