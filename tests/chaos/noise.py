"""A run whose volumes are noise from each row's seed, so that whatever breaks, every voxel is known; of label maps, too,
which follow from their volumes.

`python -m tests.chaos.noise ROOT …` is the driver that tests kill; everything below the volumes is the real line.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from brainsynth.config.job import guarded
from brainsynth.config.schema import RuntimeConfig, SamplerConfig
from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.executors.dataset import make_dataset
from brainsynth.labels import Label, LabelTable
from brainsynth.manifest import describe_sample
from brainsynth.plan import GenerationIdentity, Plan, ShardSpec, generation_plan, generation_samples
from brainsynth.progress import configure_logging
from brainsynth.storage.work import ShardOutput, Work
from brainsynth.volume import VolumeSpec

SCHEMA = CovariateSchema(covariates=(Covariate(name="age", kind="continuous", unit="years", low=18.0, high=90.0),))


LABELS = LabelTable(
    labels=tuple(Label(index=i, name=f"quarter {i}") for i in (1, 2, 3)), source="quarters of the range"
)


def noise_plan(rows: int, samples_per_shard: int, edge: int = 20, labels: bool = False) -> tuple[Plan, pd.DataFrame]:
    """The plan of so many volumes of edge³ voxels, with label maps or without, and its samples."""
    volume = VolumeSpec(shape_xyz=(edge,) * 3, spacing_mm=(1.0,) * 3, origin_mm=(0.0,) * 3, dtype="uint8", step=0.0)
    table = pd.DataFrame({"age": np.linspace(20, 89, rows)})
    samples = generation_samples(table, SCHEMA, 0, SCHEMA.out_of_range(table))
    sampler = SamplerConfig(method="ddim", steps=1)
    identity = GenerationIdentity(bundle="0" * 64, sampler=sampler, precision="float32", base_seed=0)
    return generation_plan(identity, volume, SCHEMA, samples, samples_per_shard, LABELS if labels else None), samples


def noise(plan: Plan, seed: int) -> npt.NDArray[np.uint8]:
    """The volume of a row."""
    return np.random.default_rng(seed).integers(1, 256, plan.volume.shape_xyz, dtype=np.uint8)


def stored(plan: Plan, seed: int) -> list[npt.NDArray[np.uint8]]:
    """All arrays of a row: the volume and, of a plan with labels, in which quarter of the range each voxel lies."""
    volume = noise(plan, seed)
    return [volume] if plan.labels is None else [volume, volume // 64]


class NoiseShards:
    """Makes them; says in `diary` when it begins a shard, so that a test can count what was made twice."""

    def __init__(self, plan: Plan, samples: pd.DataFrame, seconds: float, diary: str, deadlock: int = -1) -> None:
        self.plan, self.samples, self.seconds, self.deadlock = plan, samples, seconds, deadlock
        self.diary = Path(diary)
        os.makedirs(self.diary, exist_ok=True)
        self._note(f"alive {os.getpid()}")

    def make(self, shard: ShardSpec) -> ShardOutput:
        self._note(f"begin {shard.index}")
        if shard.index == self.deadlock:
            lock = threading.Lock()
            with lock, lock:
                pass
        made, records = [], []
        for row in range(shard.start, shard.stop):
            time.sleep(self.seconds)
            made.append(stored(self.plan, int(self.samples["seed"].iloc[row])))
            records.append(describe_sample(self.samples["sample_id"].iloc[row], row, list(made[-1]), plan=self.plan))
        return ShardOutput([np.stack(array) for array in zip(*made, strict=True)], records)

    def _note(self, text: str) -> None:
        with open(self.diary / str(os.getpid()), "a") as file:
            file.write(f"{time.time():.4f} {text}\n")


def diary(folder: Path) -> list[tuple[float, int, str, int]]:
    """(time, pid, what, number) of everything that workers noted, in order of time."""
    entries = []
    for path in folder.iterdir():
        for line in path.read_text().splitlines():
            if len(line.split()) == 3:  # the last line of a worker that was killed may be half
                when, what, number = line.split()
                entries.append((float(when), int(path.name), what, int(number)))
    return sorted(entries)


def noise_work(
    root: str, rows: int, per_shard: int, seconds: float, folder: str, deadlock: int = -1, labels: bool = False
) -> Work:
    """The work of a run."""
    plan, samples = noise_plan(rows, per_shard, labels=labels)
    arguments = {"plan": plan, "samples": samples, "seconds": seconds, "diary": folder, "deadlock": deadlock}
    return Work(root, plan, samples, NoiseShards, arguments)


def main() -> int:
    """The driver."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("diary")
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--per-shard", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.05)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cpus-per-worker", type=float, default=0.5)
    parser.add_argument("--stall", type=float, default=600.0)
    parser.add_argument("--deadlock", type=int, default=-1)
    parser.add_argument("--lose-node-after", type=int, default=0, help="run on a cluster of two nodes and lose one")
    parser.add_argument("--wait-for-nodes", action="store_true")
    parser.add_argument("--labels", action="store_true")
    options = parser.parse_args()
    configure_logging()
    task = noise_work(
        options.root,
        options.rows,
        options.per_shard,
        options.seconds,
        options.diary,
        options.deadlock,
        options.labels,
    )
    runtime = RuntimeConfig(
        workers=options.workers,
        cpus_per_worker=options.cpus_per_worker,
        stall_timeout_s=options.stall,
        progress_every_s=1.0,
        wait_for_nodes=options.wait_for_nodes,
    )
    if options.lose_node_after:
        from tests.chaos.two_nodes import losing_a_node

        with losing_a_node(Path(options.root), options.lose_node_after):
            return guarded(lambda: make_dataset(task, runtime))
    return guarded(lambda: make_dataset(task, runtime))


if __name__ == "__main__":
    sys.exit(main())
