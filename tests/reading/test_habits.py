"""A dataset answers to the habits of NumPy, pandas, torch, MONAI, TorchIO, xarray: a value, or one sentence."""

from __future__ import annotations

import copy
import operator
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
from monai.data import CacheDataset, CacheNTransDataset, PersistentDataset, SmartCacheDataset
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, RandFlipd, RandSpatialCropd

import brainsynth
from brainsynth import SyntheticDataset, VolumeReader, monai_items
from tests.reading.conftest import OK_ROWS, SHAPE, ids

F32 = npt.NDArray[np.float32]
COUNT = len(OK_ROWS)
MASK = [place in (1, 4) for place in range(COUNT)]


@pytest.fixture(scope="module")
def opened(finished: Path) -> SyntheticDataset:
    return brainsynth.open_dataset(str(finished))


@pytest.mark.parametrize(
    ("index", "places"),
    [
        (slice(0, 2), [0, 1]),
        (slice(None, None, -17), [34, 17, 0]),
        (slice(90, 95), []),
        ([3, -1, 3], [3, 34, 3]),
        ([], []),
        (range(4, 6), [4, 5]),
        (np.array([2, 5], dtype=np.uint8), [2, 5]),
        (np.array(MASK), [1, 4]),
        (MASK, [1, 4]),
        (pd.Series(MASK), [1, 4]),
        (pd.Series(MASK)[::-1], [1, 4]),
        (pd.Series(MASK).sort_values(), [1, 4]),
        (torch.tensor([7, 8]), [7, 8]),
        (torch.tensor(MASK), [1, 4]),
    ],
    ids=str,
)
def test_a_slice_list_or_mask_is_a_list_of_samples(
    index: Any, places: list[int], opened: SyntheticDataset, intensities: F32
) -> None:
    samples = opened[index]
    assert [sample["sample_id"] for sample in samples] == ids([OK_ROWS[place] for place in places])
    for sample, place in zip(samples, places, strict=True):
        np.testing.assert_array_equal(sample["image"], intensities[place])
    batch = opened.torch()[index]
    assert [sample["sample_id"] for sample in batch] == [sample["sample_id"] for sample in samples]
    assert opened.volumes(index).shape == (len(places), *SHAPE)


@pytest.mark.parametrize("index", [np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), -COUNT + 3], ids=repr)
def test_any_whole_number_is_one_sample(index: Any, opened: SyntheticDataset, intensities: F32) -> None:
    assert opened[index]["sample_id"] == "syn000003"
    np.testing.assert_array_equal(opened[index]["image"], intensities[3])
    assert opened.facts(index)["age"] == 34.5
    assert opened.torch()[index]["sample_id"] == "syn000003"


@pytest.mark.parametrize(
    "index",
    ["syn000001", 1.0, True, np.True_, None, (0, 1), (0, slice(None)), {0, 1}, [0.5], ["a"], [True, 1], [[0]], ..., {}, b"1",
     pd.array([True, None]), np.array([[0]])],
    ids=repr,
)  # fmt: skip
def test_anything_else_is_one_sentence(index: Any, opened: SyntheticDataset) -> None:
    for dataset in (opened, opened.torch()):
        with pytest.raises(TypeError, match="is indexed by a number, a slice, a list of numbers or a mask") as refusal:
            operator.getitem(dataset, index)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "labels", [range(1, COUNT + 1), [0] * COUNT, [f"syn{n}" for n in range(COUNT)]], ids=["1", "0", "a"]
)
def test_a_mask_of_another_table_is_refused(labels: Any, opened: SyntheticDataset) -> None:
    mask = pd.Series(MASK, index=list(labels))
    with pytest.raises(IndexError, match="labels are not those of dataset.table, 0 to 34: .* give mask.to_numpy"):
        opened[mask]
    assert len(opened[mask.to_numpy()]) == 2


@pytest.mark.parametrize("index", [COUNT, -COUNT - 1, [0, COUNT], [True], np.array([False, True])], ids=repr)
def test_what_does_not_fit_is_an_index_error(index: Any, opened: SyntheticDataset) -> None:
    with pytest.raises(IndexError, match=f"a dataset with {COUNT} volumes"):
        operator.getitem(opened, index)


def test_one_volume_is_one_number(opened: SyntheticDataset) -> None:
    with pytest.raises(TypeError, match="one volume is asked for by one number"):
        opened.volume([0, 1])  # type: ignore[arg-type]


