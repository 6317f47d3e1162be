"""A dataset of very small volumes, in every kind of store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest

from brainsynth.config.schema import SamplerConfig
from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.labels import Label, LabelTable
from brainsynth.manifest import SampleRecord, ShardManifest, describe_sample
from brainsynth.plan import GenerationIdentity, Plan, generation_plan, generation_samples
from brainsynth.storage.arrays import decode_shard, shard_key
from brainsynth.storage.commit import commit_shard, read_commits, read_plan, write_plan
from brainsynth.storage.filesystem import ObjectStore, Store, open_store
from brainsynth.storage.finalise import finalise
from brainsynth.volume import VolumeSpec
from tests.servers.fixtures import fault_proxy, faulty, s3_root, swift

__all__ = ["fault_proxy", "faulty", "s3_root", "swift"]

SCHEMA = CovariateSchema(
    covariates=(
        Covariate(name="age", kind="continuous", unit="years", low=18.0, high=90.0),
        Covariate(name="sex", kind="binary", categories=("F", "M")),
    )
)


BANDS = LabelTable(labels=tuple(Label(index=i, name=f"band {i}") for i in (1, 2, 3)), source="bands of intensity")


def tiny_plan(
    rows: int = 7, samples_per_shard: int = 3, dtype: Any = "float16", base_seed: int = 0, labels: bool = False
) -> tuple[Plan, pd.DataFrame]:
    """A generation plan of 4×5×6 voxels, with label maps or without, and its samples."""
    volume = VolumeSpec(
        shape_xyz=(4, 5, 6), spacing_mm=(1.0, 2.0, 3.0), origin_mm=(-1.0, -2.0, -3.0), dtype=dtype, step=2.0**-11
    )
    table = pd.DataFrame({"age": [20.0 + row for row in range(rows)], "sex": ["FM"[row % 2] for row in range(rows)]})
    samples = generation_samples(table, SCHEMA, base_seed, SCHEMA.out_of_range(table))
    sampler = SamplerConfig(method="ddim", steps=5)
    identity = GenerationIdentity(bundle="b" * 64, sampler=sampler, precision="float32", base_seed=base_seed)
    table_of_labels = BANDS if labels else None
    return generation_plan(identity, volume, SCHEMA, samples, samples_per_shard, table_of_labels), samples


def bands(plan: Plan, image: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The label map that a stored image must have: bands of its intensity. Of another image it is another one."""
    return np.digitize(plan.volume.dequantise(image), [0.1, 0.4, 0.7]).astype(np.uint8)


def stored_rows(plan: Plan, rows: Iterable[int], noise: int = 0) -> list[npt.NDArray[Any]]:
    """All arrays of the plan for some rows."""
    images = np.stack([values(plan, row, noise) for row in rows])
    return [images] if plan.labels is None else [images, bands(plan, images)]


def mismatched(root: str | Store) -> list[int]:
    """Rows of a dataset whose label map is not that of the image next to it, both as they are stored."""
    store = open_store(root) if isinstance(root, str) else root
    plan = read_plan(store)
    found = []
    for commit in read_commits(store, plan):
        shard = plan.shard(commit.shard)
        images, labels = (decode_shard(plan, a, shard, store.read(shard_key(a, shard.index))) for a in plan.arrays)
        for sample, image, label_map in zip(commit.samples, images, labels, strict=True):
            same = (label_map == (bands(plan, image) if sample.status == "ok" else 255)).all()
            found += [] if same else [sample.row]
    return found


def values(plan: Plan, row: int, noise: int = 0) -> npt.NDArray[Any]:
    """The stored voxels of a row; another `noise`, another attempt that rounded otherwise."""
    volume = np.random.default_rng(row).random(plan.volume.shape_xyz)
    rounding = np.random.default_rng([row, noise]).integers(-2, 3, volume.shape) if noise else 0
    return plan.volume.quantise(volume + rounding * 2.0**-11)


def commit(
    store: Store, plan: Plan, samples: pd.DataFrame, index: int, bad: Sequence[int] = (), noise: int = 0
) -> ShardManifest:
    """Commit one shard of which the rows in `bad` are rejects."""
    shard = plan.shard(index)
    arrays = stored_rows(plan, range(shard.start, shard.stop), noise)
    records = [
        SampleRecord(sample_id=samples["sample_id"][row], row=row, status="rejected", reason=f"reason {row}")
        if row in bad
        else describe_sample(samples["sample_id"][row], row, [a[row - shard.start] for a in arrays], plan=plan)
        for row in range(shard.start, shard.stop)
    ]
    return commit_shard(store, plan, shard, arrays, records, {"noise": noise})


def write_dataset(store: Store, plan: Plan, samples: pd.DataFrame, bad: Sequence[int] = ()) -> None:
    """All of it, finished."""
    write_plan(store, plan, samples)
    for index in range(plan.num_shards):
        commit(store, plan, samples, index, bad)
    finalise(store, plan)


def flip(store: Store, key: str, bit: int) -> None:
    """Turn over one bit of an object; bits are counted around it."""
    data = bytearray(store.read(key))
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    store.write(key, bytes(data))


RACE_SHARDS = 20


def race(root: str, noise: int, barrier: Any, results: Any) -> None:
    """One of two workers that were both given every shard, and that round differently."""
    plan, samples = tiny_plan(rows=2 * RACE_SHARDS, samples_per_shard=2)
    store = open_store(root)
    barrier.wait(timeout=120)
    results.put([commit(store, plan, samples, index, noise=noise) for index in range(RACE_SHARDS)])


@pytest.fixture(params=["local", "file", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty folder: of this machine, by its path and by an object-store client, in memory, in a bucket."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3_root"))
    if request.param == "memory":
        return "memory:///"
    path = tmp_path / "dataset"
    if request.param == "file":
        path.mkdir()
    return path.as_uri() if request.param == "file" else str(path)


@pytest.fixture
def store(root: str) -> Store:
    """An empty folder in every kind of store."""
    return open_store(root) if "://" not in root else ObjectStore(root)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A finished dataset of seven rows in three shards; row 4 is a reject."""
    root = tmp_path / "dataset"
    write_dataset(open_store(str(root)), *tiny_plan(), bad=[4])
    return root
