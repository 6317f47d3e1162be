"""MONAI: `LoadImage` and `LoadImaged` read volumes of a dataset by addresses such as `s3://bucket/generated#syn000012`, and
label maps by `s3://bucket/generated#syn000012.dseg`.
"""

from __future__ import annotations

import math
import re
import threading
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

from brainsynth.reading.stored_array import DSEG
from brainsynth.reading.torch import moved_affine, patch_size, random_start, read_tensor
from brainsynth.reading.volumes import Volumes


@dataclass(frozen=True)
class LoadedVolume:
    """A volume or a label map, or a box of one, and where it lies."""

    image: npt.NDArray[np.float32 | np.uint8]
    affine: npt.NDArray[np.float64]
    full_shape: tuple[int, ...]


class VolumeReader(ImageReader):
    """Reads `URI#sample_id` for MONAI's `LoadImage(d)`: float32 intensities in [0, 1], RAS+ affine. `URI#sample_id.dseg` is
    the label map, uint8 (`LoadImaged(dtype=None)` keeps that).

    With `patch`, a random box of that many voxels (torch's generator), with its own affine: far cheaper than to load a
    volume and crop it; a cache of MONAI refuses it, as it would keep one box. The box of a label map is that of its image,
    which must be loaded just before. `array`, `partial`: those of `open_dataset`.
    """

    def __init__(
        self, patch: Sequence[int] | int | None = None, array: str | None = None, partial: bool = False
    ) -> None:
        self.patch, self.array, self.partial = patch, array, partial
        self._known: dict[str, tuple[Volumes, dict[str, int]]] = {}
        self._boxes = _LastBox()

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """True for an address with a `#`."""
        return all("#" in str(name) for name in ensure_tuple(filename))

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> LoadedVolume:
        """One volume or label map. Raises KeyError for an id that the dataset does not have, ValueError for a lost one."""
        names = ensure_tuple(data)
        if len(names) != 1:
            raise ValueError(f"one volume at a time, not {len(names)}")
        # LoadImage takes an address for a path, which cannot hold two slashes in a row.
        uri, _, name = re.sub(r"^(\w+):/(?!/)", r"\1://", str(names[0])).rpartition("#")
        sample_id, _, suffix = name.partition(".")
        dataset, places = self._open(uri)
        if sample_id not in places or suffix not in ("", DSEG):
            raise KeyError(f"{uri} has no volume {name!a}")
        index = places[sample_id]
        size = None if self.patch is None else patch_size(dataset, self.patch)
        if suffix == DSEG:
            start = None if size is None else self._boxes.of(uri, sample_id)
            labels = dataset.label_map(index, start, size)
            return LoadedVolume(labels, moved_affine(dataset.affine, start), dataset.shape)
        start = None if size is None else random_start(dataset.shape, size)
        self._boxes.drawn = (uri, sample_id, start)
        image = read_tensor(dataset, index, start, size).numpy()
        return LoadedVolume(image, moved_affine(dataset.affine, start), dataset.shape)

    def get_data(self, img: LoadedVolume) -> tuple[npt.NDArray[np.float32 | np.uint8], dict[str, Any]]:
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


class _LastBox(threading.local):
    """The box that was last drawn in this thread, for the label map that belongs to it."""

    drawn: tuple[str, str, list[int] | None] | None = None

    def of(self, uri: str, sample_id: str) -> list[int]:
        """Its first voxel. Raises ValueError where the last box was of another volume."""
        if self.drawn is None or self.drawn[:2] != (uri, sample_id) or self.drawn[2] is None:
            raise ValueError(
                f"{uri}: the random box of a label map is that of its image, which must be loaded just before it, by the "
                f"same reader: LoadImaged(keys=['image', 'label'], reader=VolumeReader(patch=…)); {sample_id} was not"
            )
        return self.drawn[2]

    def __reduce__(self) -> tuple[type[_LastBox], tuple[()]]:
        return _LastBox, ()


class _LoadPatchd(LoadImaged, RandomizableTrait):
    """Loads another box on each access: MONAI's caches keep what comes before the first random transform, so not this."""


def monai_items(dataset: Volumes) -> list[dict[str, Any]]:
    """One dict a volume: `image`, its address, the covariates, and `label`, the address of its label map where there are
    label maps; what MONAI's datasets and caches take.
    """
    items = []
    for row in dataset.table.drop(columns="row").to_dict("records"):
        image = f"{dataset.uri}#{row['sample_id']}"
        label = {"label": f"{image}.{DSEG}"} if dataset.has_labels else {}
        items.append({"image": image} | label | {str(name): value for name, value in row.items()})
    return items


def monai_dataset(
    dataset: Volumes,
    transform: Callable[[Any], Any] | None = None,
    patch: Sequence[int] | int | None = None,
) -> Dataset:
    """Load, put the channel first, then `transform`."""
    reader = VolumeReader(patch, dataset.array_name, partial="shards_digest" not in dataset.manifest)
    load = LoadImaged if patch is None else _LoadPatchd
    keys = ["image", *(["label"] if dataset.has_labels else [])]
    # MONAI takes an instance, too, whatever its annotation says; without a dtype, labels stay uint8.
    image = load(keys=keys, reader=reader, image_only=True, dtype=None)  # type: ignore[arg-type]
    return Dataset(
        monai_items(dataset),
        Compose([image, EnsureChannelFirstd(keys=keys), *([] if transform is None else [transform])]),
    )
