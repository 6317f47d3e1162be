"""Every reader gives back the stored intensities, at the right place in the world, and nothing that is not committed."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import zarr
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, SpatialCrop

from brainsynth import open_dataset
from brainsynth.reading.monai import VolumeReader, monai_items
from brainsynth.reading.ray import ray_dataset
from brainsynth.reading.splits import fixed_split
from brainsynth.reading.stored_array import StoredArray
from brainsynth.reading.torch import ShardSampler, read_tensor
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.verify import verify_dataset
from tests.reading.conftest import OK_ROWS, SHAPE, commit, ids, plan_of, voxels, write

F32 = npt.NDArray[np.float32]


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint16", "uint8"])
def test_boxes_are_the_same_voxels_as_volumes(tmp_path: Path, dtype: str) -> None:
    plan, samples = plan_of(5, dtype, 2)
    write(str(tmp_path), plan, samples)
    opened = open_dataset(str(tmp_path))
    rng = np.random.default_rng(0)
    for _ in range(40):
        index = int(rng.integers(5))
        size = [int(rng.integers(1, n + 1)) for n in SHAPE]
        start = [int(rng.integers(0, n - s + 1)) for n, s in zip(SHAPE, size, strict=True)]
        box = tuple(slice(a, a + b) for a, b in zip(start, size, strict=True))
        expected = plan.volume.dequantise(voxels(plan, index))[box]
        np.testing.assert_array_equal(opened.patch(index, start, size), expected)
        np.testing.assert_allclose(read_tensor(opened, index, start, size).numpy(), expected, rtol=1e-6)
    for start, size in [((0, 0, 0), (25, 1, 1)), ((-1, 0, 0), (1, 1, 1)), ((0, 0, 0), (0, 1, 1)), ((0, 0), (1, 1))]:
        with pytest.raises(ValueError, match="does not lie in"):
            opened.patch(0, start, size)


def test_only_the_chunks_of_a_box_are_read(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_dataset(str(finished))
    opened.patch(0, (0, 0, 0), (1, 1, 1))  # the shard's index is known from here on
    real, read = os.pread, []
    monkeypatch.setattr(os, "pread", lambda file, size, at: read.append(size) or real(file, size, at))
    opened.patch(0, (3, 18, 3), (5, 1, 5))
    assert len(read) == 2  # a chunk and its checksum
    opened.patch(0, (3, 18, 3), (5, 3, 5))
    assert len(read) == 2 + 2 * 2


def test_another_layout_is_read_by_zarr(tmp_path: Path) -> None:
    plan, samples = plan_of(5, "float16", 2)
    write(str(tmp_path), plan, samples)
    path = tmp_path / "dataset.zarr" / "t1w"
    values = zarr.open_array(path, mode="r")[:]
    for shard in (0, 1, 2):
        (path / "c" / str(shard) / "0/0/0").unlink()
    (path / "zarr.json").unlink()
    rewritten = zarr.create_array(path, shape=values.shape, chunks=(1, *SHAPE), dtype="float16", fill_value=np.nan)
    rewritten[:] = values
    assert StoredArray(str(tmp_path), "t1w")._reader is None
    opened = open_dataset(str(tmp_path))
    np.testing.assert_array_equal(opened.patch(3, (1, 2, 3), (5, 30, 7)), values[3, 1:6, 2:32, 3:10].astype(np.float32))
    np.testing.assert_array_equal(opened.torch()[4]["image"][0], values[4].astype(np.float32))
    (path / "c/2/0/0/0").unlink()
    with pytest.raises(ValueError, match="the volume of row 2 is lost"):
        opened.volume(2)


def test_a_repaired_shard_is_seen_by_an_open_reader(tmp_path: Path) -> None:
    plan, samples = plan_of(4, "float16", 4)
    write(str(tmp_path), plan, samples)
    opened = open_dataset(str(tmp_path))
    expected = opened.volume(1)
    file = tmp_path / "dataset.zarr/t1w/c/0/0/0/0"
    whole = file.read_bytes()
    file.write_bytes(whole[:50] + whole[60:])
    with pytest.raises(ValueError, match="lost or damaged"):
        opened.volume(1)
    file.write_bytes(whole)
    np.testing.assert_array_equal(opened.volume(1), expected)


def test_torch_patches(finished: Path, intensities: F32) -> None:
    opened = open_dataset(str(finished))
    boxes = opened.torch(patch=(8, 8, 8), transform=lambda sample: sample | {"more": 1})
    torch.manual_seed(1)
    samples = boxes.__getitems__([3, 3, 20])
    assert len({tuple(sample["start"].tolist()) for sample in samples}) == 3
    for sample, index in zip(samples, [3, 3, 20], strict=True):
        x, y, z = sample["start"].tolist()
        assert sample["image"].shape == (1, 8, 8, 8)
        np.testing.assert_array_equal(sample["image"][0], intensities[index, x : x + 8, y : y + 8, z : z + 8])
        corner = opened.affine @ [x, y, z, 1]
        np.testing.assert_allclose(sample["affine"] @ torch.tensor([0, 0, 0, 1.0]).double(), corner)
        assert (sample["more"], sample["age"]) == (1, 30.0 + OK_ROWS[index] * 1.5)
    with pytest.raises(ValueError, match="does not lie in"):
        opened.torch(patch=(8, 8, 64))


def test_the_sampler_shuffles_shard_by_shard(finished: Path) -> None:
    opened = open_dataset(str(finished))
    sampler = ShardSampler(opened, window=2, seed=3)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(len(opened)))
    assert first == again != second
    assert len(set(opened.shards[first[:12]])) <= 2
    assert first[:12] != sorted(first[:12])
    parts = [list(ShardSampler(opened, 2, 3, num_replicas=4, rank=rank)) for rank in range(4)]
    assert [len(part) for part in parts] == [9, 9, 9, 9]
    assert set().union(*parts) == set(range(len(opened)))
    with pytest.raises(ValueError, match="one of 2 replicas"):
        ShardSampler(opened, num_replicas=2, rank=2)


def test_monai_has_the_affine(finished: Path, intensities: F32) -> None:
    opened = open_dataset(str(finished))
    sample = opened.monai()[4]
    image = sample["image"]
    assert isinstance(image, MetaTensor)
    assert (tuple(image.shape), image.dtype) == ((1, *SHAPE), torch.float32)
    np.testing.assert_array_equal(image[0], intensities[4])
    np.testing.assert_array_equal(image.affine, opened.affine)
    assert (sample["sample_id"], sample["sex"]) == ("syn000004", "F")
    torch.manual_seed(0)
    box = opened.monai(patch=(6, 7, 8))[4]["image"]
    start = np.linalg.solve(opened.affine[:3, :3], box.affine[:3, 3].numpy() - opened.affine[:3, 3]).round().astype(int)
    cropped = SpatialCrop(roi_start=start, roi_end=np.add(start, (6, 7, 8)))(image)
    np.testing.assert_array_equal(box, cropped)
    np.testing.assert_allclose(box.affine, cropped.affine)


def test_monai_reads_addresses(finished: Path) -> None:
    load = LoadImaged("image", reader=VolumeReader(), image_only=True)
    again = pickle.loads(pickle.dumps(load))  # noqa: S301
    assert again({"image": f"{finished}#syn000001"})["image"].shape == SHAPE
    with pytest.raises(RuntimeError, match="has no volume 'syn000007'"):
        load({"image": f"{finished}#syn000007"})  # the reject
    assert VolumeReader().verify_suffix("a#b")
    assert not VolumeReader().verify_suffix("scan.nii.gz")


def test_torchio_has_the_affine(finished: Path, intensities: F32) -> None:
    tio = pytest.importorskip("torchio", reason="torchio is not installed: `pip install brainsynth[readers]`")
    opened = open_dataset(str(finished), where="age > 60")
    subjects = opened.torchio()
    subject = subjects[0]
    assert isinstance(subjects, tio.SubjectsDataset)
    assert subject["sample_id"] == opened.sample_ids[0] == "syn000021"
    np.testing.assert_array_equal(subject["t1w"].data[0], intensities[20])
    np.testing.assert_array_equal(subject["t1w"].affine, opened.affine)
    assert subject["t1w"].orientation == ("R", "A", "S")
    resampled = tio.Resample(4)(subject)["t1w"]
    np.testing.assert_allclose(resampled.get_center(), subject["t1w"].get_center(), atol=2)


def test_xarray_is_lazy_and_labelled(finished: Path, intensities: F32, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dask", reason="xarray and dask are not installed: `pip install brainsynth[readers]`")
    pytest.importorskip("xarray", reason="xarray and dask are not installed: `pip install brainsynth[readers]`")
    opened = open_dataset(str(finished))
    volumes = opened.xarray()
    assert volumes.dims == ("subject", "x", "y", "z")
    np.testing.assert_array_equal(volumes.compute(), intensities)
    older = volumes[volumes["age"] > 60][:, 3:5, ::7, -1]
    np.testing.assert_array_equal(older.compute(), intensities[20:, 3:5, ::7, -1])
    slices = volumes.sel(z=-20.0, method="nearest")[2:4].compute()
    np.testing.assert_array_equal(slices, intensities[2:4, :, :, 5])
    assert volumes[3:3].compute().shape == (0, *SHAPE)
    assert volumes["subject"].values[20] == "syn000021"
    assert volumes["age"].attrs["units"] == "years"
    at = [float(volumes[name][2]) for name in "xyz"]
    np.testing.assert_allclose(at, (opened.affine @ [2, 2, 2, 1])[:3])


def test_ray_data_reads_every_volume_once(finished: Path, intensities: F32, ray_cluster: None) -> None:
    rows = ray_dataset(str(finished), where="sex == 'F'").take_all()
    wanted = {f"syn{row:06d}": place for place, row in enumerate(OK_ROWS) if row % 2 == 0}
    assert sorted(row["sample_id"] for row in rows) == sorted(wanted)
    for row in rows:
        np.testing.assert_array_equal(row["image"], intensities[wanted[row["sample_id"]]])
        assert row["sex"] == "F"
    box = ray_dataset(str(finished), patch=(4, 5, 6), where="age == 30").take_all()[0]
    x, y, z = box["start"]
    np.testing.assert_array_equal(box["image"], intensities[0, x : x + 4, y : y + 5, z : z + 6])


def test_splits_are_fixed_by_the_id(finished: Path) -> None:
    # For ever: whoever trained on `train` must not find its subjects in `test` after an update.
    known = {
        "x": "train",
        "syn000000": "train",
        "sub01": "validation",
        "syn000018": "validation",
        "syn000013": "test",
        "syn000022": "test",
    }
    assert {name: fixed_split(name) for name in known} == known
    found = [fixed_split(f"syn{i:06d}") for i in range(20_000)]
    shares = {name: found.count(name) / 20_000 for name in set(found)}
    assert shares == pytest.approx({"train": 0.8, "validation": 0.1, "test": 0.1}, abs=0.01)
    parts = {name: set(open_dataset(str(finished), split=name).sample_ids) for name in ("train", "validation", "test")}
    assert sorted(id_ for part in parts.values() for id_ in part) == ids(OK_ROWS)
    assert all(fixed_split(id_) == name for name, part in parts.items() for id_ in part)
    women = open_dataset(str(finished), split="train", where="sex == 'F'")
    assert set(women.sample_ids) < parts["train"]
    assert set(women.splits) == {"train"}


@pytest.mark.parametrize("where", ["local", "s3"])
def test_what_is_not_committed_is_not_seen(
    where: str, tmp_path: Path, intensities: F32, request: pytest.FixtureRequest
) -> None:
    uri = str(tmp_path / "growing") if where == "local" else request.getfixturevalue("s3_root")
    from brainsynth.storage.commit import write_plan
    from brainsynth.storage.finalise import finalise

    plan, samples = plan_of()
    store = open_store(uri)
    write_plan(store, plan, samples)
    assert len(open_dataset(uri, partial=True)) == 0
    for index in (0, 2):
        commit(store, plan, samples, index)
    commit(store, plan, samples, 3)
    store.delete("commits/shard-000003.json")  # as if its writer had died before the record
    with pytest.raises(FileNotFoundError, match="partial=True"):
        open_dataset(uri)
    opened = open_dataset(uri, partial=True)
    seen = [row for row in [*range(8), *range(16, 24)] if row in OK_ROWS]
    assert opened.sample_ids == ids(seen)
    np.testing.assert_array_equal(opened.volumes(), intensities[[OK_ROWS.index(row) for row in seen]])
    np.testing.assert_array_equal(opened.monai()[9]["image"][0], intensities[OK_ROWS.index(seen[9])])
    assert list(opened.table["age"]) == [30.0 + row * 1.5 for row in seen]
    for index in (1, 3, 4):
        commit(store, plan, samples, index)
    everything = open_dataset(uri, partial=True)
    finalise(store, plan)
    final = open_dataset(uri, partial=True)
    assert json.loads(store.read("dataset.json"))["record"]["shards_digest"] == final.manifest["shards_digest"]
    for name in ("sample_ids", "covariates", "splits", "units", "shape"):
        assert getattr(everything, name) == getattr(final, name)
    assert everything.table.equals(final.table)
    assert verify_dataset(store).ok


def test_readers_on_object_storage(s3_root: str, intensities: F32) -> None:
    write(s3_root, *plan_of())
    opened = open_dataset(s3_root, where="age >= 36 and sex == 'F'")
    index = [place for place, row in enumerate(OK_ROWS) if row >= 4 and row % 2 == 0]
    np.testing.assert_array_equal(opened.volumes([0, -1]), intensities[[index[0], index[-1]]])
    batch = opened.torch(patch=(5, 6, 7)).__getitems__(list(range(len(opened))))
    for place, sample in zip(index, batch, strict=True):
        x, y, z = sample["start"].tolist()
        np.testing.assert_array_equal(sample["image"][0], intensities[place, x : x + 5, y : y + 6, z : z + 7])
    load: Any = Compose([LoadImaged("image", reader=VolumeReader(), image_only=True), EnsureChannelFirstd("image")])
    np.testing.assert_array_equal(load(monai_items(opened)[1])["image"][0], intensities[index[1]])
    if __import__("importlib").util.find_spec("torchio"):
        np.testing.assert_array_equal(opened.torchio()[2]["t1w"].data[0], intensities[index[2]])
