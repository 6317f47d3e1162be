"""The commit protocol: what makes a shard, and at last a dataset, true.

plan.json, put-if-absent, and what follows from it (samples.parquet, array metadata) → per shard its objects, then its
commit record, both put-if-absent → at the end the tables and dataset.json, compiled from the commit records alone.
Whatever dies in between, the same command resumes where the records end: resume = plan - commits.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import io
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from brainsynth.errors import UserError, problems_error
from brainsynth.labels import BACKGROUND, DSEG, LOST
from brainsynth.manifest import ObjectRecord, SampleRecord, ShardManifest, describe_sample
from brainsynth.plan import ArraySpec, Plan, ShardSpec, plan_differences, table_digest
from brainsynth.records import seal, unseal
from brainsynth.storage.arrays import check_array, create_arrays, decode_shard, encode_shard, shard_key
from brainsynth.storage.filesystem import Store
from brainsynth.storage.keys import is_of_desktop
from brainsynth.storage.tables import stored_table
from brainsynth.storage.whole_file import TEMPORARY_PREFIX

log = logging.getLogger(__name__)
PLAN_KEY = "plan.json"
SAMPLES_KEY = "samples.parquet"
_READ_AHEAD = 16
AGREEMENT = 0.01
"""Mean |difference| over standard deviation below which two attempts made the same volume. Measured on 4 mm brains: the same
seed in bfloat16 and in float32 0.002; the two most similar of 64 generated brains 0.04, of 122 real ones 0.07."""
LABEL_AGREEMENT = 0.05
"""Share of the labelled voxels in which two attempts at one label map may differ. Of 60 label maps of real brains (five
tissues, 2 mm, registered) the two most alike differ in 0.35."""


def commit_key(shard: int) -> str:
    """Where a shard's commit record lives."""
    return f"commits/shard-{shard:06d}.json"


def check_plan(store: Store, plan: Plan) -> bool:
    """True when the folder already holds this very plan, False when it is free. Raises UserError for another plan."""
    try:
        stored = unseal(Plan, store.read(PLAN_KEY), f"{store.uri}/{PLAN_KEY}")
    except FileNotFoundError:
        if _belongs_to(store, plan):
            return False
        # An attempt that died while it wrote the plan leaves a temporary file: that is still an empty folder.
        there = [key for key, _ in store.list() if not (key.startswith(TEMPORARY_PREFIX) or is_of_desktop(key))]
        if PLAN_KEY in there:
            return check_plan(store, plan)  # another run has just written it
        if there:
            stray = there[0]
            raise UserError(
                f"{store.uri} is not empty (it holds {stray}) and has no plan.json: give a new or empty output folder"
            ) from None
        return False
    if stored.fingerprint == plan.fingerprint:
        return True
    raise problems_error(
        f"{store.uri} holds another plan; give another output folder, or the same settings to resume",
        plan_differences(stored, plan),
    )


def _belongs_to(store: Store, plan: Plan) -> bool:
    """True for a dataset that lost its plan.json, when a commit record says that it was this plan."""
    for shard in committed_shards(store):
        with contextlib.suppress(UserError, FileNotFoundError):
            read_commit(store, plan, shard)
            return True
    return False


def write_plan(store: Store, plan: Plan, samples: pd.DataFrame) -> None:
    """Fix what the dataset will be: the plan first, then what follows from it, where that is lost or not there yet."""
    if not check_plan(store, plan) and not store.write_new(PLAN_KEY, seal(plan)):
        check_plan(store, plan)
    try:
        read_samples(store, plan)
    except UserError:
        buffer = io.BytesIO()
        samples.to_parquet(buffer, index=False)
        store.write(SAMPLES_KEY, buffer.getvalue())
    create_arrays(store, plan)


def read_plan(store: Store) -> Plan:
    """The plan of the dataset at `store`. Raises UserError where there is none or it is damaged."""
    try:
        return unseal(Plan, store.read(PLAN_KEY), f"{store.uri}/{PLAN_KEY}")
    except FileNotFoundError:
        raise UserError(f"{store.uri} is not a brainsynth dataset: {PLAN_KEY} is missing") from None


