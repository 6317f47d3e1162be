"""What is damaged is re-planned row by row, what is whole stays, what is left over goes, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from brainsynth.config.schema import RuntimeConfig
from brainsynth.errors import UserError
from brainsynth.executors.dataset import make_dataset
from brainsynth.manifest import SampleRecord, describe_sample
from brainsynth.plan import Plan, ShardSpec
from brainsynth.storage.arrays import shard_key
from brainsynth.storage.commit import commit_key, read_commit, read_plan, write_plan
from brainsynth.storage.filesystem import Store, open_store
from brainsynth.storage.repair import garbage, lost_summary, repair, ticket_key
from brainsynth.storage.verify import verify_dataset
from brainsynth.storage.work import ShardOutput, ShardRunner, Work
from tests.storage.conftest import commit, flip, mismatched, stored_rows, tiny_plan, write_dataset

LOCAL = RuntimeConfig(workers=0)


class Maker:
    """Makes the tiny volumes; notes which rows it was asked for, and fails as it is told to."""

    def __init__(self, plan: Plan, samples: pd.DataFrame, asked: list[range], fate: Callable[[range], None]) -> None:
        self.plan, self.samples, self.asked, self.fate = plan, samples, asked, fate

    def make(self, shard: ShardSpec) -> ShardOutput:
        rows = range(shard.start, shard.stop)
        self.asked.append(rows)
        self.fate(rows)
        arrays, ids = stored_rows(self.plan, rows), self.samples["sample_id"]
        return ShardOutput(
            arrays, [describe_sample(ids[r], r, [a[r - rows[0]] for a in arrays], plan=self.plan) for r in rows]
        )


def work(
    root: str, asked: list[range], fate: Callable[[range], None] = lambda rows: None, labels: bool = False
) -> Work:
    plan, samples = tiny_plan(rows=12, samples_per_shard=4, labels=labels)
    return Work(root, plan, samples, Maker, {"plan": plan, "samples": samples, "asked": asked, "fate": fate})


@pytest.fixture(params=[False, True], ids=["images", "images and labels"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Twelve rows in three shards, made by the line itself."""
    make_dataset(work(str(tmp_path / "dataset"), [], labels=request.param), LOCAL)
    return open_store(str(tmp_path / "dataset"))


def has_labels(store: Store) -> bool:
    return any(key.startswith("dataset.zarr/dseg/") for key, _ in store.list("dataset.zarr"))


def again(store: Store) -> list[range]:
    """The same command again; returns what was made."""
    asked: list[range] = []
    make_dataset(work(store.uri, asked, labels=has_labels(store)), LOCAL)
    assert not has_labels(store) or mismatched(store) == []
    return asked


def mend(store: Store, **options: Any) -> list[range]:
    """Repair, then the same command; the dataset must be what it was."""
    repair(store, verify_dataset(store), **options)
    with pytest.raises(FileNotFoundError):
        store.read("dataset.json")
    asked = again(store)
    assert verify_dataset(store).ok, verify_dataset(store).summary()
    assert not garbage(store)
    return asked


def contents(store: Store) -> dict[str, bytes]:
    """All objects but the commit records, which say when and by whom."""
    return {key: store.read(key) for key, _ in store.list() if not key.startswith(("commits", "manifest/shards"))}


def test_only_the_rows_that_a_bit_hit_are_made_again(made: Store) -> None:
    before = contents(made)
    before.pop("dataset.json")
    key = "dataset.zarr/t1w/c/1/0/0/0"
    flip(made, key, 8 * 100)
    report = verify_dataset(made)
    (problem,) = report.problems
    assert problem.rows == (4,)
    assert "rows 4 cannot be decoded" in problem.detail
    lost = repair(made, report)
    assert lost == {1: [4]}
    assert "re-planned: 1 rows in 1 shards" in lost_summary(lost)
    assert "shard 1: rows 4" in lost_summary(lost)
    assert again(made) == [range(4, 5)]
    after = contents(made)
    assert {k: after[k] for k in before} == before
    assert verify_dataset(made).ok
    assert read_commit(made, read_plan(made), 1).runtime["rows_remade"] == 1


