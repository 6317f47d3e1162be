"""verify names each object that is missing, corrupt or unexpected, whatever happened to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from brainsynth.errors import UserError
from brainsynth.manifest import describe_sample
from brainsynth.storage.attempts import Attempts
from brainsynth.storage.commit import commit_shard, write_plan
from brainsynth.storage.filesystem import Store, open_store
from brainsynth.storage.finalise import finalise
from brainsynth.storage.repair import garbage
from brainsynth.storage.verify import VerifyReport, verify_dataset
from tests.storage.conftest import commit, flip, tiny_plan, values, write_dataset

SHARD = "dataset.zarr/t1w/c/1/0/0/0"
TABLES = (
    "samples.parquet",
    "manifest/subjects.parquet",
    "manifest/shards.parquet",
    "participants.tsv",
    "participants.json",
    "dataset_description.json",
    "README.md",
    "rejects.tsv",
    "dataset.json",
)
METADATA = ("dataset.zarr/zarr.json", "dataset.zarr/t1w/zarr.json")
RECORD = "commits/shard-000001.json"


def found(report: VerifyReport) -> set[tuple[str, str]]:
    return {(problem.kind, problem.key) for problem in report.problems}


def test_a_whole_dataset_is_ok(store: Store) -> None:
    write_dataset(store, *tiny_plan(), bad=[4])
    seen: list[tuple[int, int]] = []
    report = verify_dataset(store, lambda done, total: seen.append((done, total)))
    assert report.ok
    assert (report.shards, report.samples_ok, report.samples_rejected, report.samples_failed) == (3, 6, 1, 0)
    assert report.size_bytes == sum(size for key, size in store.list() if "/c/" in key)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert report.summary().startswith("ok: 3 shards, 6 volumes ok, 1 rejected")


@pytest.mark.parametrize("key", [SHARD, RECORD, *TABLES, *METADATA])
def test_what_is_deleted_is_missing(store: Store, key: str) -> None:
    write_dataset(store, *tiny_plan(), bad=[4])
    store.delete(key)
    report = verify_dataset(store)
    assert ("missing", key) in found(report)
    assert {kind for kind, _ in found(report)} <= {"missing", "unexpected", "orphaned"}
    assert f"missing: {key}" in report.summary()
    assert len([p for p in report.problems if p.key == key]) == 1


def test_a_flipped_bit_in_sixty_places_of_a_shard(dataset: Path) -> None:
    store = open_store(str(dataset))
    whole = store.read(SHARD)
    for bit in np.random.default_rng(2).choice(len(whole) * 8, 60, replace=False):
        flip(store, SHARD, int(bit))
        report = verify_dataset(store)
        assert found(report) == {("corrupt", SHARD)}, bit
        assert "shard 1: syn000003 … syn000005" in report.problems[0].detail
        store.write(SHARD, whole)
    assert verify_dataset(store).ok


@pytest.mark.parametrize("key", [RECORD, *TABLES[1:], *METADATA])
def test_a_flipped_bit_in_every_other_kind_of_object(dataset: Path, key: str) -> None:
    store = open_store(str(dataset))
    whole = store.read(key)
    for bit in np.random.default_rng(3).choice(len(whole) * 8, 12, replace=False):
        flip(store, key, int(bit))
        report = verify_dataset(store)
        if key in (RECORD, "dataset.json"):  # a sealed record says the same when only the white space differs
            assert {k for kind, k in found(report) if kind == "corrupt"} <= {key}
            assert ("corrupt", key) in found(report) or bytes(whole).split() == store.read(key).split()
        else:
            assert found(report) == {("corrupt", key)}, bit
        store.write(key, whole)


def test_a_changed_samples_table(dataset: Path) -> None:
    store = open_store(str(dataset))
    _, samples = tiny_plan()
    samples.assign(age=samples["age"] + 1).to_parquet(dataset / "samples.parquet", index=False)
    assert found(verify_dataset(store)) == {("corrupt", "samples.parquet")}


@pytest.mark.parametrize("left", [0, 1, 50, -1])
@pytest.mark.parametrize("key", [SHARD, RECORD, "manifest/subjects.parquet", "dataset.json"])
def test_a_truncated_object(dataset: Path, key: str, left: int) -> None:
    store = open_store(str(dataset))
    whole = store.read(key)
    store.write(key, whole[:left].rstrip(b"\n}"))
    assert ("corrupt", key) in found(verify_dataset(store))


def test_a_damaged_plan_leaves_nothing_to_compare_with(dataset: Path) -> None:
    store = open_store(str(dataset))
    flip(store, "plan.json", 4000)
    with pytest.raises(UserError, match=r"plan\.json is damaged"):
        verify_dataset(store)
    store.delete("plan.json")
    with pytest.raises(UserError, match="is not a brainsynth dataset"):
        verify_dataset(store)


def test_swapped_shards(dataset: Path) -> None:
    store = open_store(str(dataset))
    other = SHARD.replace("/c/1/", "/c/0/")
    first, second = store.read(other), store.read(SHARD)
    store.write(other, second)
    store.write(SHARD, first)
    report = verify_dataset(store)
    assert found(report) == {("swapped", other), ("swapped", SHARD)}
    assert f"swapped: {other}: it holds what belongs in {SHARD}; shard 0: syn000000 … syn000002" in report.summary()


def test_a_shard_that_holds_a_copy_of_another(dataset: Path) -> None:
    store = open_store(str(dataset))
    store.write(SHARD, store.read(SHARD.replace("/c/1/", "/c/0/")))
    assert found(verify_dataset(store)) == {("swapped", SHARD)}


def test_copies_of_objects_are_told_from_strangers(dataset: Path) -> None:
    store = open_store(str(dataset))
    store.write("dataset.zarr/t1w/c/1 (1)/0/0/0", store.read(SHARD))
    report = verify_dataset(store)
    assert found(report) == {("duplicated", "dataset.zarr/t1w/c/1 (1)/0/0/0")}
    assert f"a copy of {SHARD}" in report.summary()


def test_two_subjects_with_the_same_voxels(store: Store) -> None:
    plan, samples = tiny_plan()
    write_plan(store, plan, samples)
    commit(store, plan, samples, 0)
    commit(store, plan, samples, 2)
    arrays = np.stack([values(plan, row) for row in (3, 2, 5)])
    records = [describe_sample(samples["sample_id"][3 + i], 3 + i, [arrays[i]]) for i in range(3)]
    commit_shard(store, plan, plan.shard(1), [arrays], records, {})
    finalise(store, plan)
    report = verify_dataset(store)
    assert found(report) == {("duplicated", RECORD)}
    assert "syn000004 (row 4) has the voxels of row 2" in report.summary()


def test_swapped_records(dataset: Path) -> None:
    store = open_store(str(dataset))
    other = "commits/shard-000000.json"
    first, second = store.read(other), store.read(RECORD)
    store.write(other, second)
    store.write(RECORD, first)
    assert found(verify_dataset(store)) == {("corrupt", other), ("corrupt", RECORD)}


@pytest.mark.parametrize(
    "key",
    ["dataset.zarr/t1w/c/9/0/0/0", "dataset.zarr/flair/zarr.json", "commits/shard-000003.json", "notes.txt"],
)  # fmt: skip
def test_what_nothing_refers_to_is_unexpected(dataset: Path, key: str) -> None:
    store = open_store(str(dataset))
    store.write(key, b"x")
    assert found(verify_dataset(store)) == {("unexpected", key)}


@pytest.mark.parametrize(
    "key",
    ["dataset.zarr/t1w/c/1/0/0/.tmp-0123", "commits/.tmp-1", ".tmp-2", "attempts/shard-000001-all-0",
     "repairs/shard-000001.json"],
)  # fmt: skip
def test_what_a_dead_attempt_left_is_orphaned(dataset: Path, key: str) -> None:
    store = open_store(str(dataset))
    store.write(key, b"x")
    assert found(verify_dataset(store)) == {("orphaned", key)}


def test_an_unfinished_dataset(store: Store) -> None:
    plan, samples = tiny_plan()
    write_plan(store, plan, samples)
    commit(store, plan, samples, 0)
    assert found(verify_dataset(store)) == {
        ("missing", "commits/shard-000001.json"),
        ("missing", "commits/shard-000002.json"),
        ("missing", "dataset.json"),
    }


def test_while_it_is_made_an_attempt_is_not_called_dead(store: Store) -> None:
    plan, samples = tiny_plan()
    write_plan(store, plan, samples)
    commit(store, plan, samples, 0)
    Attempts(store, 1).begin()
    [note] = [problem for problem in verify_dataset(store).problems if problem.kind == "orphaned"]
    assert "at work" in note.detail
    assert garbage(store) == []  # what verify calls removable, gc removes; and no more


def test_every_problem_at_once(dataset: Path) -> None:
    store = open_store(str(dataset))
    flip(store, SHARD, 800)
    store.delete("commits/shard-000002.json")
    store.delete("participants.tsv")
    store.write("stray", b"")
    assert found(verify_dataset(store)) == {
        ("corrupt", SHARD),
        ("missing", "commits/shard-000002.json"),
        ("orphaned", "dataset.zarr/t1w/c/2/0/0/0"),
        ("missing", "participants.tsv"),
        ("unexpected", "stray"),
    }