def read_samples(store: Store, plan: Plan) -> pd.DataFrame:
    """The samples table of the plan. Raises UserError when it is lost or is not the planned one."""
    where = f"{store.uri}/{SAMPLES_KEY}"
    try:
        samples = stored_table(store.read(SAMPLES_KEY))
    except FileNotFoundError:
        raise UserError(f"{where} is missing; run the same command again to write it") from None
    except UserError:
        raise  # an object store that does not answer
    except ValueError as error:
        raise UserError(f"{where} is damaged: {error}") from None
    if table_digest(samples) != plan.samples_digest:
        raise UserError(f"{where} is damaged: it is not the table that the plan was made from")
    return samples


def committed_shards(store: Store) -> set[int]:
    """Indices of the shards that have a commit record."""
    matches = (re.fullmatch(r"commits/shard-(\d{6,})\.json", key) for key, _ in store.list("commits"))
    return {int(match.group(1)) for match in matches if match}


def committed_of(store: Store, plan: Plan) -> set[int]:
    """Indices of the plan's shards that have a commit record."""
    return {shard for shard in committed_shards(store) if shard < plan.num_shards}


def read_commit(store: Store, plan: Plan, shard: int) -> ShardManifest:
    """A shard's commit record. Raises FileNotFoundError, or UserError when it is damaged or of another plan."""
    where = f"{store.uri}/{commit_key(shard)}"
    record = unseal(ShardManifest, store.read(commit_key(shard)), where)
    if record.plan_fingerprint != plan.fingerprint or record.shard != shard:
        raise UserError(f"{where} belongs to another plan or shard")
    return record


def each_commit(
    store: Store, plan: Plan, shards: Iterable[int] | None = None
) -> Iterator[tuple[int, Callable[[], ShardManifest]]]:
    """Each shard (of the plan by default), in order, and a function that returns what `read_commit` does, or raises it.

    Some are read ahead: an object store answers slowly, but many requests at once.
    """
    waiting: collections.deque[tuple[int, Future[ShardManifest]]] = collections.deque()
    pool = ThreadPoolExecutor(_READ_AHEAD)
    try:
        for shard in range(plan.num_shards) if shards is None else shards:
            waiting.append((shard, pool.submit(read_commit, store, plan, shard)))
            if len(waiting) > _READ_AHEAD:
                first, reading = waiting.popleft()
                yield first, reading.result
        for last, reading in waiting:
            yield last, reading.result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def read_commits(store: Store, plan: Plan, shards: Iterable[int] | None = None) -> Iterator[ShardManifest]:
    """The commit records of `each_commit`; raises what `read_commit` does."""
    return (read() for _, read in each_commit(store, plan, shards))


def commit_shard(
    store: Store,
    plan: Plan,
    shard: ShardSpec,
    arrays: Sequence[npt.NDArray[Any]],
    samples: Sequence[SampleRecord],
    runtime: dict[str, str | int | float],
    threads: int = 1,
) -> ShardManifest:
    """Write one whole shard and make it true. The first committer wins; a later one gets the first one's record.

    The record that comes back carries the write id of the attempt that won.

    Args:
        arrays: one (n, *sample_shape) array per array of the plan, in stored dtype; rows of samples that are not ok are
            replaced by the fill value.
        samples: the n records, in row order.
        runtime: circumstance, kept in the record, with the seconds that encoding and writing the objects took.
        threads: with which samples are encoded.
    """
    bad_rows = np.array([sample.status != "ok" for sample in samples])
    objects, adopted = [], False
    seconds = {"encode_s": 0.0, "write_s": 0.0}
    for spec, values in zip(plan.arrays, arrays, strict=True):
        if values.shape != check_array(plan, spec, shard) or len(samples) != len(values):
            raise ValueError(f"shard {shard.index}: got {values.shape} for {spec.name} and {len(samples)} records")
        kept = values
        if bad_rows.any():
            kept = values.copy()
            kept[bad_rows] = spec.fill_value
        put = _put_object(store, plan, spec, shard, kept, seconds, threads)
        if put is None:
            return read_commit(store, plan, shard.index)
        data, other = put
        adopted |= other
        objects.append(
            ObjectRecord(
                array=spec.name,
                key=shard_key(spec, shard.index),
                size_bytes=len(data),
                sha256=hashlib.sha256(data).hexdigest(),
            )
        )
    records = _describe_stored(store, plan, shard, samples) if adopted else list(samples)
    manifest = ShardManifest(
        plan_fingerprint=plan.fingerprint,
        shard=shard.index,
        objects=tuple(objects),
        samples=tuple(records),
        runtime={**runtime, **{stage: round(spent, 4) for stage, spent in seconds.items()}},
        write_id=uuid.uuid4().hex,
    )
    if not store.write_new(commit_key(shard.index), seal(manifest)):
        return read_commit(store, plan, shard.index)
    return manifest


