"""What is known of stored data: per sample, per shard, per dataset. The dataset's manifest is a fold over shards'."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Annotated, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from brainsynth.labels import LabelTable
from brainsynth.plan import Plan
from brainsynth.records import left_out_at, record
from brainsynth.volume import voxel_sha256

MODEL_KEY = "model.json"
LEFT_OUT_KEY = "left_out.tsv"
"""Of a prepared cohort: what lies in the BIDS folder and is in no row of its table."""
_OF_THE_MACHINE = ("host", "pid")
SampleStatus = Literal["ok", "rejected", "failed"]
STATUSES: tuple[SampleStatus, ...] = get_args(SampleStatus)


@record
class ObjectRecord:
    """One stored object: a whole shard of one array."""

    array: str
    key: str
    size_bytes: int
    sha256: str


@record
class SampleRecord:
    """One row: its fate, the digest of its voxels, and cheap quality figures of the stored intensities."""

    sample_id: str
    row: int
    status: SampleStatus
    reason: str = ""
    """Why it was rejected (bad data) or failed (an error); empty when ok."""
    voxel_sha256: str = ""
    """Over the stored voxels (of every array in order); empty unless ok."""
    minimum: float = 0.0
    maximum: float = 0.0
    mean: float = 0.0
    std: float = 0.0
    p01: float = 0.0
    p99: float = 0.0
    zero_fraction: float = 0.0
    extra: dict[str, str | int | float] = field(default_factory=dict)
    """What only this kind of dataset knows, such as the source file's digest."""


@record
class ShardManifest:
    """The commit record of a shard: where it is, the shard is true."""

    schema_version: Literal[1] = 1
    plan_fingerprint: str
    shard: int
    objects: tuple[ObjectRecord, ...]
    samples: tuple[SampleRecord, ...]
    runtime: dict[str, str | int | float]
    """Circumstance: host, device, versions, micro-batch, seconds per stage. `for_publication` leaves the machine out."""
    write_id: str = ""
    """Of the attempt that wrote this record; no two attempts share one, so a writer knows its own record again."""

    def count(self, status: SampleStatus) -> int:
        """Samples of one fate."""
        return sum(sample.status == status for sample in self.samples)


@record
class DatasetManifest:
    """`dataset.json`: written last; a dataset without it is not finished."""

    schema_version: Literal[1] = 1
    kind: Literal["generated", "prepared", "latents", "measurements"]
    plan_fingerprint: str
    num_samples: int
    num_ok: int
    num_rejected: int
    num_failed: int
    arrays: tuple[str, ...]
    covariates: tuple[str, ...]
    kinds: dict[str, str]
    """Covariate → continuous, binary or categorical."""
    units: dict[str, str]
    affine: tuple[tuple[float, ...], ...]
    """4×4 voxel → world (mm, RAS+)."""
    spacing_mm: tuple[float, float, float]
    dtype: str
    shards_digest: str
    """sha256 over all shards' object digests and sample digests, in order."""
    files: dict[str, str]
    """Path → sha256 of the tables and metadata next to the arrays."""
    facts: dict[str, Any]
    """The plan's identity, for readers."""
    synthetic: bool
    labels: Annotated[LabelTable | None, left_out_at(None)] = None
    """Of a dataset with label maps."""
    derived_from_person: Annotated[bool, left_out_at(False)] = False
    """Whether the volumes are one real person's, changed: never to be published."""


@record
class ModelRecord:
    """`model.json` of a generated dataset: which model made it, and on what terms. As the bundle says."""

    schema_version: Literal[1] = 1
    bundle: str
    """The bundle's digest."""
    name: str
    licence: str
    training_data: str


def for_publication(commit: ShardManifest) -> ShardManifest:
    """The record without what describes the machine that made the shard: its name, and errors' texts, which may hold paths.

    Of a failed row the kind of the error stays. Digests of objects and samples, and so the dataset's, are the same.
    """
    samples = tuple(
        dataclasses.replace(sample, reason=sample.reason.partition(":")[0]) if sample.status == "failed" else sample
        for sample in commit.samples
    )
    runtime = {key: value for key, value in commit.runtime.items() if key not in _OF_THE_MACHINE}
    return dataclasses.replace(commit, samples=samples, runtime=runtime)


def stored_sha256(stored: list[npt.NDArray[Any]]) -> str:
    """The digest of a sample's stored voxels, over all its arrays in order."""
    return voxel_sha256(*stored)


def describe_sample(
    sample_id: str,
    row: int,
    stored: list[npt.NDArray[Any]],
    extra: dict[str, str | int | float] | None = None,
    plan: Plan | None = None,
) -> SampleRecord:
    """The record of a sample from its stored arrays; rejected, with the reason, when an array cannot be one.

    The quality figures are of the first array. Integer arrays are described in stored units. Of a `plan` with labels the
    second array is the label map: it is checked, and `extra` gets the volume of every structure.
    """
    first, extra = np.asarray(stored[0], dtype=np.float32), extra or {}
    minimum, maximum = float(first.min()), float(first.max())  # NaN where anything is
    reason = ""
    if not (np.isfinite([minimum, maximum]).all() and all(np.isfinite(array).all() for array in stored[1:])):
        reason = "not finite"
    elif minimum == maximum:
        reason = "constant"
    elif plan is not None and plan.labels is not None:
        reason = plan.labels.fault(stored[1])
    if reason:
        return SampleRecord(sample_id=sample_id, row=row, status="rejected", reason=reason, extra=extra)
    if plan is not None and plan.labels is not None:
        extra = {**extra, **plan.labels.volumes_ml(stored[1], plan.volume.voxel_ml)}
    # Percentiles of a regular subsample: within 0.1 % of the full ones at a tenth of the cost.
    p01, p99 = np.percentile(first.reshape(-1)[:: max(1, first.size // 200_000)], [1, 99])
    mean = first.mean(keepdims=True)
    return SampleRecord(
        sample_id=sample_id,
        row=row,
        status="ok",
        voxel_sha256=stored_sha256(stored),
        minimum=minimum,
        maximum=maximum,
        mean=float(mean.item()),
        std=float(first.std(mean=mean)),
        p01=float(p01),
        p99=float(p99),
        zero_fraction=int(np.count_nonzero(first == 0)) / first.size,
        extra=extra,
    )
