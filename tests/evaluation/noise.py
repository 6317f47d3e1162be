"""Measured sets that are noise, for tests and the benchmark of judging."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.instruments.measured import BINS
from brainsynth.instruments.tissue_features import left_right_difference, tissue_features
from brainsynth.manifest import describe_sample
from brainsynth.plan import ArraySpec, Plan, table_digest
from brainsynth.storage.commit import commit_shard, write_plan
from brainsynth.storage.filesystem import open_store
from brainsynth.volume import VolumeSpec

GRID = VolumeSpec(shape_xyz=(10, 14, 10), spacing_mm=(8.0, 8.0, 8.0), origin_mm=(-79.0, -127.0, -71.0))
SCHEMA = CovariateSchema(covariates=(Covariate(name="age", kind="continuous", unit="years", low=18.0, high=90.0),))
WIDTH, SHARD = 128, 500


def write_measurements(root: Path, rows: int, seed: int, usual_seed: int = 0) -> None:
    """A measured set of noise around one usual volume, that of `usual_seed`; 70 % of it is the training split."""
    rng = np.random.default_rng(seed)
    blank = rng.random(GRID.shape_xyz, np.float32)
    lengths = {"histogram": BINS, "tissue": len(tissue_features(blank, GRID))}
    lengths |= {"skew": len(left_right_difference(blank, GRID)), "features": WIDTH}
    samples = pd.DataFrame({"sample_id": [f"s{i:06d}" for i in range(rows)], "age": rng.uniform(20, 80, rows)})
    samples["subject"], samples["split"] = (
        samples["sample_id"],
        np.where(np.arange(rows) % 10 < 7, "train", "validation"),
    )
    plan = Plan(
        kind="measurements", identity={"noise": seed}, volume=GRID, covariates=SCHEMA,
        arrays=tuple(
            ArraySpec(name=n, sample_shape=(w,), chunk_shape=(w,), dimension_names=("subject", n), dtype="float32")
            for n, w in lengths.items()
        ),
        num_samples=rows, samples_per_shard=SHARD, samples_digest=table_digest(samples),
    )  # fmt: skip
    store = open_store(str(root))
    write_plan(store, plan, samples)
    common = np.random.default_rng(usual_seed)
    usual = {name: common.random(width, np.float32) for name, width in lengths.items()}
    for index in range(plan.num_shards):
        shard = plan.shard(index)
        n = shard.stop - shard.start
        arrays = [np.float32(usual[k] + 0.3 * rng.random((n, w), np.float32)) for k, w in lengths.items()]
        records = []
        for i in range(n):
            row, extra = shard.start + i, {"gradient": float(rng.normal(0.1, 0.01))}
            records.append(describe_sample(f"s{row:06d}", row, [a[i] for a in arrays], extra))
        commit_shard(store, plan, shard, arrays, records, {})