def _put_object(
    store: Store,
    plan: Plan,
    spec: ArraySpec,
    shard: ShardSpec,
    values: npt.NDArray[Any],
    seconds: dict[str, float],
    threads: int,
) -> tuple[bytes, bool] | None:
    """Put a shard's object; returns the bytes that are stored now, and whether they are those of another attempt.

    Where an object is there already, an earlier attempt died between object and record, or another worker runs the same
    shard. Its bytes stay, since replacing them could break a record that it is about to write: ours then describes what
    is stored. Only an object that cannot be an attempt at this shard (unreadable, or other volumes) is replaced, and only
    while no record speaks for it: where one does, the shard is committed and None is returned.
    """
    began = time.monotonic()
    data, key = encode_shard(plan, spec, values, threads), shard_key(spec, shard.index)
    encoded = time.monotonic()
    new = store.write_new(key, data)
    seconds["encode_s"] += encoded - began
    seconds["write_s"] += time.monotonic() - encoded
    if new:
        return data, False
    for _ in range(3):
        stored = store.read(key)
        if stored == data or _agrees(plan, spec, shard, stored, values):
            return stored, stored != data
        if shard.index in committed_shards(store):
            return None
        log.warning("%s/%s is not an attempt at shard %d: it is replaced", store.uri, key, shard.index)
        store.delete(key)
        if store.write_new(key, data):
            return data, False
    raise UserError(f"{store.uri}/{key} is being changed by someone else; end other writers and run the command again")


def _agrees(plan: Plan, spec: ArraySpec, shard: ShardSpec, stored: bytes, values: npt.NDArray[Any]) -> bool:
    """True when the stored object holds these volumes, but for rounding and for rows that either attempt gave up."""
    try:
        decoded = decode_shard(plan, spec, shard, stored)
    except ValueError:
        return False
    if spec.name == DSEG:
        return all(_same_labels(a, b) for a, b in zip(decoded, values, strict=True))
    for a, b in zip(decoded.astype(np.float32), values.astype(np.float32), strict=True):
        both = np.isfinite(a) & np.isfinite(b)
        if both.any() and np.abs(a - b)[both].mean() > AGREEMENT * b[both].std():
            return False
    return True


def _same_labels(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    """Two label maps of one volume differ in few of the voxels that either labels; a row of fill values differs in none."""
    if LOST in (a.flat[0], b.flat[0]):
        return True
    either = (a != BACKGROUND) | (b != BACKGROUND)
    return bool((a != b).sum() <= LABEL_AGREEMENT * either.sum())


def _describe_stored(store: Store, plan: Plan, shard: ShardSpec, samples: Sequence[SampleRecord]) -> list[SampleRecord]:
    stored = [decode_shard(plan, a, shard, store.read(shard_key(a, shard.index))) for a in plan.arrays]
    described = [
        describe_sample(s.sample_id, s.row, [a[i] for a in stored], s.extra, plan) for i, s in enumerate(samples)
    ]
    # A row of fill values does not know why it is one: keep the reason that this attempt gives.
    return [s if s.status != "ok" and f.status != "ok" else f for s, f in zip(samples, described, strict=True)]
