"""The plan of a dataset: which sample lives in which shard, with which seed, and the fingerprint of it all.

A plan is data. It maps shard → ordered rows and never depends on batch size, worker count or retries. Prepared cohorts,
latents and generated datasets all have one, so all share one commit protocol, one reader and one verify.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from brainsynth.config.schema import SamplerConfig
from brainsynth.config.training import DecoderChoice
from brainsynth.covariates.schema import CovariateSchema
from brainsynth.errors import UserError
from brainsynth.records import digest, record, to_dict
from brainsynth.volume import VolumeSpec

MAX_SAMPLES, MAX_SAMPLE_VALUES = 10_000_000, 1 << 29
StoredArrayDtype = Literal["float16", "float32", "uint16", "uint8"]


@record
class ArraySpec:
    """One stored array (N, *sample_shape); a shard holds whole samples, chunks split a sample."""

    name: str
    sample_shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    dimension_names: tuple[str, ...]
    dtype: StoredArrayDtype

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or not self.name.isascii():
            raise ValueError(f"{self.name!r} is no name of an array: letters, digits and _ only")
        if len(self.sample_shape) != len(self.chunk_shape) or len(self.dimension_names) != len(self.sample_shape) + 1:
            raise ValueError("sample_shape, chunk_shape and dimension_names do not fit each other")
        if min(self.sample_shape, default=0) < 1 or min(self.chunk_shape) < 1:
            raise ValueError("sample_shape and chunk_shape must be positive")
        if math.prod(self.sample_shape) > MAX_SAMPLE_VALUES:
            raise ValueError(f"a sample of shape {self.sample_shape} is too large")


@record
class ShardSpec:
    """Rows [start, stop) of the plan: the unit of work, of writing and of commit."""

    index: int
    start: int
    stop: int


@record
class Plan:
    """What a dataset will be. Two plans with equal fingerprints describe the same voxels."""

    schema_version: Literal[1] = 1
    kind: Literal["generated", "prepared", "latents", "measurements"]
    identity: dict[str, Any]
    """All else that changes stored values on purpose: bundle or cohort digest, sampler, precision, base seed, …"""
    volume: VolumeSpec
    covariates: CovariateSchema
    arrays: tuple[ArraySpec, ...]
    num_samples: int
    samples_per_shard: int
    samples_digest: str
    """Of the samples table: ids, seeds, covariates, in row order."""

    def __post_init__(self) -> None:
        if not self.arrays or len({array.name for array in self.arrays}) != len(self.arrays):
            raise ValueError("a plan needs arrays of different names")
        if self.samples_per_shard < 1 or self.num_samples > MAX_SAMPLES:
            raise ValueError(f"samples_per_shard must be at least 1, num_samples at most {MAX_SAMPLES}")
        if self.num_samples < 1:
            raise UserError("there are no rows to plan: give a table with at least one row")

    @property
    def fingerprint(self) -> str:
        """sha256 of the plan."""
        return digest(self)

    @property
    def num_shards(self) -> int:
        """Number of shards; the last may be partly filled."""
        return -(-self.num_samples // self.samples_per_shard)

    def shard(self, index: int) -> ShardSpec:
        """The `index`-th shard."""
        start = index * self.samples_per_shard
        return ShardSpec(index=index, start=start, stop=min(start + self.samples_per_shard, self.num_samples))

    def raw_bytes(self) -> int:
        """Uncompressed size of all arrays."""
        per_sample = 0
        for array in self.arrays:
            count = 1
            for size in array.sample_shape:
                count *= size
            per_sample += count * {"float32": 4, "float16": 2, "uint16": 2, "uint8": 1}[array.dtype]
        return per_sample * self.num_samples


def volume_array(name: str, volume: VolumeSpec) -> ArraySpec:
    """The array of a volume dataset: chunks of 17 to 64 voxels along an axis where it divides into two or four.

    160×224×160 voxels are chunks of 40×56×40: a random box of 64³ touches a fifth of the volume, where chunks of half an
    axis would be half of it; whole volumes cost the same (docs/reading.md).
    """
    return ArraySpec(
        name=name,
        sample_shape=volume.shape_xyz,
        chunk_shape=tuple(_chunk_size(size) for size in volume.shape_xyz),
        dimension_names=("subject", "x", "y", "z"),
        dtype=volume.dtype,
    )


def _chunk_size(size: int) -> int:
    half = size // 2 if size % 2 == 0 and size > 32 else size
    return half // 2 if half % 2 == 0 and half > 64 else half


def seed_for(base_seed: int, sample_id: str) -> int:
    """63-bit seed of a sample. Keyed by id, not by row: appending or reordering rows changes no other subject."""
    key = f"brainsynth-seed-v1\0{base_seed}\0{sample_id}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def attempt_seed(seed: int, attempt: int) -> int:
    """63-bit seed of a row's next attempt after the quality gate refused it; attempt 0 has the row's own seed."""
    if attempt == 0:
        return seed
    key = f"brainsynth-attempt-v1\0{seed}\0{attempt}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def table_digest(samples: pd.DataFrame) -> str:
    """sha256 of a samples table's content, independent of file format."""
    text = samples.to_csv(index=False, float_format="%.17g", lineterminator="\n")
    return hashlib.sha256(text.encode()).hexdigest()


