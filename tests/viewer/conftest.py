"""A small dataset with all that the viewer shows: rejects, a failure, a gate, measured values, extrapolation, a series."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest

from brainsynth.config.schema import SamplerConfig
from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.labels import LabelTable
from brainsynth.manifest import DatasetManifest, SampleRecord, describe_sample
from brainsynth.plan import GateRules, GenerationIdentity, Plan, generation_plan, generation_samples
from brainsynth.records import unseal
from brainsynth.storage.commit import commit_shard, write_plan
from brainsynth.storage.filesystem import Store, open_store
from brainsynth.storage.finalise import DATASET_KEY, finalise
from brainsynth.storage.measured import put_measured
from brainsynth.viewer.server import ViewServer
from brainsynth.viewer.view import View
from brainsynth.volume import VolumeSpec
from tests.servers.fixtures import s3_root, swift
from tests.storage.conftest import BANDS, bands

__all__ = ["s3_root", "swift"]

SCHEMA = CovariateSchema(
    covariates=(
        Covariate(name="age", kind="continuous", unit="years", low=18.0, high=80.0, description="Age at the scan"),
        Covariate(name="sex", kind="binary", categories=("F", "M")),
        Covariate(name="ventricular_volume", kind="continuous", unit="ml", low=3.0, high=150.0, scale="log"),
    )
)
VOLUME = VolumeSpec(shape_xyz=(20, 26, 22), spacing_mm=(8.0, 7.0, 8.0), origin_mm=(-76.0, -87.5, -84.0))
PEOPLE, AGES, VENTRICLES = 14, (30.0, 50.0, 90.0), (10.0, 80.0)
REJECTED, FAILED, REASON = 3, 5, "quality gate, 3 attempts, the last: <img src=x onerror=alert(1)>"
PER_SHARD = 5


def samples_of() -> pd.DataFrame:
    """Fourteen people, then a series of one noise: three ages by two sizes of ventricles."""
    rows = [
        {"age": 20.0 + 4 * k, "sex": "FM"[k % 2], "ventricular_volume": 5.0 + 6 * k, "noise_seed": 100 + k}
        for k in range(PEOPLE)
    ]
    rows += [
        {"age": age, "sex": "F", "ventricular_volume": size, "noise_seed": 7} for age in AGES for size in VENTRICLES
    ]
    table = pd.DataFrame(rows)
    return generation_samples(table, SCHEMA, 0, SCHEMA.out_of_range(table))


def plan_of(
    samples: pd.DataFrame, volume: VolumeSpec = VOLUME, per_shard: int = PER_SHARD, labels: LabelTable | None = None
) -> Plan:
    """Its plan, with a gate that measures age."""
    gate = GateRules(measures=("age",), sha256="0" * 64, max_attempts=3, tolerance={}, exempt=())
    sampler = SamplerConfig(method="ddim", steps=5)
    identity = GenerationIdentity(bundle="b" * 64, sampler=sampler, precision="float32", base_seed=0, gate=gate)
    return generation_plan(identity, volume, SCHEMA, samples, per_shard, labels)


def voxels(plan: Plan, row: int, ventricles_ml: float) -> npt.NDArray[Any]:
    """A ball with a hole that grows with the ventricles, and some texture of its own."""
    shape = plan.volume.shape_xyz
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in grid))
    image = np.where(radius < 0.9, 0.6, 0.0) + 0.1 * np.random.default_rng(row).random(shape)
    image[radius < 0.1 + ventricles_ml / 200] = 0.05
    return plan.volume.quantise(image)


def commit(store: Store, plan: Plan, samples: pd.DataFrame, index: int) -> None:
    """One shard, by the protocol that the workers use."""
    shard = plan.shard(index)
    rows = range(shard.start, shard.stop)
    images = np.stack([voxels(plan, row, samples["ventricular_volume"][row]) for row in rows])
    stored = [images] if plan.labels is None else [images, bands(plan, images)]
    records = []
    for row in rows:
        name = samples["sample_id"][row]
        extra: dict[str, str | int | float] = {
            "gate_attempts": 1 + row % 3,
            "gate_score": row / 20,
            "gate_check": "blur",
        }
        extra |= {"gate_refused": "", "measured_age": samples["age"][row] - 1.0}
        record = describe_sample(name, row, [array[row - shard.start] for array in stored], extra, plan)
        if row == REJECTED:
            record = SampleRecord(sample_id=name, row=row, status="rejected", reason=REASON, extra=extra)
        if row == FAILED:
            record = SampleRecord(sample_id=name, row=row, status="failed", reason="out of memory")
        records.append(record)
    commit_shard(store, plan, shard, stored, records, {})


def write(
    uri: str, finished: bool = True, shards: int | None = None, labels: LabelTable | None = None
) -> tuple[Plan, pd.DataFrame]:
    """The dataset, or its first shards."""
    samples = samples_of()
    plan, store = plan_of(samples, labels=labels), open_store(uri)
    write_plan(store, plan, samples)
    for index in range(plan.num_shards if shards is None else shards):
        commit(store, plan, samples, index)
    if finished:
        finalise(store, plan)
    return plan, samples


def measured(samples: pd.DataFrame, shift: float = 2.5) -> pd.DataFrame:
    """What an evaluation may have measured."""
    return pd.DataFrame(
        {
            "sample_id": samples["sample_id"],
            "measured_age": samples["age"] + shift,
            "measured_sex": np.where(samples["sex"] == "M", 0.9, 0.2),
            "measured_ventricular_volume": samples["ventricular_volume"] * 1.1,
        }
    )


def publish(uri: str, table: pd.DataFrame) -> str:
    """Put it beside the manifest, as `jobs/evaluate.py` with `publish: true` does; the digest in its name."""
    store = open_store(uri)
    digest = unseal(DatasetManifest, store.read(DATASET_KEY), DATASET_KEY).shards_digest
    return put_measured(store, table, digest, {}).removeprefix("quality/measured-").removesuffix(".parquet")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished dataset with measured values; read it, never write to it."""
    root = tmp_path_factory.mktemp("viewer") / "demo" / "generated"
    _, samples = write(str(root))
    publish(str(root), measured(samples))
    return root


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished dataset with label maps; read it, never write to it."""
    root = tmp_path_factory.mktemp("viewer") / "demo" / "labelled"
    write(str(root), labels=BANDS)
    return root


@contextlib.contextmanager
def served(uri: str | Path, chosen: str | bool = True) -> Iterator[ViewServer]:
    """A server that answers, in a thread."""
    with ViewServer(View(str(uri), chosen)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@dataclasses.dataclass
class Answer:
    """What came back."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(server: ViewServer, name: str, method: str = "GET", **headers: str) -> Answer:
    """A request below the server's address."""
    return ask_path(server, f"/{server.token}/{name}", method, **headers)


def ask_path(server: ViewServer, path: str, method: str = "GET", **headers: str) -> Answer:
    """A request of this very path: nothing is cleaned up on the way, as a browser would."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers, skip_accept_encoding=True)
        for key, value in headers.items():
            connection.putheader(key.replace("_", "-"), value)
        connection.endheaders()
        answer = connection.getresponse()
        return Answer(answer.status, answer.headers, answer.read())
    finally:
        connection.close()
