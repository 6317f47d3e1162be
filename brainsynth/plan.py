"""The plan of a dataset: which sample lives in which shard, with which seed, and the fingerprint of it all.

A plan is data. It maps shard → ordered rows and never depends on batch size, worker count or retries. Prepared cohorts,
latents and generated datasets all have one, so all share one commit protocol, one reader and one verify.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import field
from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from brainsynth.config.gate import CountedConfig
from brainsynth.config.schema import SamplerConfig
from brainsynth.config.training import DecoderChoice, Precision
from brainsynth.covariates.names import clashing
from brainsynth.covariates.schema import CovariateSchema
from brainsynth.errors import UserError
from brainsynth.labels import DSEG, LOST, Label, LabelTable
from brainsynth.records import digest, from_dict, left_out_at, record, to_dict
from brainsynth.volume import StoredCodec, VolumeSpec

NOBODY = "of no real person"
ROW_COLUMNS = ("sample_id", "noise_seed")
"""What a table of rows may say apart from covariates; see `generation_samples`."""
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,6})?")
_ROUNDED, _TOO_LARGE = 2**53, Decimal("1e400")
"""From 2^53 on a float does not hold every whole number."""
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
    fill: Annotated[int, left_out_at(0)] = 0
    """What stands for a sample that is not there in an array of integers; in one of floats it is NaN."""
    codec: Annotated[StoredCodec, left_out_at("zstd-3")] = "zstd-3"

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or not self.name.isascii():
            raise ValueError(f"{self.name!r} is not a name for an array: letters, digits and _ only")
        if len(self.sample_shape) != len(self.chunk_shape) or len(self.dimension_names) != len(self.sample_shape) + 1:
            raise ValueError("sample_shape, chunk_shape and dimension_names differ in their number of axes")
        if min(self.sample_shape, default=0) < 1 or min(self.chunk_shape) < 1:
            raise ValueError("sample_shape and chunk_shape must be positive")
        if math.prod(self.sample_shape) > MAX_SAMPLE_VALUES:
            raise ValueError(f"a sample of shape {self.sample_shape} is too large")

    @property
    def fill_value(self) -> float | int:
        """What stands for a sample that is not there."""
        return math.nan if self.dtype.startswith("float") else self.fill


@record
class ShardSpec:
    """Rows [start, stop) of the plan: the unit of work, of writing and of commit."""

    index: int
    start: int
    stop: int


@record
class GateRules:
    """What decides over a volume apart from its voxels: the part of a plan's identity that a quality gate adds."""

    sha256: str
    """Of the gate's file."""
    max_attempts: int
    exempt: tuple[str, ...]
    tolerance: dict[str, float]
    """Covariate → largest distance of measured from asked, in its unit."""
    measures: tuple[str, ...]
    """Covariates that are measured on every volume that the checks let pass."""
    counted: Annotated[dict[str, CountedConfig], left_out_at({})] = field(default_factory=dict)
    """Those of them that are counted on the label map."""


@record
class ScanIdentity:
    """Of volumes that show one real person under other covariates: whose scan, by digests, and how it was inverted."""

    source_sha256: str
    """Of the scan's file."""
    prepared_sha256: str
    """Of its voxels on the bundle's grid, as a cohort of the bundle would store them."""
    covariates: dict[str, str | float]
    """The person's own."""
    steps: int
    """Of the flow in either direction."""


class PersonScan(NamedTuple):
    """One person's scan, prepared."""

    identity: ScanIdentity
    volume: npt.NDArray[np.float32]
    """(X, Y, Z) intensities in [0, 1] on the bundle's grid."""


@record
class GenerationIdentity:
    """A generation plan's `identity`, typed. What is at its default since it was introduced later is not written."""

    bundle: str
    """The digest of the bundle, or of the generator."""
    sampler: Annotated[SamplerConfig | None, left_out_at(None)] = None
    """Of a bundle, always there; a generator of another package samples in its own way."""
    precision: Precision
    base_seed: int
    noise: Literal["philox4x64"] = "philox4x64"
    gate: Annotated[GateRules | None, left_out_at(None)] = None
    decoder: Annotated[DecoderChoice, left_out_at("own")] = "own"
    options: Annotated[dict[str, str | int | float | bool], left_out_at({})] = field(default_factory=dict)
    """With which a generator of another package was built."""
    labeller: Annotated[str | None, left_out_at(None)] = None
    """Digest of the record of the labeller that makes the label maps."""
    renderer: Annotated[str | None, left_out_at(None)] = None
    """Digest of the record of the renderer that makes the images of them."""
    scan: Annotated[ScanIdentity | None, left_out_at(None)] = None
    """Of volumes derived from a real person's scan."""


