"""A recipe against the dataset that it was written from: random rows made from it, and how long a large one takes to open.

    python -m benchmarks.recipe      # a minute or two on two cores

The first dataset is made by networks with random weights, the second has 100,000 rows of arbitrary voxels, committed as
workers commit them: to open a recipe reads its plan, manifest and bundle, never a voxel. Writes results/recipe.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from brainsynth import open_dataset
from brainsynth.config.schema import CovariateSource, GenerateConfig, RuntimeConfig, SamplerConfig
from brainsynth.manifest import MODEL_KEY, describe_sample
from brainsynth.planning import plan_generation
from brainsynth.stages.generate import run as generate
from brainsynth.stages.recipe import write
from brainsynth.storage.commit import commit_shard, write_plan
from brainsynth.storage.finalise import finalise, pretty_json
from recipes.random_bundle import TINY, make_random_bundle

RESULT = Path(__file__).with_name("results") / "recipe.json"
EDGE, ROWS, SAMPLE, LARGE = 16, 400, 200, 100_000


def config(root: Path, name: str, rows: int, per_shard: int) -> GenerateConfig:
    return GenerateConfig(
        bundle=str(root / "bundle"),
        output=str(root / name),
        covariates=CovariateSource(draw=rows),
        sampler=SamplerConfig(method="euler", steps=2),
        samples_per_shard=per_shard,
        runtime=RuntimeConfig(workers=0, micro_batch=16, threads_per_worker=1),
    )


def rows_equal(root: Path) -> dict[str, Any]:
    """Random rows of the recipe against the stored ones."""
    generate(config(root, "small", ROWS, 64))
    path = root / "small.recipe"
    write(str(root / "small"), str(root / "bundle"), path)
    stored, made = open_dataset(str(root / "small")), open_dataset(str(path))
    places = np.random.default_rng(0).choice(len(stored), SAMPLE, replace=False)
    difference = [float(np.abs(made.volume(int(p)) - stored.volume(int(p))).max()) for p in places]
    assert min(stored.volume(int(p)).std() for p in places[:10]) > 0.01  # not black
    return {"rows": SAMPLE, "of": ROWS, "same_voxels": difference.count(0.0), "largest_difference": max(difference)}


def opening(root: Path) -> dict[str, Any]:
    """Seconds to open a recipe of many rows: the first time, which unpacks it, and again."""
    work = plan_generation(config(root, "large", LARGE, 1000))
    write_plan(work.store, work.plan, work.samples)
    rng = np.random.default_rng(0)
    (array,) = work.plan.arrays
    for index in range(work.plan.num_shards):
        shard = work.plan.shard(index)
        voxels = rng.random((shard.stop - shard.start, *array.sample_shape)).astype(array.dtype)
        ids = work.samples["sample_id"][shard.start : shard.stop]
        records = [describe_sample(name, shard.start + n, [voxels[n]], plan=work.plan) for n, name in enumerate(ids)]
        commit_shard(work.store, work.plan, shard, [voxels], records, {"micro_batch": 16})
    finalise(work.store, work.plan)
    (root / "large" / MODEL_KEY).write_bytes((root / "small" / MODEL_KEY).read_bytes())
    path = root / "large.recipe"
    write(str(root / "large"), str(root / "bundle"), path)
    seconds = []
    for _ in range(2):
        began = time.monotonic(), time.process_time()
        assert len(open_dataset(str(path))) == LARGE
        seconds.append([round(time.monotonic() - began[0], 2), round(time.process_time() - began[1], 2)])
    return {
        "rows": LARGE,
        "megabytes": round(path.stat().st_size / 1e6, 1),
        "first_wall_and_cpu_s": seconds[0],
        "again_wall_and_cpu_s": seconds[1],
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_random_bundle(root / "bundle", TINY, (EDGE,) * 3)
        rows = rows_equal(root)
        print(json.dumps(rows), flush=True)
        result = {"rows": rows, "opening": opening(root), "cores": os.cpu_count()}
    RESULT.write_bytes(pretty_json(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
