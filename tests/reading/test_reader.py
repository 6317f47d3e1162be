"""The reader gives back what was committed, or an error: never zeros, never another's volume."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from brainsynth import open_dataset
from brainsynth.storage.filesystem import open_store
from tests.storage.conftest import flip, tiny_plan, values, write_dataset

REPO = Path(__file__).parents[2]
SHARD = "dataset.zarr/t1w/c/1/0/0/0"
OK_ROWS = [0, 1, 2, 3, 5, 6]


@pytest.mark.parametrize("address", ["{}", "file://{}"])
def test_samples_are_what_was_committed(dataset: Path, address: str) -> None:
    plan, _ = tiny_plan()
    opened = open_dataset(address.format(dataset))
    assert len(opened) == 6
    assert opened.sample_ids == [f"syn{row:06d}" for row in OK_ROWS]
    assert list(opened.rows) == OK_ROWS
    for index, row in enumerate(OK_ROWS):
        sample = opened[index]
        assert sample["image"].dtype == np.float32
        np.testing.assert_array_equal(sample["image"], values(plan, row).astype(np.float32))
        np.testing.assert_array_equal(sample["affine"], plan.volume.affine)
        assert (sample["sample_id"], sample["age"], sample["sex"]) == (f"syn{row:06d}", 20.0 + row, "FM"[row % 2])
    assert [s["sample_id"] for s in opened] == opened.sample_ids
    np.testing.assert_array_equal(opened.volumes([4, 0]), np.stack([opened.volume(4), opened.volume(0)]))


@pytest.mark.parametrize("dtype", ["float32", "uint16", "uint8"])
def test_other_stored_types_come_back_as_intensities(tmp_path: Path, dtype: str) -> None:
    plan, samples = tiny_plan(dtype=dtype)
    write_dataset(open_store(str(tmp_path)), plan, samples)
    image = open_dataset(str(tmp_path)).volume(3)
    np.testing.assert_allclose(image, plan.volume.dequantise(values(plan, 3)), atol=1e-7)
    assert 0.9 < image.max() <= 1.0


def test_the_table_has_physical_units_and_one_row_a_volume(dataset: Path) -> None:
    table = open_dataset(str(dataset)).table
    assert list(table.columns) == ["sample_id", "row", "age", "sex"]
    assert list(table["age"]) == [20.0 + row for row in OK_ROWS]
    assert list(table["row"]) == OK_ROWS


def test_index_errors(dataset: Path) -> None:
    opened = open_dataset(str(dataset))
    assert opened[-1]["sample_id"] == "syn000006"
    assert opened[np.int64(2)]["sample_id"] == "syn000002"
    for index in (6, -7, 1000):
        with pytest.raises(IndexError, match=f"index {index} of a dataset with 6 volumes"):
            opened[index]


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint16", "uint8"])
def test_a_lost_shard_is_an_error_and_never_zeros(tmp_path: Path, dtype: str) -> None:
    write_dataset(open_store(str(tmp_path)), *tiny_plan(dtype=dtype))
    (tmp_path / SHARD).unlink()
    opened = open_dataset(str(tmp_path))
    for row in (3, 4, 5):
        with pytest.raises(ValueError, match=f"the volume of row {row} is lost or damaged; run `brainsynth verify"):
            opened[row]
    assert opened[2]["image"].max() > 0.5
    assert opened[6]["image"].max() > 0.5


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_a_flipped_bit_is_an_error_or_harmless(tmp_path: Path, dtype: str) -> None:
    plan, samples = tiny_plan(dtype=dtype)
    store = open_store(str(tmp_path))
    write_dataset(store, plan, samples)
    whole = store.read(SHARD)
    for bit in np.random.default_rng(4).choice(len(whole) * 8, 60, replace=False):
        flip(store, SHARD, int(bit))
        refused = 0
        for row in (3, 4, 5):
            try:
                image = open_dataset(str(tmp_path)).volume(row)
            except ValueError:
                refused += 1
            else:  # the damage is in another sample's chunk
                np.testing.assert_allclose(image, plan.volume.dequantise(values(plan, row)), atol=1e-7)
        assert refused >= 1, bit
        store.write(SHARD, whole)


@pytest.mark.parametrize("left", [0, 10, -1])
def test_a_truncated_shard_is_an_error(dataset: Path, left: int) -> None:
    data = (dataset / SHARD).read_bytes()
    (dataset / SHARD).write_bytes(data[:left])
    opened = open_dataset(str(dataset))
    with pytest.raises(ValueError, match=".+"):
        opened.volumes([3, 4])


def test_a_folder_without_a_finished_dataset(tmp_path: Path, dataset: Path) -> None:
    (dataset / "dataset.json").unlink()
    for folder in (dataset, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="there is no finished dataset at"):
            open_dataset(str(folder))


@pytest.mark.parametrize("key", ["dataset.json", "participants.tsv"])
def test_a_damaged_manifest_is_an_error(dataset: Path, key: str) -> None:
    store = open_store(str(dataset))
    whole = store.read(key)
    expected = open_dataset(str(dataset))
    for bit in np.random.default_rng(5).choice(len(whole) * 8, 60, replace=False):
        flip(store, key, int(bit))
        try:
            opened = open_dataset(str(dataset))
        except ValueError as error:
            assert key in str(error)
        else:  # white space of the JSON
            assert key == "dataset.json"
            assert opened.manifest == expected.manifest
        store.write(key, whole)


def test_another_schema_version_is_named(dataset: Path) -> None:
    from brainsynth.records import digest

    record = {**json.loads((dataset / "dataset.json").read_text())["record"], "schema_version": 9}
    (dataset / "dataset.json").write_text(json.dumps({"record": record, "sha256": digest(record)}))
    with pytest.raises(ValueError, match="has schema version 9; this brainsynth reads version 1"):
        open_dataset(str(dataset))


def test_splits_of_a_prepared_cohort(prepared_cohort: Path) -> None:
    everything = open_dataset(str(prepared_cohort))
    train, validation = (open_dataset(str(prepared_cohort), split=name) for name in ("train", "validation"))
    assert len(train) > 0
    assert len(validation) > 0
    assert sorted([*train.sample_ids, *validation.sample_ids]) == sorted(everything.sample_ids)
    first = validation[0]
    same = everything[everything.sample_ids.index(first["sample_id"])]
    np.testing.assert_array_equal(first["image"], same["image"])
    assert first["age"] == same["age"]
    with pytest.raises(ValueError, match="has no subjects in the split 'test'; splits with subjects: "):
        open_dataset(str(prepared_cohort), split="test")


def test_a_missing_covariate_is_nan_or_empty(tmp_path: Path) -> None:
    from brainsynth.storage.commit import write_plan
    from brainsynth.storage.finalise import finalise
    from tests.storage.conftest import commit

    plan, samples = tiny_plan()
    from dataclasses import replace

    from brainsynth.plan import table_digest

    samples.loc[0, "age"] = np.nan
    samples["sex"] = samples["sex"].astype(object)
    samples.loc[1, "sex"] = None
    plan = replace(plan, samples_digest=table_digest(samples))
    store = open_store(str(tmp_path))
    write_plan(store, plan, samples)
    for index in range(plan.num_shards):
        commit(store, plan, samples, index)
    finalise(store, plan)
    opened = open_dataset(str(tmp_path))
    assert math.isnan(opened[0]["age"])
    assert opened[1]["sex"] == ""
    assert opened.table["sex"].isna().tolist() == [False, True, False, False, False, False, False]


def test_needs_only_zarr_and_numpy(dataset: Path) -> None:
    blocked = ["ray", "monai", "nibabel", "pandas", "pyarrow", "scipy", "pydantic", "torch", "obstore"]
    code = (
        f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
        f"import brainsynth\ndataset = brainsynth.open_dataset({str(dataset)!r})\n"
        "sample = dataset[2]\nprint(len(dataset), sample['sample_id'], float(sample['image'].sum()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = open_dataset(str(dataset))[2]
    assert done.stdout.split() == ["6", expected["sample_id"], str(float(expected["image"].sum()))]


def test_a_read_only_copy_elsewhere_reads_the_same(dataset: Path, tmp_path: Path) -> None:
    opened = open_dataset(str(dataset)).volumes()
    moved = tmp_path / "elsewhere"
    shutil.move(dataset, moved)
    np.testing.assert_array_equal(open_dataset(str(moved)).volumes(), opened)


@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_workers_of_a_dataloader(dataset: Path, start: str) -> None:
    from torch.utils.data import DataLoader

    opened = open_dataset(str(dataset))
    expected = opened.volumes()  # opens the array here, before the workers start
    loader = DataLoader(opened.torch(), batch_size=2, num_workers=2, multiprocessing_context=start, timeout=120)
    batches = list(loader)
    images = np.concatenate([batch["image"].numpy() for batch in batches])
    assert images.shape == (6, 1, 4, 5, 6)
    np.testing.assert_array_equal(images[:, 0], expected)
    assert [i for batch in batches for i in batch["sample_id"]] == opened.sample_ids
    assert batches[0]["affine"].shape == (2, 4, 4)