@record
class Plan:
    """What a dataset will be. Two plans with equal fingerprints describe the same voxels."""

    schema_version: Literal[1] = 1
    kind: Literal["generated", "prepared", "latents", "measurements"]
    identity: dict[str, Any]
    """All else that changes stored values on purpose; `generation_identity` reads that of a generated dataset."""
    volume: VolumeSpec
    covariates: CovariateSchema
    arrays: tuple[ArraySpec, ...]
    num_samples: int
    samples_per_shard: int
    samples_digest: str
    """Of the samples table: ids, seeds, covariates, in row order."""
    labels: Annotated[LabelTable | None, left_out_at(None)] = None
    """Of a dataset of volumes with label maps, which are its second array."""

    def __post_init__(self) -> None:
        if not self.arrays or len({array.name for array in self.arrays}) != len(self.arrays):
            raise ValueError("a plan needs arrays of different names")
        if self.labels is not None and [a.name for a in self.arrays[1:]] != [DSEG]:
            raise ValueError(f"a plan with labels needs the volumes' array and {DSEG}")
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

    @property
    def structures(self) -> tuple[Label, ...]:
        """What the label maps name; nothing of a dataset without them."""
        return () if self.labels is None else self.labels.labels

    @property
    def holds_volumes(self) -> bool:
        """True where the arrays are volumes, perhaps with their label maps, and no latents or measurements."""
        return self.kind in ("generated", "prepared") and (len(self.arrays) == 1) == (self.labels is None)

    @property
    def derived_from_person(self) -> bool:
        """True where the volumes are one real person's, changed: never to be published."""
        return "scan" in self.identity

    @property
    def whose(self) -> str:
        """Of whom generated volumes are, in words for cards, headers and pictures; empty for others."""
        if self.kind != "generated":
            return ""
        return "DERIVED FROM A REAL PERSON'S SCAN" if self.derived_from_person else NOBODY

    def raw_bytes(self) -> int:
        """Uncompressed size of all arrays."""
        per_sample = sum(math.prod(array.sample_shape) * np.dtype(array.dtype).itemsize for array in self.arrays)
        return per_sample * self.num_samples


@record
class GeneratorSettings:
    """Where a generator finds things and how it runs: circumstance, never part of a plan."""

    root: str
    bundle: str
    micro_batch: int
    threads: int
    workers: int
    use_gpu: bool
    exact_rewrites: bool


def recorded_settings(root: str, bundle: str, runtime: Mapping[str, Any], use_gpu: bool = False) -> GeneratorSettings:
    """As the rows of a shard were made, by its runtime record; what that does not say yet held before it did."""
    return GeneratorSettings(
        root=root,
        bundle=bundle,
        micro_batch=int(runtime.get("micro_batch", 1)),
        threads=int(runtime.get("threads", 1)),
        workers=1,
        use_gpu=use_gpu,
        exact_rewrites=bool(runtime.get("exact_rewrites", 0)),
    )


def made_together(shard: ShardSpec, row: int, runtime: Mapping[str, Any]) -> ShardSpec:
    """The rows that went through the networks with a row, by its shard's runtime record: voxels depend on it by rounding."""
    size = 1 if runtime.get("rows_remade") else int(runtime.get("micro_batch", 1))  # remade rows are made one by one
    start = shard.start + (row - shard.start) // size * size
    return ShardSpec(index=shard.index, start=start, stop=min(start + size, shard.stop))


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