@pytest.mark.parametrize("damage", ["delete", "truncate", "empty", "swap"])
def test_a_lost_object_is_made_again_whole(made: Store, damage: str) -> None:
    before, key, other = contents(made), "dataset.zarr/t1w/c/1/0/0/0", "dataset.zarr/t1w/c/2/0/0/0"
    whole = made.read(key)
    if damage == "delete":
        made.delete(key)
    elif damage == "swap":
        made.write(key, made.read(other))
        made.write(other, whole)
    else:
        made.write(key, whole[: len(whole) // 2] if damage == "truncate" else b"")
    expected = {"swap": [range(4, 8), range(8, 12)]}.get(damage, [range(4, 8)])
    assert mend(made) == expected
    after = contents(made)
    assert {k for k in before if before[k] != after[k]} <= {"dataset.json"}


@pytest.mark.parametrize("damage", ["delete", "flip"])
def test_a_lost_record_adopts_what_is_stored(made: Store, damage: str) -> None:
    before = made.read("dataset.zarr/t1w/c/0/0/0/0")
    made.delete(commit_key(0)) if damage == "delete" else flip(made, commit_key(0), 4000)
    assert mend(made) == [range(4)]
    assert made.read("dataset.zarr/t1w/c/0/0/0/0") == before


@pytest.mark.parametrize("key", ["dataset.zarr/zarr.json", "dataset.zarr/t1w/zarr.json", "participants.tsv",
                                 "manifest/subjects.parquet", "samples.parquet"])  # fmt: skip
def test_tables_and_metadata_are_written_again(made: Store, key: str) -> None:
    before = made.read(key)
    flip(made, key, 8 * 50)
    assert mend(made) == []
    assert made.read(key) == before


def test_a_lost_plan_comes_back_with_the_same_command(made: Store) -> None:
    before = made.read("plan.json")
    made.delete("plan.json")
    assert again(made) == []
    assert made.read("plan.json") == before
    made.delete("plan.json")
    plan, samples = tiny_plan(rows=12, samples_per_shard=4, base_seed=1)
    with pytest.raises(UserError, match=r"has no plan\.json"):
        write_plan(made, plan, samples)


def test_failed_rows_are_tried_again_only_when_asked(tmp_path: Path) -> None:
    def poison(rows: range) -> None:
        if 5 in rows or 6 in rows:
            raise RuntimeError("the accelerator was in the wrong mood")

    root = str(tmp_path / "dataset")
    make_dataset(work(root, [], poison), LOCAL)
    store = open_store(root)
    report = verify_dataset(store)
    assert report.ok
    assert report.samples_failed == 2
    assert repair(store, report) == {}
    assert again(store) == []
    assert mend(store, failed=True) == [range(5, 6), range(6, 7)]
    assert verify_dataset(store).samples_ok == 12


def test_a_repair_that_died_half_way_goes_on(made: Store) -> None:
    """After each of its steps."""
    before = contents(made)
    key = "dataset.zarr/t1w/c/1/0/0/0"
    for survive in range(1, 15):
        flip(made, key, 8 * 100)
        mortal = Mortal(made, survive)
        try:
            repair(mortal, verify_dataset(made))
            finished = True
        except KeyboardInterrupt:
            finished = False
        repair(made, verify_dataset(made))
        again(made)
        for stray in garbage(made):
            made.delete(stray)
        assert verify_dataset(made).ok
        after = contents(made)
        assert {k for k in before | after if before.get(k) != after.get(k)} <= {"dataset.json"}
        if finished:
            return
    raise AssertionError("it never finished")


class Mortal:
    """A store whose user dies after so many changes."""

    def __init__(self, store: Store, changes: int) -> None:
        self.store, self.left, self.uri = store, changes, store.uri
        self.read, self.list = store.read, store.list

    def _die(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def write(self, key: str, data: bytes) -> None:
        self._die()
        self.store.write(key, data)

    def write_new(self, key: str, data: bytes) -> bool:
        self._die()
        return self.store.write_new(key, data)

    def delete(self, key: str) -> None:
        self._die()
        self.store.delete(key)


def test_a_damaged_ticket_is_not_trusted(made: Store) -> None:
    key = "dataset.zarr/t1w/c/1/0/0/0"
    for victim in (ticket_key(1), "repairs/shard-000001.t1w"):
        flip(made, key, 8 * 100)
        repair(made, verify_dataset(made))
        flip(made, victim, 4000)
        assert again(made) == [range(4, 8)]
        assert verify_dataset(made).ok


def test_garbage_is_what_no_record_can_want(store: Store) -> None:
    plan, samples = tiny_plan()
    write_plan(store, plan, samples)
    commit(store, plan, samples, 0)
    mine = ["dataset.zarr/t1w/c/0 copy/0/0/0", "attempts/shard-000000-all-1", "repairs/shard-000000.json",
            "commits/shard-000009.json"]  # fmt: skip
    maybe = [shard_key(plan.arrays[0], 1), "attempts/shard-000001-all-1", "commits/.tmp-1", ".tmp-2"]
    yours = ["notes.txt", "thesis/chapter-1.md"]
    for key in [*mine, *maybe, *yours]:
        store.write(key, b"x")
    assert sorted(garbage(store)) == sorted(mine)
    named = {p.key for p in verify_dataset(store).problems if p.detail.endswith("; `brainsynth gc` removes it")}
    assert named == set(mine)  # what verify calls removable, gc removes; and no more
    for key in garbage(store):
        store.delete(key)
    for index in (1, 2):
        commit(store, plan, samples, index)
    assert sorted(garbage(store)) == sorted(set(maybe) - {shard_key(plan.arrays[0], 1)})


def test_an_object_of_other_volumes_is_no_attempt(store: Store) -> None:
    plan, samples = tiny_plan()
    write_dataset(store, plan, samples)
    first, second = (shard_key(plan.arrays[0], index) for index in (0, 1))
    whole = store.read(first)
    for wrong in (store.read(second), b"", b"rubbish", whole[:-5]):
        store.write(first, wrong)
        store.delete(commit_key(0))
        record = commit(store, plan, samples, 0)
        assert store.read(first) == whole
        assert all(sample.status == "ok" for sample in record.samples)


def test_a_committed_object_is_never_replaced(store: Store) -> None:
    plan, samples = tiny_plan()
    write_dataset(store, plan, samples)
    key = shard_key(plan.arrays[0], 0)
    store.write(key, b"damaged after it was committed")
    before = read_commit(store, plan, 0)
    assert commit(store, plan, samples, 0) == before
    assert store.read(key) == b"damaged after it was committed"


class Fates:
    """Rows that always fail, in one way or another."""

    def __init__(self, poison: dict[int, type[Exception]]) -> None:
        self.poison, self.tries = poison, dict.fromkeys(poison, 0)

    def __call__(self, rows: range) -> None:
        for row in set(rows) & set(self.poison):
            self.tries[row] += 1
            raise self.poison[row](f"row {row} is poison")


def test_a_poison_row_is_set_aside_and_its_neighbours_are_made(tmp_path: Path) -> None:
    fates = Fates({1: RuntimeError, 6: MemoryError})
    manifest = make_dataset(work(str(tmp_path / "dataset"), [], fates), LOCAL)
    assert (manifest.num_ok, manifest.num_failed) == (10, 2)
    table = pd.read_parquet(tmp_path / "dataset" / "manifest" / "subjects.parquet")
    reasons = table.loc[table["status"] == "failed", "reason"].tolist()
    assert reasons == ["RuntimeError: row 1 is poison", "MemoryError: row 6 is poison"]
    assert fates.tries == {1: 4, 6: 4}  # once in its shard, three times alone
    assert verify_dataset(open_store(str(tmp_path / "dataset"))).ok


def test_a_row_that_kills_its_worker_is_found_out(tmp_path: Path) -> None:
    class Death(BaseException):
        """What no handler catches: the process is gone."""

    def fate(rows: range) -> None:
        if 6 in rows:
            raise Death

    asked: list[range] = []
    task = work(str(tmp_path / "dataset"), asked, fate)
    write_plan(task.store, task.plan, task.samples)
    deaths = 0
    while True:
        try:
            result = ShardRunner(task.root, task.build_maker, task.arguments)(task.plan.shard(1))
            break
        except Death:
            deaths += 1
    assert deaths == 8  # three with the whole shard, five with the row
    assert (result.ok, result.failed) == (3, 1)
    assert result.reason == "the worker died 5 times while it made this row"
    assert not list(task.store.list("attempts"))


def test_an_error_is_no_death(tmp_path: Path) -> None:
    def fate(rows: range) -> None:
        raise UserError("the bundle changed")

    task = work(str(tmp_path / "dataset"), [], fate)
    write_plan(task.store, task.plan, task.samples)
    for _ in range(5):
        with pytest.raises(UserError, match="the bundle changed"):
            ShardRunner(task.root, task.build_maker, task.arguments)(task.plan.shard(0))
    assert not list(task.store.list("attempts"))
    assert not list(task.store.list("commits"))


def test_when_every_row_fails_the_run_stops_and_says_why(tmp_path: Path) -> None:
    def fate(rows: range) -> None:
        raise RuntimeError("no kernel image is available")

    with pytest.raises(UserError, match=r"every row so far failed.*no kernel image is available.*--repair --failed"):
        make_dataset(work(str(tmp_path / "dataset"), [], fate), LOCAL)
    store = open_store(str(tmp_path / "dataset"))
    repair(store, verify_dataset(store), failed=True)
    again(store)
    assert verify_dataset(store).samples_ok == 12


def test_the_books_must_balance(made: Store) -> None:
    plan, samples = tiny_plan(rows=12, samples_per_shard=4, labels=has_labels(made))
    made.delete(commit_key(2))
    short = [SampleRecord(sample_id=samples["sample_id"][8], row=8, status="failed", reason="why")]
    from brainsynth.storage.commit import commit_shard

    with pytest.raises(ValueError, match="1 records"):
        commit_shard(made, plan, plan.shard(2), stored_rows(plan, range(8, 12)), short, {})