def test_a_number_is_a_cube(opened: SyntheticDataset, intensities: F32) -> None:
    np.testing.assert_array_equal(opened.patch(1, (2, 3, 4), 5), intensities[1][2:7, 3:8, 4:9])
    assert opened.torch(patch=8)[0]["image"].shape == (1, 8, 8, 8)
    assert opened.monai(patch=8)[0]["image"].shape == (1, 8, 8, 8)
    for patch, why in (
        (21, "does not lie in"),
        ((4, 4), "does not lie in"),
        ("a", "one whole number"),
        (2.5, "one whole"),
    ):
        with pytest.raises(ValueError, match=why):
            opened.torch(patch=patch)  # type: ignore[arg-type]


def test_a_choice_of_nobody_has_no_volumes(finished: Path) -> None:
    nobody = brainsynth.open_dataset(str(finished), where="age > 94")
    assert nobody.volumes().shape == (0, *SHAPE)
    assert list(nobody) == nobody[:] == []


def test_a_folder_with_a_blank_has_an_address(finished: Path, tmp_path: Path, intensities: F32) -> None:
    for name in ("two words", "100%", "a%20b", "größe#1"):
        place = tmp_path / name
        place.symlink_to(finished)
        addresses = [str(place), place.as_uri()] if "#" not in name else [str(place)]
        addresses += [place.as_uri().replace("file:///", "file://localhost/")] if "#" not in name else []
        for address in addresses:
            np.testing.assert_array_equal(brainsynth.open_dataset(address).volume(0), intensities[0])
            assert brainsynth.verify_dataset(address).ok


def starts(dataset: Any) -> int:
    """How many different boxes twenty accesses give."""
    return len({tuple(dataset[0]["image"].affine[:3, 3].tolist()) for _ in range(20)})


def patches() -> Compose:
    load = LoadImaged("image", reader=VolumeReader(patch=(4, 4, 4)), image_only=True)  # type: ignore[arg-type]
    return Compose([load, EnsureChannelFirstd("image"), RandFlipd("image", 0.0, spatial_axis=0)])


CACHES = {
    "CacheDataset": lambda items, transform, _: CacheDataset(items, transform, progress=False, num_workers=1)[0],
    "at run time": lambda items, transform, _: CacheDataset(
        items, transform, progress=False, num_workers=1, runtime_cache=True
    )[0],
    "SmartCacheDataset": lambda items, transform, _: SmartCacheDataset(
        items, transform, 0.5, 2, progress=False, num_init_workers=1
    )[0],
    "PersistentDataset": lambda items, transform, folder: PersistentDataset(items, transform, folder)[0],
    "CacheNTransDataset": lambda items, transform, folder: CacheNTransDataset(items, transform, 2, folder)[0],
}


@pytest.mark.parametrize("kind", CACHES)
def test_no_cache_keeps_one_random_patch(kind: str, opened: SyntheticDataset, tmp_path: Path) -> None:
    items = monai_items(opened)[:4]
    with pytest.raises(RuntimeError) as refusal:
        CACHES[kind](items, patches(), tmp_path)
    assert "would cache one random patch and repeat it in every epoch" in str(refusal.value.__cause__)


def test_nor_one_over_a_dataset_of_patches(opened: SyntheticDataset, tmp_path: Path) -> None:
    flip = Compose([RandFlipd("image", 0.0, spatial_axis=0)])
    for source in (opened.torch(patch=4), opened.monai(patch=4)):
        for kind in ("CacheDataset", "PersistentDataset"):
            with pytest.raises((RuntimeError, brainsynth.UserError)) as refusal:
                CACHES[kind](source, flip, tmp_path)
            assert "would cache one random patch" in f"{refusal.value} {refusal.value.__cause__}"


def test_patches_stay_random(opened: SyntheticDataset, tmp_path: Path) -> None:
    torch.manual_seed(0)
    volumes = opened.monai(patch=(4, 4, 4))
    assert starts(volumes) > 15
    assert starts(CacheDataset(volumes.data, volumes.transform, progress=False, num_workers=1)) > 15
    assert starts(PersistentDataset(volumes.data, volumes.transform, tmp_path)) > 15
    assert starts(brainsynth_whole_then_cropped(opened)) > 15


def brainsynth_whole_then_cropped(dataset: SyntheticDataset) -> Any:
    """What the refusal says to write instead."""
    load = LoadImaged("image", reader=VolumeReader(), image_only=True)  # type: ignore[arg-type]
    crop = RandSpatialCropd("image", (4, 4, 4), random_size=False)
    transform = Compose([load, EnsureChannelFirstd("image"), crop])
    return CacheDataset(monai_items(dataset)[:2], transform, progress=False, num_workers=1)


