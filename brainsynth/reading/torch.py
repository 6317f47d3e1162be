"""The reader as a torch map-style dataset, and a sampler that shuffles without jumping from shard to shard."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from brainsynth.errors import UserError
from brainsynth.reading.files import is_remote
from brainsynth.reading.stored_array import INTEGER_MAX
from brainsynth.reading.volumes import Volumes, chosen_places

_REQUESTS_AT_ONCE = 8


class TorchDataset(Dataset[dict[str, Any]]):
    """`image` float32 (1, X, Y, Z), `affine` float64 (4, 4), `sample_id`, the covariates, and `labels` uint8 (1, X, Y, Z)
    of a dataset with label maps.

    With `patch`, a random box of that many voxels, from torch's own generator (which a DataLoader seeds in each worker):
    `start` int64 (3,) is its first voxel, and `affine` is that of the box; the labels are those of the same box.
    """

    def __init__(
        self,
        dataset: Volumes,
        patch: Sequence[int] | int | None = None,
        transform: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        self.dataset, self.transform = dataset, transform
        self.patch = None if patch is None else patch_size(dataset, patch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        places = chosen_places(index, len(self))
        if isinstance(places, list):
            return self.__getitems__(places)
        return self._sample(places, None if self.patch is None else random_start(self.dataset.shape, self.patch))

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """A whole batch, as a DataLoader asks for it; from an object store, several samples at a time."""
        starts = [None if self.patch is None else random_start(self.dataset.shape, self.patch) for _ in indices]
        if not is_remote(self.dataset.uri):
            return [self._sample(index, start) for index, start in zip(indices, starts, strict=True)]
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            return list(pool.map(self._sample, indices, starts))

    def _sample(self, index: int, start: Sequence[int] | None) -> Any:
        sample = self.dataset.facts(index)
        sample["image"] = read_tensor(self.dataset, index, start, self.patch)[None]
        if self.dataset.has_labels:
            sample["labels"] = torch.from_numpy(self.dataset.label_map(index, start, self.patch))[None]
        sample["affine"] = torch.from_numpy(moved_affine(sample["affine"], start))
        if start is not None:
            sample["start"] = torch.tensor(start)
        return sample if self.transform is None else self.transform(sample)


class ShardSampler(Sampler[int]):
    """A shuffle that reads few shards at a time: shards in random order, samples in random order among `window` of them.

    Every sample comes once an epoch. With `num_replicas`, each rank gets an equal part (the first samples fill it up, as
    in `DistributedSampler`). Call `set_epoch` before each epoch, else they are all alike.
    """

    def __init__(self, dataset: Volumes, window: int = 8, seed: int = 0, num_replicas: int = 1, rank: int = 0) -> None:
        if window < 1 or not 0 <= rank < num_replicas:
            raise ValueError(f"window {window} must be at least 1, and rank {rank} one of {num_replicas} replicas")
        self.shards, self.window, self.seed, self.epoch = dataset.shards, window, seed, 0
        self.num_replicas, self.rank = num_replicas, rank

    def set_epoch(self, epoch: int) -> None:
        """Another epoch, another order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.shards) // self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        shards = rng.permutation(np.unique(self.shards))
        windows = [shards[i : i + self.window] for i in range(0, len(shards), self.window)]
        parts = [rng.permutation(np.flatnonzero(np.isin(self.shards, chosen))) for chosen in windows]
        order = np.concatenate([*parts, np.array([], dtype=np.int64)])
        order = np.resize(order, len(self) * self.num_replicas)
        return iter(order[self.rank * len(self) : (self.rank + 1) * len(self)].tolist())


def read_tensor(
    dataset: Volumes, index: int, start: Sequence[int] | None = None, size: Sequence[int] | None = None
) -> torch.Tensor:
    """Intensities of a volume or box, float32 in [0, 1]: torch converts float16 several times faster than NumPy."""
    dataset.check_intensities()
    stored = dataset.stored(index, start, size)
    image = torch.from_numpy(stored).to(torch.float32)
    return image if stored.dtype.kind == "f" else image.div_(INTEGER_MAX[stored.dtype.name])


def patch_size(dataset: Volumes, patch: Sequence[int] | int) -> list[int]:
    """Voxels of a patch along each axis; one number is a cube. Raises ValueError for one that does not fit."""
    return [part.stop for part in dataset.array.box(size=patch)]


def random_start(shape: Sequence[int], patch: Sequence[int]) -> list[int]:
    """The first voxel of a box, uniform over all places where it fits. Raises UserError inside of a cache of MONAI."""
    _check_not_cached()
    return [int(torch.randint(0, n - size + 1, ())) for n, size in zip(shape, patch, strict=True)]


def _check_not_cached() -> None:
    """A box that a MONAI cache keeps would be the same one in every epoch."""
    module: Any = sys.modules.get("monai.data.dataset")
    frame = sys._getframe(2) if module else None
    nested = False  # a dataset of patches is the cache's data: a cache may keep that
    while frame is not None:
        if frame.f_code.co_filename == module.__file__:
            cache = frame.f_locals.get("self")
            if isinstance(cache, module.CacheDataset | module.PersistentDataset):
                if not nested and frame.f_code.co_name in ("_transform", "_post_transform"):
                    return  # what these make is not kept
                raise UserError(
                    f"{type(cache).__name__} would cache one random patch and repeat it in every epoch: cache whole volumes "
                    "and crop them by RandSpatialCropd, or read patches uncached, by dataset.monai(transform, patch=…)"
                )
        nested |= frame.f_code.co_name == "__getitem__"
        frame = frame.f_back


def moved_affine(affine: np.ndarray[Any, Any], start: Sequence[int] | None) -> np.ndarray[Any, Any]:
    """The affine of a box that begins at voxel `start`."""
    if start is None:
        return affine
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ np.asarray(start, dtype=np.float64)
    return moved
