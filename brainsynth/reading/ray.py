"""A dataset as a Ray Data source: one read task a shard, rows of NumPy arrays out. For training loops that run on Ray."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from brainsynth.reading.volumes import Volumes

if TYPE_CHECKING:
    import ray.data


def ray_dataset(uri: str, patch: Sequence[int] | int | None = None, **options: Any) -> ray.data.Dataset:
    """A lazy `ray.data.Dataset`: `image` float32 (X, Y, Z), `sample_id`, covariates (physical units), and `labels` uint8
    (X, Y, Z) of a dataset with label maps.

    Runs in the Ray session that is there, or that Ray starts. Every node must reach `uri`, with credentials in its
    environment.

    Args:
        uri: the dataset's root folder.
        patch: voxels of a random box of each volume instead of the whole; `start` (3,) then says where it lies.
        options: `split`, `where`, `array`, `partial`, `labels` of `open_dataset`.

    Raises:
        What `open_dataset` raises; ValueError when the dataset has no volumes, or a patch does not fit.
    """
    import ray.data

    dataset = Volumes(uri, **options)
    if not len(dataset):
        raise ValueError(f"{uri} has no volumes to read")
    box = None if patch is None else tuple(part.stop for part in dataset.array.box(size=patch))
    indices, shards = np.arange(len(dataset)), dataset.shards
    order = np.argsort(shards, kind="stable")
    cuts = np.flatnonzero(np.diff(shards[order])) + 1
    blocks = [pa.table({"index": part}) for part in np.split(indices[order], cuts)]
    read = functools.partial(_read, dataset=dataset, patch=box)
    return ray.data.from_arrow(blocks).map_batches(read, batch_size=None)


def _read(
    batch: dict[str, npt.NDArray[np.int64]], dataset: Volumes, patch: tuple[int, ...] | None
) -> Iterator[dict[str, Any]]:
    """One sample at a time, so that Ray cuts blocks of its own size."""
    rng = np.random.default_rng()
    for index in batch["index"].tolist():
        facts = dataset.facts(index)
        del facts["affine"]
        start = None
        if patch is None:
            facts["image"] = dataset.volume(index)
        else:
            facts["start"] = rng.integers(0, np.subtract(dataset.shape, patch), endpoint=True)
            start = facts["start"].tolist()
            facts["image"] = dataset.patch(index, start, patch)
        if dataset.has_labels:
            facts["labels"] = dataset.label_map(index, start, patch)
        yield {name: np.array([value]) for name, value in facts.items()}