class TestTorchIO:
    """Subjects are as real as those of files."""

    tio = pytest.importorskip("torchio")

    def test_crops_are_the_voxels_at_their_place(self, opened: SyntheticDataset, intensities: F32) -> None:
        tio = self.tio
        cropped = opened.torchio(tio.Crop((1, 2, 3, 4, 5, 6)))[2]["t1w"]
        np.testing.assert_array_equal(cropped.data[0], intensities[2][1:-2, 3:-4, 5:-6])
        moved = opened.affine @ [1, 3, 5, 1]
        np.testing.assert_allclose(cropped.affine[:3, 3], moved[:3])
        assert opened.torchio(tio.CropOrPad((8, 50, 8)))[0]["t1w"].shape == (1, 8, 50, 8)
        np.testing.assert_array_equal(opened.torchio()[0]["t1w"][:, 2:5].data[0], intensities[0][:, 2:5])

    def test_a_grid_of_patches_is_the_volume_again(self, opened: SyntheticDataset, intensities: F32) -> None:
        tio = self.tio
        sampler = tio.inference.GridSampler(opened.torchio()[5], 10, 2)
        aggregator = tio.inference.GridAggregator(sampler)
        for batch in tio.SubjectsLoader(sampler, batch_size=4):
            aggregator.add_batch(batch["t1w"][tio.DATA], batch[tio.LOCATION])
        np.testing.assert_array_equal(aggregator.get_output_tensor()[0], intensities[5])

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_queue_gives_patches_of_every_subject(self, workers: int, opened: SyntheticDataset) -> None:
        tio = self.tio
        queue = tio.Queue(opened.torchio(), 8, 2, tio.UniformSampler(6), num_workers=workers)
        batches = list(tio.SubjectsLoader(queue, batch_size=7))
        assert {tuple(batch["t1w"][tio.DATA].shape[1:]) for batch in batches} == {(1, 6, 6, 6)}
        seen = [sample_id for batch in batches for sample_id in batch["sample_id"]]
        assert sorted(seen) == sorted(2 * ids(OK_ROWS))

    def test_subjects_are_copied_transformed_and_saved(
        self, opened: SyntheticDataset, intensities: F32, tmp_path: Path
    ) -> None:
        tio = self.tio
        for way in (copy.copy, copy.deepcopy):
            np.testing.assert_array_equal(way(opened.torchio()[1])["t1w"].data[0], intensities[1])
        several = tio.Compose([tio.RandomFlip(), tio.Resample(8), tio.ZNormalization(), tio.Pad(1)])
        assert opened.torchio(several)[0]["t1w"].data.std() > 0
        opened.torchio()[3]["t1w"].save(tmp_path / "saved.nii")
        np.testing.assert_array_equal(tio.ScalarImage(tmp_path / "saved.nii").data[0], intensities[3])


class TestXarray:
    """The array is written and read by what xarray has for that."""

    xarray = pytest.importorskip("xarray")
    pytest.importorskip("dask")

    def test_netcdf_holds_voxels_places_and_covariates(
        self, opened: SyntheticDataset, intensities: F32, tmp_path: Path
    ) -> None:
        pytest.importorskip("scipy")
        opened.xarray()[:5].to_netcdf(tmp_path / "five.nc")
        read = self.xarray.load_dataarray(tmp_path / "five.nc")
        np.testing.assert_array_equal(read.values, intensities[:5])
        assert list(read["subject"].values) == ids(OK_ROWS[:5])
        assert list(read["sex"].values) == ["F", "M", "F", "M", "F"]
        np.testing.assert_array_equal(read["age"], opened.table["age"][:5])
        np.testing.assert_array_equal(np.reshape(read.attrs["affine"], (4, 4)), opened.affine)
        assert read.attrs["synthetic"] == 1
        assert read["x"].attrs["units"] == "mm"

    def test_the_store_opens_without_a_warning(self, opened: SyntheticDataset, finished: Path) -> None:
        import zarr

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read = self.xarray.open_zarr(finished / "dataset.zarr")["t1w"]
            stored = zarr.open_group(finished / "dataset.zarr", mode="r")["t1w"]
        np.testing.assert_array_equal(read[OK_ROWS[9]].values, opened.stored(9))
        assert stored.shape == read.shape
