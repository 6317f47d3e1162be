"""The commit protocol: first committer wins, another plan is refused, only what is missing is made again."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brainsynth.config.schema import RuntimeConfig
from brainsynth.errors import UserError
from brainsynth.executors.dataset import dry_run, make_dataset
from brainsynth.manifest import SampleRecord, ShardManifest, describe_sample
from brainsynth.plan import Plan, ShardSpec
from brainsynth.storage.arrays import decode_shard, encode_shard, shard_key
from brainsynth.storage.commit import (
    SAMPLES_KEY,
    check_plan,
    commit_key,
    commit_shard,
    committed_shards,
    read_commit,
    read_plan,
    read_samples,
    write_plan,
)
from brainsynth.storage.filesystem import LocalStore, Store, local_folder, open_store
from brainsynth.storage.finalise import finalise
from brainsynth.storage.tables import read_table
from brainsynth.storage.verify import verify_dataset
from brainsynth.storage.work import ShardOutput, Work
from tests.storage.conftest import RACE_SHARDS, commit, flip, race, tiny_plan, values, write_dataset


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint8"])
def test_figures_of_a_sample_are_numpys_own(dtype: str) -> None:
    stored = np.random.default_rng(0).normal(60, 30, (40, 56, 31)).clip(0).astype(dtype)
    found, x = describe_sample("a", 0, [stored]), stored.astype(np.float32)
    assert found.voxel_sha256 == hashlib.sha256(stored.tobytes()).hexdigest()
    assert (found.minimum, found.maximum, found.mean, found.std, found.zero_fraction) == (
        float(x.min()), float(x.max()), float(x.mean()), float(x.std()), float((x == 0).mean()),
    )  # fmt: skip
    if dtype != "uint8":
        for bad in (np.nan, np.inf, -np.inf):
            stored[3, 4, 5] = bad
            assert describe_sample("a", 0, [stored]).reason == "not finite"


def test_the_store_contract(store: Store) -> None:
    assert list(store.list()) == []
    with pytest.raises(FileNotFoundError):
        store.read("a/b")
    store.delete("a/b")
    assert store.write_new("a/b", b"first")
    assert not store.write_new("a/b", b"second")
    assert store.read("a/b") == b"first"
    store.write("a/b", b"third!")
    store.write("c", b"")
    assert store.read("a/b") == b"third!"
    assert sorted(store.list()) == [("a/b", 6), ("c", 0)]
    assert list(store.list("a")) == [("a/b", 6)]
    assert list(store.list("nowhere")) == []
    store.delete("a/b")
    assert list(store.list()) == [("c", 0)]


def test_put_if_absent_has_one_winner(store: Store) -> None:
    barrier = threading.Barrier(8)
    won: list[int] = []

    def put(writer: int) -> None:
        barrier.wait()
        if store.write_new("key", bytes([writer]) * 1000):
            won.append(writer)

    threads = [threading.Thread(target=put, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("key") == bytes(won) * 1000
    assert [key for key, _ in store.list()] == ["key"]


@pytest.mark.parametrize("key", ["../outside", "a/../../outside", "/etc/outside"])
def test_a_key_cannot_leave_the_folder(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="leaves the folder"):
        open_store(str(tmp_path / "root")).write(key, b"x")


@pytest.mark.parametrize("way", ["write", "write_new"])
def test_an_unwritable_folder_is_a_users_mistake(tmp_path: Path, way: str) -> None:
    (tmp_path / "file").write_text("in the way")
    plan, samples = tiny_plan()
    with pytest.raises(UserError, match="dataset cannot be a folder: .*file is a file"):
        open_store(str(tmp_path / "file" / "dataset"))
    store = LocalStore(tmp_path / "file" / "dataset")
    with pytest.raises(UserError, match="cannot write .*; check the permissions and the free space"):
        getattr(store, way)("key", b"x")
    with pytest.raises(UserError, match="cannot write"):
        write_plan(store, plan, samples)
    assert (tmp_path / "file").read_text() == "in the way"


def test_an_unwritable_bucket_is_a_users_mistake(tmp_path: Path) -> None:
    from brainsynth.storage.filesystem import ObjectStore

    store = ObjectStore(tmp_path.as_uri())
    store.write("file", b"in the way")
    for way in (store.write, store.write_new):
        with pytest.raises(UserError, match="cannot write file://.*/file/key"):
            way("file/key", b"x")


def test_unknown_address_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match="cannot open nonsense://bucket"):
        open_store("nonsense://bucket/x")
    with pytest.raises(UserError, match="must be a folder that every worker reaches"):
        local_folder("memory:///x", "cohort")


def test_tables_keep_ids_as_text_and_gaps_as_missing(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text("sample_id\tage\tsex\n007\t20\tF\n008\tn/a\t\n")
    table = read_table(str(path), "table")
    assert list(table["sample_id"]) == ["007", "008"]
    assert pd.isna(table["age"][1])
    assert pd.isna(table["sex"][1])
    for name, told in (("nowhere.csv", "there is no table"), ("rows.xlsx", "must end in .csv, .tsv or .parquet")):
        with pytest.raises(UserError, match=told):
            read_table(str(tmp_path / name), "table")
    for name in ("empty.csv", "binary.csv", "broken.parquet"):
        (tmp_path / name).write_bytes(b"" if name == "empty.csv" else b"\xff\xfe\x00PAR1" * 9)
        with pytest.raises(UserError, match="cannot be read as a table"):
            read_table(str(tmp_path / name), "table")


def test_a_plan_is_written_once_and_read_back(store: Store) -> None:
    plan, samples = tiny_plan()
    assert not check_plan(store, plan)
    write_plan(store, plan, samples)
    before = {key: store.read(key) for key, _ in store.list()}
    assert set(before) == {"plan.json", "samples.parquet", "dataset.zarr/zarr.json", "dataset.zarr/t1w/zarr.json"}
    write_plan(store, plan, samples)
    assert {key: store.read(key) for key, _ in store.list()} == before
    assert check_plan(store, plan)
    assert read_plan(store) == plan
    pd.testing.assert_frame_equal(read_samples(store, plan), samples)


def test_another_plan_is_refused_and_the_differences_are_named(store: Store) -> None:
    write_plan(store, *tiny_plan())
    before = {key: store.read(key) for key, _ in store.list()}
    with pytest.raises(UserError) as caught:
        write_plan(store, *tiny_plan(rows=8, base_seed=5))
    told = str(caught.value)
    assert "holds another plan" in told
    assert "identity.base_seed: the folder has 0, this run asks for 5" in told
    assert "num_samples: the folder has 7, this run asks for 8" in told
    assert "samples_digest" in told
    assert "volume" not in told
    assert {key: store.read(key) for key, _ in store.list()} == before


def test_a_folder_with_something_else_is_refused(store: Store) -> None:
    store.write("thesis.docx", b"years of work")
    with pytest.raises(UserError, match=r"is not empty \(it holds thesis.docx\)"):
        write_plan(store, *tiny_plan())
    assert [key for key, _ in store.list()] == ["thesis.docx"]


@pytest.mark.parametrize("lost", ["samples.parquet", "dataset.zarr/zarr.json", "dataset.zarr/t1w/zarr.json"])
def test_an_attempt_that_died_while_it_wrote_the_plan_goes_on(store: Store, lost: str) -> None:
    plan, samples = tiny_plan()
    write_plan(store, plan, samples)
    store.delete(lost)
    write_plan(store, plan, samples)
    assert store.read(lost)
    pd.testing.assert_frame_equal(read_samples(store, plan), samples)


def test_an_attempt_that_died_before_its_plan_goes_on(tmp_path: Path) -> None:
    (tmp_path / ".tmp-0123").write_bytes(b"half a pl")
    plan, samples = tiny_plan()
    write_plan(open_store(str(tmp_path)), plan, samples)
    assert read_plan(open_store(str(tmp_path))) == plan


def test_a_damaged_plan_is_refused(store: Store) -> None:
    plan, samples = tiny_plan()
    write_plan(store, plan, samples)
    flip(store, "plan.json", 8 * 300)
    for action in (lambda: read_plan(store), lambda: write_plan(store, plan, samples)):
        with pytest.raises(UserError, match=r"plan.json is (damaged|not a valid Plan)"):
            action()


def test_a_damaged_samples_table_is_noticed_and_mended(store: Store) -> None:
    plan, samples = tiny_plan()
    write_plan(store, plan, samples)
    whole = store.read(SAMPLES_KEY)
    rng = np.random.default_rng(1)
    for bit in rng.choice(len(whole) * 8, 40, replace=False):
        flip(store, SAMPLES_KEY, int(bit))
        try:
            pd.testing.assert_frame_equal(read_samples(store, plan), samples)  # a bit that nothing depends on
        except UserError as error:
            assert "samples.parquet is damaged" in str(error)
        store.write(SAMPLES_KEY, whole)
    store.write(SAMPLES_KEY, whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        read_samples(store, plan)
    write_plan(store, plan, samples)
    pd.testing.assert_frame_equal(read_samples(store, plan), samples)


def test_a_shard_is_true_once_its_record_is_there(store: Store) -> None:
    plan, samples = tiny_plan()
    write_plan(store, plan, samples)
    assert committed_shards(store) == set()
    with pytest.raises(FileNotFoundError):
        read_commit(store, plan, 1)
    record = commit(store, plan, samples, 1, bad=[4])
    assert committed_shards(store) == {1}
    assert read_commit(store, plan, 1) == record
    assert [s.status for s in record.samples] == ["ok", "rejected", "ok"]
    (stored,) = record.objects
    data = store.read(stored.key)
    assert (stored.size_bytes, stored.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    decoded = decode_shard(plan, plan.arrays[0], plan.shard(1), data)
    np.testing.assert_array_equal(decoded[0], values(plan, 3))
    assert np.isnan(decoded[1]).all()


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_a_shard_of_nothing_but_rejects_is_committed(store: Store, dtype: str) -> None:
    plan, samples = tiny_plan(dtype=dtype)
    write_dataset(store, plan, samples, bad=[3, 4, 5])
    record = read_commit(store, plan, 1)
    assert [s.reason for s in record.samples] == ["reason 3", "reason 4", "reason 5"]
    assert store.read(record.objects[0].key)
    report = verify_dataset(store)
    assert report.ok, report.summary()
    assert (report.samples_ok, report.samples_rejected) == (4, 3)


def test_the_second_committer_gets_the_firsts_record(store: Store) -> None:
    plan, samples = tiny_plan()
    write_plan(store, plan, samples)
    first = commit(store, plan, samples, 0, noise=1)
    before = {key: store.read(key) for key, _ in store.list()}
    second = commit(store, plan, samples, 0, bad=[1], noise=2)
    assert second == first
    assert second.runtime["noise"] == 1
    assert {key: store.read(key) for key, _ in store.list()} == before


def test_an_orphan_object_is_described_as_it_is_stored(store: Store) -> None:
    plan, samples = tiny_plan()
    write_plan(store, plan, samples)
    orphan = np.stack([values(plan, 3, 1), np.full((4, 5, 6), np.nan, np.float16), values(plan, 5, 1)])
    data = encode_shard(plan, plan.arrays[0], orphan)
    store.write(shard_key(plan.arrays[0], 1), data)
    record = commit(store, plan, samples, 1, bad=[4, 5], noise=2)
    assert store.read(record.objects[0].key) == data
    assert record.objects[0].sha256 == hashlib.sha256(data).hexdigest()
    # Row 3 was made by both and the stored one counts, row 4 by neither, row 5 only by the one that died.
    assert [s.status for s in record.samples] == ["ok", "rejected", "ok"]
    assert record.samples[0] == describe_sample(samples["sample_id"][3], 3, [orphan[0]])
    assert record.samples[1].reason == "reason 4"
    for index in (0, 2):
        commit(store, plan, samples, index)
    finalise(store, plan)
    assert verify_dataset(store).ok


def test_wrong_arrays_are_refused_before_anything_is_written(store: Store) -> None:
    plan, samples = tiny_plan()
    write_plan(store, plan, samples)
    before = sorted(store.list())
    arrays = np.stack([values(plan, row) for row in range(3)])
    records = [SampleRecord(sample_id=samples["sample_id"][row], row=row, status="ok") for row in range(3)]
    for bad_arrays, bad_records, shard in (
        (arrays[:2], records[:2], plan.shard(0)),
        (arrays, records[:2], plan.shard(0)),
        (arrays, records, ShardSpec(index=0, start=1, stop=4)),
    ):
        with pytest.raises(ValueError, match="shard 0|not a shard of this plan"):
            commit_shard(store, plan, shard, [bad_arrays], bad_records, {})
    assert sorted(store.list()) == before


def test_a_record_of_another_plan_or_shard_is_refused(store: Store) -> None:
    plan, samples = tiny_plan()
    write_plan(store, plan, samples)
    commit(store, plan, samples, 0)
    store.write(commit_key(1), store.read(commit_key(0)))
    with pytest.raises(UserError, match="belongs to another plan or shard"):
        read_commit(store, plan, 1)
    with pytest.raises(UserError, match="belongs to another plan or shard"):
        read_commit(store, tiny_plan(base_seed=1)[0], 0)


def test_other_files_among_the_records_are_no_commits(store: Store) -> None:
    plan, samples = tiny_plan()
    write_plan(store, plan, samples)
    commit(store, plan, samples, 2)
    for name in ("shard-000001 (1).json", "shard-abc.json", ".tmp-1", "old/shard-000000.json", "shard-000001.json.bak"):
        store.write(f"commits/{name}", b"x")
    assert committed_shards(store) == {2}


def test_finalise_refuses_while_a_record_is_missing(store: Store) -> None:
    plan, samples = tiny_plan()
    write_plan(store, plan, samples)
    for index in (0, 2):
        commit(store, plan, samples, index)
    with pytest.raises(UserError, match=r"shard-000001.json is missing; run the same command again"):
        finalise(store, plan)
    with pytest.raises(FileNotFoundError):
        store.read("dataset.json")
    commit(store, plan, samples, 1)
    finalise(store, plan)
    assert verify_dataset(store).ok


def test_planned_is_ok_and_rejected_and_failed(store: Store) -> None:
    plan, samples = tiny_plan()
    write_plan(store, plan, samples)
    fates = ["ok", "rejected", "failed", "ok", "ok", "failed", "ok"]
    for index in range(plan.num_shards):
        shard = plan.shard(index)
        arrays = np.stack([values(plan, row) for row in range(shard.start, shard.stop)])
        records = [
            describe_sample(samples["sample_id"][row], row, [arrays[row - shard.start]])
            if fates[row] == "ok"
            else SampleRecord(sample_id=samples["sample_id"][row], row=row, status=fates[row], reason="why")  # type: ignore[arg-type]
            for row in range(shard.start, shard.stop)
        ]
        commit_shard(store, plan, shard, [arrays], records, {})
    manifest = finalise(store, plan)
    assert (manifest.num_samples, manifest.num_ok, manifest.num_rejected, manifest.num_failed) == (7, 4, 1, 2)
    rejects = store.read("rejects.tsv").decode().splitlines()
    assert [line.split("\t")[2] for line in rejects[1:]] == ["rejected", "failed", "failed"]
    report = verify_dataset(store)
    assert report.ok, report.summary()
    assert (report.samples_ok, report.samples_rejected, report.samples_failed) == (4, 1, 2)


def test_records_of_other_samples_are_refused(store: Store) -> None:
    plan, samples = tiny_plan()
    write_plan(store, plan, samples)
    renamed = samples.assign(sample_id=samples["sample_id"].to_numpy()[::-1])
    for index in range(plan.num_shards):
        commit(store, plan, renamed, index)
    with pytest.raises(UserError, match="do not list the planned samples in order"):
        finalise(store, plan)


def test_finalise_twice_is_the_same_and_sweeps_half_written_files(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_dataset(store, *tiny_plan(), bad=[4])
    before = {key: store.read(key) for key, _ in store.list()}
    for folder in ("commits", "dataset.zarr/t1w/c/1/0/0"):
        (tmp_path / folder / ".tmp-dead").write_bytes(b"half")
    finalise(store, tiny_plan()[0])
    assert {key: store.read(key) for key, _ in store.list()} == before


class Maker:
    """Makes the tiny volumes and notes which shards it was asked for."""

    def __init__(self, plan: Plan, samples: pd.DataFrame, asked: list[int]) -> None:
        self.plan, self.samples, self.asked = plan, samples, asked

    def make(self, shard: ShardSpec) -> ShardOutput:
        self.asked.append(shard.index)
        arrays = np.stack([values(self.plan, row) for row in range(shard.start, shard.stop)])
        rows = range(shard.start, shard.stop)
        return ShardOutput(
            [arrays], [describe_sample(self.samples["sample_id"][r], r, [arrays[r - shard.start]]) for r in rows]
        )


def tiny_work(root: Path, asked: list[int]) -> Work:
    plan, samples = tiny_plan(rows=14)
    return Work(str(root), plan, samples, Maker, {"plan": plan, "samples": samples, "asked": asked})


def test_resume_runs_exactly_what_is_missing(tmp_path: Path) -> None:
    asked: list[int] = []
    work = tiny_work(tmp_path / "dataset", asked)
    runtime = RuntimeConfig(workers=0)
    assert "0 already committed" in dry_run(work, runtime)
    assert not (tmp_path / "dataset").exists()
    whole = make_dataset(work, runtime)
    assert asked == [0, 1, 2, 3, 4]
    store, lost = work.store, [commit_key(1), commit_key(4), shard_key(work.plan.arrays[0], 4), "dataset.json"]
    untouched = {key: store.read(key) for key, _ in store.list("dataset.zarr")}
    for key in lost:
        store.delete(key)
    asked.clear()
    assert "3 already committed" in dry_run(work, runtime)
    assert make_dataset(work, runtime).shards_digest == whole.shards_digest
    assert asked == [1, 4]
    assert {key: store.read(key) for key, _ in store.list("dataset.zarr")} == untouched
    asked.clear()
    make_dataset(work, runtime)
    assert asked == []
    assert verify_dataset(store).ok


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_two_processes_race_for_the_same_shards(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    plan, samples = tiny_plan(rows=2 * RACE_SHARDS, samples_per_shard=2)
    root = str(tmp_path) if kind == "local" else str(request.getfixturevalue("s3_root"))
    store = open_store(root)
    write_plan(store, plan, samples)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=race, args=(root, noise, barrier, results)) for noise in (1, 2)]
    for worker in workers:
        worker.start()
    told: list[list[ShardManifest]] = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    stored = [read_commit(store, plan, index) for index in range(RACE_SHARDS)]
    assert told == [stored, stored]
    assert finalise(store, plan).num_ok == 2 * RACE_SHARDS
    report = verify_dataset(store)
    assert report.ok, report.summary()


def test_records_are_plain_json(store: Store) -> None:
    plan, samples = tiny_plan()
    write_plan(store, plan, samples)
    commit(store, plan, samples, 0)
    document = json.loads(store.read(commit_key(0)))
    assert set(document) == {"record", "schema", "sha256"}
    assert document["record"]["plan_fingerprint"] == plan.fingerprint
    assert [s["sample_id"] for s in document["record"]["samples"]] == ["syn000000", "syn000001", "syn000002"]