def generation_samples(
    rows: pd.DataFrame, schema: CovariateSchema, base_seed: int, extrapolated: npt.NDArray[np.bool_]
) -> pd.DataFrame:
    """The samples table of a generation plan: sample_id, seed, extrapolated, covariates. `rows` must be validated.

    A row's noise comes from its sample_id; where `rows` has `noise_seed`, rows of one number there share one noise.
    """
    width = max(6, len(str(len(rows) - 1)))
    if "sample_id" in rows.columns:
        gone = np.flatnonzero(rows["sample_id"].isna())
        if gone.size:
            raise UserError(f"sample_id is missing in row {', '.join(map(str, gone[:5]))}")
        ids = rows["sample_id"].astype(str)
    else:
        ids = pd.Series([f"syn{row:0{width}d}" for row in range(len(rows))])
    bad = sorted({i for i in ids if not (i.isascii() and i.isalnum() and len(i) <= 64)})
    if bad:
        raise UserError(f"sample_id must be 1-64 letters and digits (BIDS labels); not so: {', '.join(bad[:5])!r}")
    if ids.duplicated().any():
        raise UserError(f"sample_id must be unique; given twice: {', '.join(sorted(set(ids[ids.duplicated()]))[:5])}")
    samples = pd.DataFrame({"sample_id": ids.to_numpy()})
    names = [f"noise{int(s)}" for s in rows["noise_seed"]] if "noise_seed" in rows.columns else samples["sample_id"]
    samples["seed"] = [seed_for(base_seed, name) for name in names]
    samples["extrapolated"] = extrapolated
    return pd.concat([samples, rows[list(schema.names)].reset_index(drop=True)], axis=1)


def generation_plan(
    bundle_digest: str,
    volume: VolumeSpec,
    schema: CovariateSchema,
    samples: pd.DataFrame,
    sampler: SamplerConfig,
    precision: str,
    base_seed: int,
    samples_per_shard: int,
    gate: dict[str, Any] | None = None,
    decoder: DecoderChoice = "own",
) -> Plan:
    """The plan of a generated dataset. Pure: needs no torch, no storage.

    A gate is part of it only where one is used, and a decoder only where it is not the bundle's own.
    """
    return Plan(
        kind="generated",
        identity={
            "bundle": bundle_digest,
            "sampler": to_dict(sampler),
            "precision": precision,
            "base_seed": base_seed,
            "noise": "philox4x64",
            **({} if gate is None else {"gate": gate}),
            **({} if decoder == "own" else {"decoder": decoder}),
        },
        volume=volume,
        covariates=schema,
        arrays=(volume_array("t1w", volume),),
        num_samples=len(samples),
        samples_per_shard=samples_per_shard,
        samples_digest=table_digest(samples),
    )


def plan_differences(stored: Plan, wanted: Plan) -> list[str]:
    """The fields in which two plans differ, as dotted names with both values."""

    def walk(a: Any, b: Any, path: str) -> list[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            found = []
            for key in sorted(set(a) | set(b)):
                found += walk(a.get(key), b.get(key), f"{path}.{key}" if path else key)
            return found
        return [] if a == b else [f"{path}: the folder has {a!r}, this run asks for {b!r}"]

    return walk(to_dict(stored), to_dict(wanted), "")
