"""Repair a dataset: re-plan exactly the rows that are damaged, keep the others as they are, remove what is left over.

Only a person's command deletes (`brainsynth verify --repair`, `brainsynth gc`); a worker never does. A repair ticket says
which rows of a shard are kept, their voxels lie next to it, and the shard's record and objects are gone. To the next run of
the job the shard is missing, and of a shard with a ticket it makes only the lost rows.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from brainsynth.errors import UserError
from brainsynth.manifest import ObjectRecord, SampleRecord, ShardManifest, stored_sha256
from brainsynth.plan import Plan, ShardSpec
from brainsynth.records import record, seal, unseal
from brainsynth.storage.arrays import decode_rows, decode_shard, empty_arrays, encode_shard, metadata_keys, shard_key
from brainsynth.storage.commit import commit_key, committed_of, committed_shards, each_commit, read_commit, read_plan
from brainsynth.storage.filesystem import Store
from brainsynth.storage.finalise import DATASET_KEY
from brainsynth.storage.leftovers import REPAIRS, is_garbage
from brainsynth.storage.measured import is_measured

if TYPE_CHECKING:  # a worker reads tickets, and verifies nothing
    from brainsynth.storage.verify import VerifyReport

log = logging.getLogger(__name__)


@record
class RepairTicket:
    """What is kept of a damaged shard."""

    plan_fingerprint: str
    shard: int
    kept: tuple[SampleRecord, ...]
    objects: tuple[ObjectRecord, ...]
    """Shard objects of the kept rows, in this folder."""


class Salvage:
    """A shard that is partly there: arrays in stored dtype, the kept records, and the rows that must be made."""

    def __init__(self, arrays: list[npt.NDArray[Any]], samples: list[SampleRecord | None], start: int) -> None:
        self.arrays, self.samples = arrays, samples
        self.lost = [start + offset for offset, sample in enumerate(samples) if sample is None]

    @classmethod
    def nothing(cls, plan: Plan, shard: ShardSpec) -> Salvage:
        """A shard of which every row must be made."""
        return cls(empty_arrays(plan, shard), [None] * (shard.stop - shard.start), shard.start)


def ticket_key(shard: int) -> str:
    """Where a shard's repair ticket lives."""
    return f"{REPAIRS}/shard-{shard:06d}.json"


def read_salvage(store: Store, plan: Plan, shard: ShardSpec) -> Salvage | None:
    """What a repair kept of a shard; None when there was no repair, or when what it kept is damaged in its turn."""
    try:
        ticket = unseal(RepairTicket, store.read(ticket_key(shard.index)), ticket_key(shard.index))
        if ticket.plan_fingerprint != plan.fingerprint or ticket.shard != shard.index:
            raise UserError("it belongs to another plan or shard")
        arrays = []
        for spec, stored in zip(plan.arrays, ticket.objects, strict=True):
            data = store.read(_salvage_key(shard.index, spec.name))
            if hashlib.sha256(data).hexdigest() != stored.sha256:
                raise UserError(f"{stored.key} does not match its sha256")
            arrays.append(decode_shard(plan, spec, shard, data).copy())
    except FileNotFoundError:
        return None
    except ValueError as error:
        log.warning("shard %d is made whole again: its repair ticket is damaged: %s", shard.index, error)
        return None
    samples: list[SampleRecord | None] = [None] * (shard.stop - shard.start)
    for sample in ticket.kept:
        samples[sample.row - shard.start] = sample
    return Salvage(arrays, samples, shard.start)


def close_ticket(store: Store, plan: Plan, shard: int) -> None:
    """The shard is committed again: what the repair kept is no longer needed."""
    store.delete(ticket_key(shard))
    for spec in plan.arrays:
        store.delete(_salvage_key(shard, spec.name))


def repair(store: Store, report: VerifyReport, failed: bool = False) -> dict[int, list[int]]:
    """Re-plan what `report` found damaged; the job that made the dataset then makes it again.

    Args:
        store: the dataset.
        report: of `verify_dataset`, just made.
        failed: re-plan the rows that failed, too.

    Returns:
        shard → rows that will be made again.
    """
    plan = read_plan(store)
    damaged = {p.shard for p in report.problems if p.shard is not None}
    if failed:
        damaged |= {
            shard for shard, read in each_commit(store, plan, sorted(committed_shards(store))) if _has_failed(read)
        }
    if damaged or not report.ok:
        store.delete(DATASET_KEY)  # first of all: what is about to change is not finished
    for problem in report.problems:
        if problem.kind == "corrupt" and (problem.key in metadata_keys(plan) or is_measured(problem.key)):
            store.delete(problem.key)  # its job writes it if it is not there
    duplicated = {row for p in report.problems for row in p.rows}
    return {shard: _open_ticket(store, plan, plan.shard(shard), duplicated, failed) for shard in sorted(damaged)}


