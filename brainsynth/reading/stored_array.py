"""One array of a dataset: rows, or boxes of them, in stored dtype. Ours by shard_reader.py, any other layout by zarr."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from brainsynth.reading.cache import Cache
from brainsynth.reading.files import is_remote, local_file, read_file, zarr_store
from brainsynth.reading.shard_reader import Box, LostError, ShardReader, shard_layout
from brainsynth.storage.untrusted import check_zarr_array

INTEGER_MAX = {"uint16": 65535.0, "uint8": 255.0}
"""What intensity 1 is in arrays of integers."""
DSEG = "dseg"
"""The array of label maps (labels.py, which needs pydantic)."""


def whole_numbers(value: Sequence[int] | int, shape: Sequence[int], what: str) -> list[int]:
    """A whole number for each axis; one number stands for every axis. Raises ValueError for anything else."""
    try:
        if np.ndim(value) == 0:
            return [operator.index(cast(int, value))] * len(shape)
        return [operator.index(each) for each in cast("Sequence[int]", value)]
    except (TypeError, ValueError):
        raise ValueError(
            f"{what}: write one whole number of voxels for each of {len(shape)} axes, not {ascii(value)[:60]}"
        ) from None


class StoredArray:
    """Opened in the process that reads, so it may be pickled and forked. Raises ValueError for metadata that is refused."""

    def __init__(self, uri: str, name: str, cache: Cache | None = None) -> None:
        self.uri, self.name = uri, name
        self._opened: tuple[int, Any] | None = None
        """The process, and its zarr.Array."""
        key = f"dataset.zarr/{name}/zarr.json"
        metadata = read_file(uri, key)
        check_zarr_array(metadata, f"{uri}/{key}")
        layout = shard_layout(metadata)
        self._reader = None if layout is None else ShardReader(uri, name, layout, cache)
        self.shape: tuple[int, ...]
        """Of one sample."""
        if layout is None:
            array = self._array()
            self.shape, self.dtype = array.shape[1:], np.dtype(array.dtype)
            self.samples_per_shard = int((array.shards or array.chunks)[0])
            self.chunk_shape: tuple[int, ...] = array.chunks[1:]
        else:
            self.shape, self.dtype, self.chunk_shape = layout.sample_shape, layout.dtype, layout.chunk_shape
            self.samples_per_shard = layout.samples_per_shard

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def box(self, start: Sequence[int] | None = None, size: Sequence[int] | int | None = None) -> Box:
        """The slices of a box; all of a sample by default. Raises ValueError for a box that does not lie within it."""
        first = [0] * len(self.shape) if start is None else whole_numbers(start, self.shape, "start")
        rest = [n - a for n, a in zip(self.shape, first, strict=False)]
        extent = rest if size is None else whole_numbers(size, self.shape, "size")
        if not len(first) == len(extent) == len(self.shape) or any(
            a < 0 or b < 1 or a + b > n for a, b, n in zip(first, extent, self.shape, strict=True)
        ):
            raise ValueError(f"a box of {tuple(extent)} voxels from {tuple(first)} on does not lie in {self.shape}")
        return tuple(slice(a, a + b) for a, b in zip(first, extent, strict=True))

    def read(self, row: int, box: Box) -> npt.NDArray[Any]:
        """A box of a row. Raises ValueError when it is lost."""
        try:
            if self._reader is None:
                return self._by_zarr(row, box)
            out = np.empty(tuple(part.stop - part.start for part in box), self.dtype)
            for place, piece in self._reader.pieces(row, box):
                out[place] = piece
            return out
        except LostError as error:
            what = "label map" if self.name == DSEG else "volume"
            raise ValueError(
                f"{self.uri}: the {what} of row {row} is lost or damaged; run `brainsynth verify {self.uri}` ({error})"
            ) from None

    def _by_zarr(self, row: int, box: Box) -> npt.NDArray[Any]:
        if is_remote(self.uri):
            from brainsynth.storage.object_store import read_through

            stored = read_through(self.uri, lambda: np.asarray(self._array()[(row, *box)]))
        else:
            shard = "/".join(["c", str(row // self.samples_per_shard), *["0"] * len(self.shape)])
            local_file(self.uri, f"dataset.zarr/{self.name}/{shard}")
            stored = np.asarray(self._array()[(row, *box)])
        # A lost shard reads as fill value; no volume is constant (see describe_sample), and no label is 255.
        fill = 0 if stored.dtype.kind == "f" else int(self._array().fill_value)
        if not np.isfinite(stored).all() or (not stored.any() if fill == 0 else (stored == fill).any()):
            raise LostError("it is fill value")
        return stored

    def _array(self) -> Any:
        # One handle per process: a handle made before a fork must not be used after it.
        if self._opened is None or self._opened[0] != os.getpid():
            import zarr

            opened = zarr.open_array(zarr_store(self.uri), path=f"dataset.zarr/{self.name}", mode="r", zarr_format=3)
            self._opened = (os.getpid(), opened)
        return self._opened[1]