def volume_arrays(
    volume: VolumeSpec, labels: LabelTable | None = None, codec: StoredCodec = "zstd-3"
) -> tuple[ArraySpec, ...]:
    """The arrays of a volume dataset: `t1w` and, with labels, `dseg` on the same grid and in the same chunks."""
    images = dataclasses.replace(volume_array("t1w", volume), codec=codec)
    return (images,) if labels is None else (images, dataclasses.replace(images, name=DSEG, dtype="uint8", fill=LOST))


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

    Raises:
        UserError: a sample_id or noise_seed that cannot be used, or a covariate with a name of ours.
    """
    clashes = clashing(schema.names)
    if clashes:
        raise UserError(
            f"the model's covariate {', '.join(clashes)} has the name of our own column or key, so the dataset would hold "
            "two things under it; prepare the cohort again, with another name in covariates and this one in "
            "source.columns"
        )
    width = max(6, len(str(len(rows) - 1)))
    if "sample_id" in rows.columns:
        gone = np.flatnonzero(rows["sample_id"].isna())
        if gone.size:
            raise UserError(
                f"sample_id is missing in row {', '.join(map(str, gone[:5]))}; row 0 is the first below the header"
            )
        ids = rows["sample_id"].astype(str)
    else:
        ids = pd.Series([f"syn{row:0{width}d}" for row in range(len(rows))])
    bad = sorted({i for i in ids if not (i.isascii() and i.isalnum() and len(i) <= 64)})
    if bad:
        raise UserError(f"sample_id must be 1-64 letters and digits (BIDS labels); not so: {', '.join(bad[:5])!r}")
    if ids.duplicated().any():
        raise UserError(f"sample_id must be unique; given twice: {', '.join(sorted(set(ids[ids.duplicated()]))[:5])}")
    samples = pd.DataFrame({"sample_id": ids.to_numpy()})
    samples["seed"] = [seed_for(base_seed, name) for name in _noise_names(rows, ids)]
    samples["extrapolated"] = extrapolated
    return pd.concat([samples, rows[list(schema.names)].reset_index(drop=True)], axis=1)


def _noise_names(rows: pd.DataFrame, ids: pd.Series) -> Iterable[str]:
    """What each row's noise is named after."""
    if "noise_seed" not in rows.columns:
        return ids
    where = "noise_seed in row {} (row 0 is the first)"
    return [f"noise{whole_number(value, where.format(row))}" for row, value in enumerate(rows["noise_seed"])]


def whole_number(value: Any, what: str) -> int:
    """A number of 0 or more, exactly as it was meant, from an int, a float, a Decimal or a text.

    Raises:
        UserError: it is not one, or it has a decimal point or an exponent and is so large that it may have been rounded.
    """
    text = str(value).strip()
    typed = isinstance(value, int | np.integer | float | np.floating | Decimal) and not isinstance(value, bool)
    number = Decimal(text) if (typed or isinstance(value, str)) and _NUMBER.fullmatch(text) else Decimal("NaN")
    if not number.is_finite() or not 0 <= number < _TOO_LARGE or number != number.to_integral_value():
        raise UserError(f"{what} must be a whole number of 0 or more, below 1e400, and is {ascii(value)[:80]}")
    if number >= _ROUNDED and not isinstance(value, Decimal) and not text.lstrip("+").isdigit():
        raise UserError(
            f"{what}: {ascii(value)[:80]} may have been rounded, as numbers with a decimal point or an exponent are from "
            "2^53 on: write it in digits, as text or in a column of whole numbers"
        )
    return int(number)


def generation_plan(
    identity: GenerationIdentity,
    volume: VolumeSpec,
    schema: CovariateSchema,
    samples: pd.DataFrame,
    samples_per_shard: int,
    labels: LabelTable | None = None,
    codec: StoredCodec = "zstd-3",
) -> Plan:
    """The plan of a generated dataset, with label maps if there is a table of them. Pure: needs no torch, no storage."""
    return Plan(
        kind="generated",
        identity=to_dict(identity),
        volume=volume,
        covariates=schema,
        arrays=volume_arrays(volume, labels, codec),
        num_samples=len(samples),
        samples_per_shard=samples_per_shard,
        samples_digest=table_digest(samples),
        labels=labels,
    )


def generation_identity(plan: Plan) -> GenerationIdentity:
    """What made a generated dataset's voxels. Raises UserError for a plan that says something else."""
    return from_dict(GenerationIdentity, plan.identity, "the plan's identity")


def plan_differences(stored: Plan, wanted: Plan) -> list[str]:
    """The fields in which two plans differ, as dotted names with both values."""

    def walk(a: Any, b: Any, path: str) -> list[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            return [
                difference
                for key in sorted(set(a) | set(b))
                for difference in walk(a.get(key), b.get(key), f"{path}.{key}" if path else key)
            ]
        return [] if a == b else [f"{path}: the folder has {_shown(a)}, this run asks for {_shown(b)}"]

    return walk(to_dict(stored), to_dict(wanted), "")


def _shown(value: Any) -> str:
    """A value in a message; of a long one, such as a label table, how it begins."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
