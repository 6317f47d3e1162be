"""A dataset of images and label maps: the pair is committed, verified, repaired and read as one, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brainsynth import open_dataset
from brainsynth.config.schema import RuntimeConfig
from brainsynth.executors.dataset import make_dataset
from brainsynth.labels import LOST
from brainsynth.manifest import SampleRecord, describe_sample
from brainsynth.plan import Plan
from brainsynth.records import seal, unseal
from brainsynth.storage.arrays import encode_shard, shard_key
from brainsynth.storage.commit import commit_key, commit_shard, read_commit, write_plan
from brainsynth.storage.filesystem import Store, open_store
from brainsynth.storage.finalise import finalise
from brainsynth.storage.repair import garbage, repair
from brainsynth.storage.verify import verify_dataset
from tests.storage.conftest import BANDS, bands, commit, flip, mismatched, stored_rows, tiny_plan, values, write_dataset
from tests.storage.test_repair import work

LABELS, IMAGES = "dataset.zarr/dseg/c/1/0/0/0", "dataset.zarr/t1w/c/1/0/0/0"
LOCAL = RuntimeConfig(workers=0)


@pytest.fixture
def pairs(tmp_path: Path) -> Store:
    """Twelve rows in three shards."""
    make_dataset(work(str(tmp_path / "dataset"), [], labels=True), LOCAL)
    return open_store(str(tmp_path / "dataset"))


def plan_of(labels: bool = True, rows: int = 12) -> tuple[Plan, pd.DataFrame]:
    return tiny_plan(rows=rows, samples_per_shard=4, labels=labels)


def test_both_arrays_are_there_with_their_table(store: Store) -> None:
    plan, samples = tiny_plan(labels=True)
    write_dataset(store, plan, samples, bad=[4])
    report = verify_dataset(store)
    assert report.ok, report.summary()
    assert report.size_bytes == sum(size for key, size in store.list() if "/c/" in key)
    assert mismatched(store) == []
    assert store.read("dseg.tsv") == BANDS.tsv()
    metadata = json.loads(store.read("dataset.zarr/dseg/zarr.json"))
    assert (metadata["data_type"], metadata["fill_value"]) == ("uint8", 255)
    assert [one["name"] for one in metadata["attributes"]["brainsynth"]["labels"]["labels"]] == [
        "band 1", "band 2", "band 3",
    ]  # fmt: skip
    assert json.loads(store.read("dataset.json"))["record"]["labels"]["source"] == "bands of intensity"
    described = json.loads(store.read("participants.json"))["label_volume_band_2"]
    assert described == {"Description": "Volume of band 2, its voxels in the label map counted", "Units": "ml"}


def test_volumes_are_counted_into_the_tables(pairs: Store, tmp_path: Path) -> None:
    plan, _ = plan_of()
    table = pd.read_parquet(tmp_path / "dataset" / "manifest" / "subjects.parquet")
    people = pd.read_csv(tmp_path / "dataset" / "participants.tsv", sep="\t")
    for row in range(12):
        counts = np.bincount(bands(plan, values(plan, row)).reshape(-1), minlength=4)
        for index in (1, 2, 3):
            expected = pytest.approx(counts[index] * 0.006)
            assert table[f"label_volume_band_{index}"][row] == expected
            assert people[f"label_volume_band_{index}"][row] == expected


def test_a_dataset_without_labels_is_what_it_was(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "bare"))
    write_dataset(store, *tiny_plan(), bad=[4])
    text = b"".join(store.read(key) for key, _ in store.list() if key.endswith((".json", ".tsv", ".md")))
    assert not [key for key, _ in store.list() if "dseg" in key]
    for word in (b"label", b"dseg", b'"fill"'):
        assert word not in text


@pytest.mark.parametrize("damage", ["delete", "truncate", "empty", "flip", "swap", "copy of another", "the images"])
def test_a_label_map_that_is_not_its_images_is_named_and_made_again(pairs: Store, damage: str) -> None:
    before = {key: pairs.read(key) for key, _ in pairs.list("dataset.zarr")}
    other, whole = LABELS.replace("/c/1/", "/c/2/"), pairs.read(LABELS)
    if damage == "delete":
        pairs.delete(LABELS)
    elif damage == "flip":
        flip(pairs, LABELS, 8 * 40)
    elif damage == "swap":
        pairs.write(LABELS, pairs.read(other))
        pairs.write(other, whole)
    else:
        wrong = {"truncate": whole[: len(whole) // 2], "empty": b"", "copy of another": pairs.read(other)}
        pairs.write(LABELS, wrong.get(damage, pairs.read(IMAGES)))
    report = verify_dataset(pairs)
    kind = {"delete": "missing", "swap": "swapped", "copy of another": "swapped", "the images": "swapped"}
    assert (kind.get(damage, "corrupt"), LABELS) in {(p.kind, p.key) for p in report.problems}
    lost = repair(pairs, report)
    assert set(lost) == ({1, 2} if damage == "swap" else {1})
    assert damage != "flip" or 1 <= len(lost[1]) < 4, "the rows that the bit did not reach are kept, in both arrays"
    asked: list[range] = []
    make_dataset(work(pairs.uri, asked, labels=True), LOCAL)
    assert sum(map(len, asked)) == sum(map(len, lost.values()))
    assert {key: pairs.read(key) for key, _ in pairs.list("dataset.zarr")} == before
    assert verify_dataset(pairs).ok
    assert mismatched(pairs) == []
    assert garbage(pairs) == []


def test_lost_labels_are_an_error_and_never_background(pairs: Store) -> None:
    pairs.delete(LABELS)
    dataset = open_dataset(pairs.uri)
    assert dataset.volume(4).shape == (4, 5, 6)
    for read in (lambda: dataset[4], lambda: dataset.label_map(4), lambda: dataset.torch(patch=2)[4]):
        with pytest.raises(ValueError, match="the label map of row 4 is lost or damaged"):
            read()
    assert dataset[0]["labels"].any()


def test_a_shard_of_the_value_for_lost_data_is_no_label_map(pairs: Store) -> None:
    """Whole and valid by its checksums, as what a worker writes for a row that it gave up."""
    plan, _ = plan_of()
    labels = stored_rows(plan, range(4, 8))[1]
    labels[1] = LOST
    pairs.write(LABELS, encode_shard(plan, plan.arrays[1], labels))
    dataset = open_dataset(pairs.uri)
    assert dataset.label_map(4).any()
    with pytest.raises(ValueError, match=r"the label map of row 5 is lost or damaged.*it holds no volume"):
        dataset.label_map(5)
    assert ("corrupt", LABELS) in {(p.kind, p.key) for p in verify_dataset(pairs).problems}


def test_a_row_that_is_set_aside_has_neither(tmp_path: Path) -> None:
    def poison(rows: range) -> None:
        if 5 in rows:
            raise RuntimeError("poison")

    make_dataset(work(str(tmp_path / "dataset"), [], poison, labels=True), LOCAL)
    store = open_store(str(tmp_path / "dataset"))
    report = verify_dataset(store)
    assert (report.ok, report.samples_failed) == (True, 1)
    assert mismatched(store) == []  # row 5 holds 255 throughout
    dataset = open_dataset(store.uri)
    assert len(dataset) == 11
    assert set(dataset.rows) == set(range(12)) - {5}
    assert not dataset.label_volumes.isna().any(axis=None)
    subjects = pd.read_parquet(tmp_path / "dataset" / "manifest" / "subjects.parquet")
    assert np.isnan(subjects["label_volume_band_1"][5])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda labels: np.where(labels == 3, LOST, labels), "label map: 255 marks lost data and cannot be a label"),
        (lambda labels: np.where(labels == 3, 77, labels), "label map: the label table lacks 77"),
        (lambda labels: np.zeros_like(labels), "label map: all background"),
    ],
)
def test_a_label_map_that_cannot_be_one_is_a_reject(
    store: Store, spoil: Callable[[np.ndarray], np.ndarray], reason: str
) -> None:
    plan, samples = plan_of(rows=4)
    write_plan(store, plan, samples)
    images, labels = stored_rows(plan, range(4))
    labels[2] = spoil(labels[2])
    records = [describe_sample(samples["sample_id"][r], r, [images[r], labels[r]], plan=plan) for r in range(4)]
    commit_shard(store, plan, plan.shard(0), [images, labels], records, {})
    finalise(store, plan)
    assert [r.reason for r in read_commit(store, plan, 0).samples] == ["", "", reason, ""]
    assert verify_dataset(store).ok
    assert mismatched(store) == []


@pytest.mark.parametrize("died_after", ["images", "labels", "both"])
@pytest.mark.parametrize("theirs", ["the same", "rounded otherwise", "another shard's", "rubbish"])
def test_objects_of_an_attempt_that_died_are_adopted_or_replaced(store: Store, died_after: str, theirs: str) -> None:
    plan, samples = plan_of()
    write_plan(store, plan, samples)
    rows = range(8, 12) if theirs == "another shard's" else range(4, 8)
    left = stored_rows(plan, rows, noise=1 if theirs == "rounded otherwise" else 0)
    for spec, values_of_it, key in zip(plan.arrays, left, (IMAGES, LABELS), strict=True):
        if died_after in ("both", "images" if key == IMAGES else "labels"):
            store.write(key, b"rubbish" if theirs == "rubbish" else encode_shard(plan, spec, values_of_it))
    for index in range(3):
        commit(store, plan, samples, index)
    finalise(store, plan)
    report = verify_dataset(store)
    assert report.ok, report.summary()  # volumes by counting are those of what is stored, too
    assert report.samples_ok == 12
    images = open_dataset(store.uri).volumes() if "://" not in store.uri else None
    if theirs != "rounded otherwise" or died_after == "both":
        assert mismatched(store) == []
    elif images is not None:  # it is the label map of the same volume: where rounding crosses a band
        dataset = open_dataset(store.uri)
        for index in range(4, 8):
            stored, own = dataset.label_map(index), bands(plan, dataset.stored(index))
            assert (stored != own).mean() < 0.02


def test_attempts_that_gave_up_other_rows_leave_a_reject_and_no_stranger(store: Store) -> None:
    """An image from one attempt and a label map of 255 from another are no pair."""
    plan, samples = plan_of(rows=4)
    write_plan(store, plan, samples)
    images, _ = stored_rows(plan, range(4))
    images[1] = np.nan
    store.write(shard_key(plan.arrays[0], 0), encode_shard(plan, plan.arrays[0], images))
    record = commit(store, plan, samples, 0, bad=[2])
    assert [s.status for s in record.samples] == ["ok", "rejected", "rejected", "ok"]
    finalise(store, plan)
    report = verify_dataset(store)
    assert report.ok, report.summary()
    assert report.samples_ok == 2


def test_a_volume_that_was_not_counted_is_found(pairs: Store) -> None:
    plan, _ = plan_of()
    record = read_commit(pairs, plan, 1)
    sample = record.samples[2]
    sample.extra["label_volume_band_2"] = 1.0
    pairs.write(commit_key(1), seal(record))
    problems = [p for p in verify_dataset(pairs).problems if p.shard == 1]
    assert [p.detail for p in problems] == ["label_volume_band_2 of syn000006 is not that of its label map"]
    assert repair(pairs, verify_dataset(pairs)) == {1: [6]}


def test_what_is_committed_so_far_is_read_in_pairs(store: Store) -> None:
    if "://" in store.uri:
        pytest.skip("the snapshot's rows come from the records, wherever they lie")
    plan, samples = plan_of()
    write_plan(store, plan, samples)
    commit(store, plan, samples, 2)
    images, _ = stored_rows(plan, range(4))
    store.write(shard_key(plan.arrays[0], 0), encode_shard(plan, plan.arrays[0], images))  # one that is at work
    dataset = open_dataset(store.uri, partial=True)
    assert dataset.rows.tolist() == [8, 9, 10, 11]
    for index, row in enumerate(range(8, 12)):
        np.testing.assert_array_equal(dataset[index]["labels"], bands(plan, values(plan, row)))
    assert dataset.label_volumes.shape == (4, 3)
    assert unseal(Plan, store.read("plan.json"), "plan").labels == BANDS


def test_the_repair_ticket_keeps_both(pairs: Store) -> None:
    flip(pairs, IMAGES, 8 * 100)
    repair(pairs, verify_dataset(pairs))
    kept = {key for key, _ in pairs.list("repairs")}
    assert kept == {"repairs/shard-000001.json", "repairs/shard-000001.t1w", "repairs/shard-000001.dseg"}
    flip(pairs, "repairs/shard-000001.dseg", 300)
    asked: list[range] = []
    make_dataset(work(pairs.uri, asked, labels=True), LOCAL)
    assert asked == [range(4, 8)]  # a ticket of which one array is damaged is worth nothing
    assert verify_dataset(pairs).ok
    assert mismatched(pairs) == []


def test_a_reject_says_nothing_of_volumes() -> None:
    plan, _ = plan_of(rows=4)
    (image,), (labels,) = stored_rows(plan, [0])
    constant = describe_sample("a", 0, [np.zeros_like(image), labels], plan=plan)
    assert (constant.reason, constant.extra) == ("constant", {})
    assert isinstance(constant, SampleRecord)
