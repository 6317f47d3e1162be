"""Datasets that the readers' and exports' tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest

from brainsynth.config.schema import SamplerConfig
from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.manifest import SampleRecord, describe_sample
from brainsynth.plan import GenerationIdentity, Plan, generation_plan, generation_samples
from brainsynth.storage.commit import commit_shard, write_plan
from brainsynth.storage.filesystem import Store, open_store
from brainsynth.storage.finalise import finalise
from brainsynth.volume import VolumeSpec
from tests.servers.fixtures import fault_proxy, faulty, s3_root, swift
from tests.storage.conftest import BANDS, bands, dataset

__all__ = ["dataset", "fault_proxy", "faulty", "s3_root", "swift"]

SHAPE = (24, 40, 20)  # chunks of 24×20×20: a volume is more than one
ROWS, REJECTED = 36, 7
SCHEMA = CovariateSchema(
    covariates=(
        Covariate(name="age", kind="continuous", unit="years", low=18.0, high=95.0, description="Age at the scan"),
        Covariate(name="sex", kind="binary", categories=("F", "M")),
        Covariate(name="ventricular_volume", kind="continuous", unit="ml", low=3.0, high=150.0, scale="log"),
    )
)


def plan_of(
    rows: int = ROWS, dtype: Any = "float16", samples_per_shard: int = 8, labels: bool = False
) -> tuple[Plan, pd.DataFrame]:
    """A plan of small volumes, with label maps or without, and its samples."""
    volume = VolumeSpec(shape_xyz=SHAPE, spacing_mm=(5.0, 4.0, 6.0), origin_mm=(-58.0, -90.0, -50.0), dtype=dtype)
    number = np.arange(rows)
    table = pd.DataFrame(
        {"age": 30.0 + number * 1.5, "sex": np.where(number % 2, "M", "F"), "ventricular_volume": 10.0 + number}
    )
    samples = generation_samples(table, SCHEMA, 0, SCHEMA.out_of_range(table))
    sampler = SamplerConfig(method="ddim", steps=5)
    identity = GenerationIdentity(bundle="b" * 64, sampler=sampler, precision="float32", base_seed=0)
    return generation_plan(identity, volume, SCHEMA, samples, samples_per_shard, BANDS if labels else None), samples


def voxels(plan: Plan, row: int) -> npt.NDArray[Any]:
    """The stored voxels of a row."""
    return plan.volume.quantise(np.random.default_rng(row).random(plan.volume.shape_xyz))


def commit(store: Store, plan: Plan, samples: pd.DataFrame, index: int) -> None:
    """Commit one shard; row 7 is a reject."""
    shard = plan.shard(index)
    rows = range(shard.start, shard.stop)
    images = np.stack([voxels(plan, row) for row in rows])
    arrays = [images] if plan.labels is None else [images, bands(plan, images)]
    records = [
        SampleRecord(sample_id=samples["sample_id"][row], row=row, status="rejected", reason="a test")
        if row == REJECTED
        else describe_sample(samples["sample_id"][row], row, [a[row - shard.start] for a in arrays], plan=plan)
        for row in rows
    ]
    commit_shard(store, plan, shard, arrays, records, {})


def write(uri: str, plan: Plan, samples: pd.DataFrame) -> None:
    """All of it, finished."""
    store = open_store(uri)
    write_plan(store, plan, samples)
    for index in range(plan.num_shards):
        commit(store, plan, samples, index)
    finalise(store, plan)


def ids(rows: list[int]) -> list[str]:
    """The ids of rows."""
    return [f"syn{row:06d}" for row in rows]


OK_ROWS = [row for row in range(ROWS) if row != REJECTED]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished dataset at `demo-output/generated` of some folder; read it, never write to it."""
    root = tmp_path_factory.mktemp("reading") / "demo-output" / "generated"
    write(str(root), *plan_of())
    return root


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images with label maps; read it, never write to it."""
    root = tmp_path_factory.mktemp("labels") / "demo-output" / "labelled"
    write(str(root), *plan_of(labels=True))
    return root


@pytest.fixture(scope="session")
def label_maps() -> npt.NDArray[np.uint8]:
    """(n, X, Y, Z) uint8: what readers must give back of `labelled`."""
    plan, _ = plan_of()
    return np.stack([bands(plan, voxels(plan, row)) for row in OK_ROWS])


@pytest.fixture(scope="session")
def intensities() -> npt.NDArray[np.float32]:
    """(n, X, Y, Z) float32: what readers must give back of `finished`."""
    plan, _ = plan_of()
    return np.stack([plan.volume.dequantise(voxels(plan, row)) for row in OK_ROWS])
