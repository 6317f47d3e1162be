"""MONAI: `LoadImage` and `LoadImaged` read volumes of a dataset by addresses such as `s3://bucket/generated#syn000012`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from monai.config import PathLike
from monai.data import Dataset
from monai.data.image_reader import ImageReader
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, RandomizableTrait
from monai.utils import MetaKeys, SpaceKeys, ensure_tuple

from brainsynth.reading.torch import moved_affine, patch_size, random_start, read_tensor
from brainsynth.reading.volumes import Volumes


@dataclass(frozen=True)
class LoadedVolume:
    """A volume, or a box of one, and where it lies."""

    image: npt.NDArray[np.float32]
    affine: npt.NDArray[np.float64]
    full_shape: tuple[int, ...]


class VolumeReader(ImageReader):
    """Reads `URI#sample_id` for MONAI's `LoadImage(d)`: float32 intensities in [0, 1], RAS+ affine.

    With `patch`, a random box of that many voxels (torch's generator), with its own affine: far cheaper than to load a
    volume and crop it; a cache of MONAI refuses it, as it would keep one box. `array`, `partial`: those of `open_dataset`.
    """

    def __init__(
        self, patch: Sequence[int] | int | None = None, array: str | None = None, partial: bool = False
    ) -> None:
        self.patch, self.array, self.partial = patch, array, partial
        self._known: dict[str, tuple[Volumes, dict[str, int]]] = {}

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """True for an address with a `#`."""
        return all("#" in str(name) for name in ensure_tuple(filename))

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> LoadedVolume:
        """One volume. Raises KeyError for an id that the dataset does not have, ValueError for one that is lost."""
        names = ensure_tuple(data)
        if len(names) != 1:
            raise ValueError(f"one volume at a time, not {len(names)}")
        # LoadImage takes an address for a path, which cannot hold two slashes in a row.
        uri, _, sample_id = re.sub(r"^(\w+):/(?!/)", r"\1://", str(names[0])).rpartition("#")
        dataset, places = self._open(uri)
        if sample_id not in places:
            raise KeyError(f"{uri} has no volume {sample_id!a}")
        index = places[sample_id]
        size = None if self.patch is None else patch_size(dataset, self.patch)
        start = None if size is None else random_start(dataset.shape, size)
        image = read_tensor(dataset, index, start, size).numpy()
        return LoadedVolume(image, moved_affine(dataset.affine, start), dataset.shape)

    def get_data(self, img: LoadedVolume) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """The array, and the metadata that a MetaTensor carries."""
        return img.image, {
            MetaKeys.AFFINE: img.affine,
            MetaKeys.ORIGINAL_AFFINE: img.affine.copy(),
            MetaKeys.SPATIAL_SHAPE: np.array(img.image.shape),
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.ORIGINAL_CHANNEL_DIM: math.nan,
        }

    def _open(self, uri: str) -> tuple[Volumes, dict[str, int]]:
        if uri not in self._known:
            dataset = Volumes(uri, array=self.array, partial=self.partial)
            self._known[uri] = (dataset, {sample_id: index for index, sample_id in enumerate(dataset.sample_ids)})
        return self._known[uri]


class _LoadPatchd(LoadImaged, RandomizableTrait):
    """Loads another box on each access: MONAI's caches keep what comes before the first random transform, so not this."""


def monai_items(dataset: Volumes) -> list[dict[str, Any]]:
    """One dict a volume: `image`, its address, and the covariates; what MONAI's datasets and caches take."""
    return [
        {"image": f"{dataset.uri}#{row['sample_id']}"} | {str(name): value for name, value in row.items()}
        for row in dataset.table.drop(columns="row").to_dict("records")
    ]


def monai_dataset(
    dataset: Volumes,
    transform: Callable[[Any], Any] | None = None,
    patch: Sequence[int] | int | None = None,
) -> Dataset:
    """Load, put the channel first, then `transform`."""
    reader = VolumeReader(patch, dataset.array_name, partial="shards_digest" not in dataset.manifest)
    load = LoadImaged if patch is None else _LoadPatchd
    # MONAI takes an instance, too, whatever its annotation says.
    image = load(keys="image", reader=reader, image_only=True)  # type: ignore[arg-type]
    return Dataset(
        monai_items(dataset),
        Compose([image, EnsureChannelFirstd(keys="image"), *([] if transform is None else [transform])]),
    )
