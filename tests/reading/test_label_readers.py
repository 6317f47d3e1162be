"""Every reader gives an image and its own label map, of the same box, on the same affine; a lost one is an error."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import zarr
from monai.data import MetaTensor, ThreadDataLoader
from monai.transforms import LoadImaged, RandSpatialCropd

from brainsynth import UserError, open_dataset
from brainsynth.reading.dataset import SyntheticDataset
from brainsynth.reading.monai import VolumeReader, monai_items
from brainsynth.reading.ray import ray_dataset
from brainsynth.reading.stored_array import StoredArray
from brainsynth.reading.torch import ShardSampler
from tests.reading.conftest import OK_ROWS, SHAPE, plan_of, write
from tests.storage.conftest import bands

F32, U8 = npt.NDArray[np.float32], npt.NDArray[np.uint8]
PLAN, _ = plan_of(labels=True)


def own(image: Any) -> U8:
    """The label map that an image as it was read must have."""
    return bands(PLAN, np.asarray(image, PLAN.volume.dtype))


@pytest.fixture
def opened(labelled: Path) -> SyntheticDataset:
    return open_dataset(str(labelled))


def test_numpy(opened: SyntheticDataset, label_maps: U8, intensities: F32) -> None:
    assert len(opened) == len(label_maps)
    for index, sample in enumerate(opened):
        assert (sample["labels"].dtype, sample["labels"].shape) == (np.uint8, SHAPE)
        np.testing.assert_array_equal(sample["labels"], label_maps[index])
        np.testing.assert_array_equal(sample["image"], intensities[index])
        np.testing.assert_array_equal(sample["labels"], own(sample["image"]))
    np.testing.assert_array_equal(opened.label_map(3, (1, 2, 3), (5, 30, 7)), label_maps[3, 1:6, 2:32, 3:10])
    assert [sample["labels"].sum() for sample in opened[1:3]] == [label_maps[i].sum() for i in (1, 2)]
    assert [one["name"] for one in opened.label_table] == ["band 1", "band 2", "band 3"]


def test_they_can_be_left_out(labelled: Path, finished: Path) -> None:
    bare = open_dataset(str(labelled), labels=False)
    assert "labels" not in bare[0]
    assert "label" not in monai_items(bare)[0]
    without = open_dataset(str(finished))
    assert not without.has_labels
    assert without.label_table == []
    assert set(without[0]) == {"affine", "sample_id", "age", "sex", "ventricular_volume", "image"}
    for read in (lambda: without.label_map(0), lambda: without.xarray(labels=True)):
        with pytest.raises(ValueError, match="holds no label maps"):
            read()
    maps = open_dataset(str(labelled), array="dseg")
    np.testing.assert_array_equal(maps.stored(3), maps.label_map(3))
    for refused in (lambda: maps[3], lambda: maps.patch(3, (0, 0, 0), 2), lambda: maps.torch()[3]):
        with pytest.raises(ValueError, match="dseg holds label maps and no intensities"):
            refused()


def test_volumes_are_a_table_and_a_condition(opened: SyntheticDataset, labelled: Path, label_maps: U8) -> None:
    volumes = opened.label_volumes
    assert list(volumes) == ["band 1", "band 2", "band 3"]
    assert list(volumes.index) == opened.sample_ids
    for label in (1, 2, 3):
        counted = (label_maps == label).sum((1, 2, 3)) * PLAN.volume.voxel_ml
        np.testing.assert_allclose(volumes[f"band {label}"], counted)
    middle = float(volumes["band 2"].median())
    large = open_dataset(str(labelled), where=f"label_volume_band_2 > {middle} and age > 40")
    chosen = (volumes["band 2"] > middle).to_numpy() & (opened.table["age"] > 40).to_numpy()
    assert large.sample_ids == [name for name, yes in zip(opened.sample_ids, chosen, strict=True) if yes]
    assert len(open_dataset(str(labelled), where="age > 1000").label_volumes) == 0
    with pytest.raises(UserError, match="label_volume_band_9"):
        open_dataset(str(labelled), where="label_volume_band_9 > 1")


def test_torch_reads_one_box_of_both(opened: SyntheticDataset, label_maps: U8) -> None:
    whole = opened.torch()[4]
    assert (whole["labels"].dtype, tuple(whole["labels"].shape)) == (torch.uint8, (1, *SHAPE))
    np.testing.assert_array_equal(whole["labels"][0], label_maps[4])
    torch.manual_seed(1)
    boxes = opened.torch(patch=(8, 9, 10)).__getitems__([3, 3, 20])
    assert len({tuple(box["start"].tolist()) for box in boxes}) == 3
    for box, index in zip(boxes, [3, 3, 20], strict=True):
        x, y, z = box["start"].tolist()
        np.testing.assert_array_equal(box["labels"][0], label_maps[index, x : x + 8, y : y + 9, z : z + 10])
        np.testing.assert_array_equal(box["labels"][0], own(box["image"][0]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_never_mixes_pairs(opened: SyntheticDataset, workers: int) -> None:
    loader = torch.utils.data.DataLoader(
        opened.torch(patch=12),
        batch_size=5,
        sampler=ShardSampler(opened, window=2, seed=1),
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
    )
    seen = 0
    for batch in loader:
        np.testing.assert_array_equal(batch["labels"], own(batch["image"]))
        seen += len(batch["sample_id"])
    assert seen == len(opened)


def test_monai_has_one_affine_for_both(opened: SyntheticDataset, label_maps: U8) -> None:
    sample = opened.monai()[4]
    assert isinstance(sample["label"], MetaTensor)
    assert (sample["label"].dtype, sample["image"].dtype) == (torch.uint8, torch.float32)
    np.testing.assert_array_equal(sample["label"][0], label_maps[4])
    np.testing.assert_array_equal(sample["label"].affine, sample["image"].affine)
    cropped = opened.monai(RandSpatialCropd(["image", "label"], (6, 7, 8), random_size=False))[4]
    np.testing.assert_array_equal(cropped["label"][0], own(cropped["image"][0]))
    np.testing.assert_array_equal(cropped["label"].affine, cropped["image"].affine)


def test_monai_patches_are_of_one_box(opened: SyntheticDataset) -> None:
    boxes = opened.monai(patch=(6, 7, 8))
    corners = set()
    for index in (0, 4, 4, 20):
        box = boxes[index]
        np.testing.assert_array_equal(box["label"][0], own(box["image"][0]))
        np.testing.assert_array_equal(box["label"].affine, box["image"].affine)
        corners.add(tuple(box["image"].affine[:3, 3].tolist()))
    assert len(corners) > 2
    for batch in ThreadDataLoader(boxes, batch_size=4, num_workers=2, use_thread_workers=True):
        np.testing.assert_array_equal(np.asarray(batch["label"]), own(np.asarray(batch["image"])))


def test_monai_refuses_a_box_of_labels_alone(opened: SyntheticDataset) -> None:
    first, second = monai_items(opened)[:2]
    load = LoadImaged(["image", "label"], reader=VolumeReader(patch=6), image_only=True, dtype=None)
    again = pickle.loads(pickle.dumps(load))(first)  # noqa: S301
    np.testing.assert_array_equal(again["label"], own(again["image"]))
    for wrong in ({"image": first["image"], "label": second["label"]}, first):
        keys = ["image", "label"] if wrong is not first else ["label"]
        with pytest.raises(RuntimeError, match="box of a label map is that of its image"):
            LoadImaged(keys, reader=VolumeReader(patch=6), image_only=True)(wrong)
    with pytest.raises(RuntimeError, match=r"has no volume 'syn000001\.seg'"):
        LoadImaged("image", reader=VolumeReader())({"image": f"{opened.uri}#syn000001.seg"})


def test_torchio_has_a_label_map(opened: SyntheticDataset, label_maps: U8) -> None:
    tio = pytest.importorskip("torchio", reason="torchio is not installed: `pip install brainsynth[readers]`")
    subject = opened.torchio()[20]
    assert isinstance(subject["labels"], tio.LabelMap)
    np.testing.assert_array_equal(subject["labels"].data[0], label_maps[20])
    np.testing.assert_array_equal(subject["labels"].affine, subject["t1w"].affine)
    turned = tio.RandomAffine(degrees=20)(subject)  # a label map is moved by nearest neighbour
    assert set(np.unique(turned["labels"].data)) <= {0, 1, 2, 3}


def test_xarray_has_a_dataset_of_both(
    opened: SyntheticDataset, label_maps: U8, intensities: F32, tmp_path: Path
) -> None:
    pytest.importorskip("dask", reason="xarray and dask are not installed: `pip install brainsynth[readers]`")
    pytest.importorskip("xarray", reason="xarray and dask are not installed: `pip install brainsynth[readers]`")
    pair = opened.xarray(labels=True)
    assert set(pair) == {"t1w", "dseg"}
    part = pair.isel(subject=slice(20, 22), x=slice(3, 5), y=slice(None, None, 7), z=-1)
    np.testing.assert_array_equal(part["dseg"].compute(), label_maps[20:22, 3:5, ::7, -1])
    np.testing.assert_array_equal(part["t1w"].compute(), intensities[20:22, 3:5, ::7, -1])
    assert part["dseg"].dtype == np.uint8
    assert part["dseg"].attrs["flag_values"] == [1, 2, 3]
    assert part["dseg"].attrs["flag_meanings"] == "band_1 band_2 band_3"
    assert "flag_values" not in part["t1w"].attrs
    assert (pair["age"] > 60).sum() == sum(30 + row * 1.5 > 60 for row in OK_ROWS)


def test_ray_data_has_both(labelled: Path, ray_cluster: None, label_maps: U8) -> None:
    rows = ray_dataset(str(labelled), where="sex == 'F'").take_all()
    assert len(rows) == sum(row % 2 == 0 for row in OK_ROWS)
    for row in [*rows, *ray_dataset(str(labelled), patch=(4, 5, 6), where="age < 40").take_all()]:
        np.testing.assert_array_equal(row["labels"], own(row["image"]))
        assert row["labels"].dtype == np.uint8


def test_on_object_storage(s3_root: str, label_maps: U8) -> None:
    write(s3_root, *plan_of(labels=True))
    opened = open_dataset(s3_root, where="age >= 36")
    for box in opened.torch(patch=(5, 6, 7)).__getitems__(list(range(len(opened)))):
        np.testing.assert_array_equal(box["labels"][0], own(box["image"][0]))
    item = LoadImaged(["image", "label"], reader=VolumeReader(), image_only=True, dtype=None)(monai_items(opened)[1])
    np.testing.assert_array_equal(item["label"], own(item["image"]))


def test_another_layout_is_read_by_zarr_and_background_is_no_loss(labelled: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(labelled, root)
    path = root / "dataset.zarr" / "dseg"
    values = np.asarray(zarr.open_array(path, mode="r")[:])
    values[3, :5] = 0
    shutil.rmtree(path)
    rewritten = zarr.create_array(path, shape=values.shape, chunks=(1, *SHAPE), dtype="uint8", fill_value=255)
    rewritten[:] = values
    assert StoredArray(str(root), "dseg")._reader is None
    opened = open_dataset(str(root))
    np.testing.assert_array_equal(opened.label_map(2), values[2])
    assert not opened.label_map(3, (0, 0, 0), (5, 5, 5)).any()
    (path / "c/4/0/0/0").unlink()
    with pytest.raises(ValueError, match="the label map of row 4 is lost"):
        opened.label_map(4)