def replan(store: Store, plan: Plan, rows: Iterable[int]) -> dict[int, list[int]]:
    """Have the job make these rows again, and keep the others of their shards. Returns shard → rows that will be made."""
    again = set(rows)
    store.delete(DATASET_KEY)  # what is about to change is not finished
    shards = sorted({row // plan.samples_per_shard for row in again})
    return {shard: _open_ticket(store, plan, plan.shard(shard), again, False) for shard in shards}


def _has_failed(read: Callable[[], ShardManifest]) -> bool:
    try:
        return read().count("failed") > 0
    except UserError:
        return True


def _open_ticket(store: Store, plan: Plan, shard: ShardSpec, again: set[int], failed: bool) -> list[int]:
    """Keep the good rows of a shard, then remove its objects and last its record; returns the lost rows."""
    rows = list(range(shard.start, shard.stop))
    try:
        commit = read_commit(store, plan, shard.index)
    except FileNotFoundError:
        return rows  # nothing says what should be in it; an object that is there is judged by the next attempt
    except UserError:
        store.delete(commit_key(shard.index))
        return rows
    salvage = _keep(store, plan, shard, commit, again, failed)
    kept = tuple(sample for sample in salvage.samples if sample is not None)
    if kept and read_salvage(store, plan, shard) is None:
        objects = []
        for spec, values in zip(plan.arrays, salvage.arrays, strict=True):
            data, key = encode_shard(plan, spec, values), _salvage_key(shard.index, spec.name)
            store.write(key, data)
            sha = hashlib.sha256(data).hexdigest()
            objects.append(ObjectRecord(array=spec.name, key=key, size_bytes=len(data), sha256=sha))
        ticket = RepairTicket(plan_fingerprint=plan.fingerprint, shard=shard.index, kept=kept, objects=tuple(objects))
        store.write(ticket_key(shard.index), seal(ticket))
    for stored in commit.objects:
        store.delete(stored.key)
    store.delete(commit_key(shard.index))
    return salvage.lost


def _keep(store: Store, plan: Plan, shard: ShardSpec, commit: ShardManifest, again: set[int], failed: bool) -> Salvage:
    """The rows whose stored voxels are still those of the record."""
    decoded = []
    for spec, stored in zip(plan.arrays, commit.objects, strict=True):
        try:
            decoded.append(decode_rows(plan, spec, shard, store.read(stored.key)))
        except FileNotFoundError:
            decoded.append([None] * (shard.stop - shard.start))
    salvage = Salvage.nothing(plan, shard)
    for offset, sample in enumerate(commit.samples):
        volumes = [rows[offset] for rows in decoded]
        if sample.row in again:
            continue
        if sample.status == "ok":
            whole = [v for v in volumes if v is not None]
            if len(whole) < len(volumes) or stored_sha256(whole) != sample.voxel_sha256:
                continue
            for array, volume in zip(salvage.arrays, whole, strict=True):
                array[offset] = volume
        elif sample.status == "failed" and failed:
            continue
        salvage.samples[offset] = sample
    return Salvage(salvage.arrays, salvage.samples, shard.start)


def _salvage_key(shard: int, array: str) -> str:
    return f"{REPAIRS}/shard-{shard:06d}.{array}"


def garbage(store: Store) -> list[str]:
    """Keys that no commit record refers to and none can come to refer to; decided by the records, never by a clock.

    Of a shard that is not committed everything stays: it may be on its way. Outside of the folders that brainsynth owns
    nothing is ever garbage.
    """
    plan = read_plan(store)
    done = committed_of(store, plan)
    wanted = set(metadata_keys(plan))
    for shard, read in each_commit(store, plan, sorted(done)):
        wanted |= {commit_key(shard), *_object_keys(plan, shard, read)}
    return [key for key, _ in store.list() if key not in wanted and is_garbage(key, done, plan.num_shards)]


def _object_keys(plan: Plan, shard: int, read: Callable[[], ShardManifest]) -> list[str]:
    try:
        return [stored.key for stored in read().objects]
    except (UserError, FileNotFoundError):
        return [shard_key(array, shard) for array in plan.arrays]


def lost_summary(lost: dict[int, list[int]]) -> str:
    """What a repair will have made again, in a few lines."""
    rows = sum(len(rows) for rows in lost.values())
    shown = [f"  shard {shard}: rows {_ranges(rows)}" for shard, rows in list(lost.items())[:20]]
    more = [f"  … and {len(lost) - 20} more shards"] if len(lost) > 20 else []
    return "\n".join(
        [f"re-planned: {rows} rows in {len(lost)} shards; run the same job command again to make them", *shown, *more]
    )


def _ranges(rows: list[int]) -> str:
    runs: list[list[int]] = []
    for row in rows:
        if runs and runs[-1][1] == row - 1:
            runs[-1][1] = row
        else:
            runs.append([row, row])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
