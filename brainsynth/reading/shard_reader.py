"""Read samples, or boxes of them, out of shard objects: only the chunks that a box touches, each checked by its crc32c.

zarr reads the same bytes (and reads here what has another layout), but spends more on a chunk than decoding it takes. A
shard ends in its index: for each chunk, in C order, offset and length as little-endian uint64, then the index's crc32c.
Format: Zarr v3 specification, codec `sharding_indexed`. A chunk that is not there is an error, never a fill value.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import blosc

from brainsynth.reading.cache import Cache, CachedParts
from brainsynth.reading.files import LocalParts, Parts, RemoteParts, is_remote

# As zarr sets it: threads of blosc would compete with the workers of a DataLoader.
blosc.use_threads = False

_CRC_BYTES, _BLOSC_HEADER_BYTES = 4, 16
_CACHED_INDICES = 256
_INNER, _INDEX = ["bytes", "blosc", "crc32c"], ["bytes", "crc32c"]
Box = tuple[slice, ...]


class LostError(ValueError):
    """Stored data is not there or not what was written."""


@dataclass(frozen=True)
class ShardLayout:
    """How an array lies in its shards."""

    samples_per_shard: int
    sample_shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: int = 0
    """In an array of integers, what a sample that is not there is full of; 0 says nothing, as images hold it too."""

    @property
    def grid(self) -> tuple[int, ...]:
        """Chunks of a sample along each axis."""
        return tuple(size // chunk for size, chunk in zip(self.sample_shape, self.chunk_shape, strict=True))


def shard_layout(zarr_json: bytes) -> ShardLayout | None:
    """The layout of an array whose metadata was judged (untrusted.py); None for another than arrays.py writes."""
    document = json.loads(zarr_json)
    shape, shard = document["shape"], document["chunk_grid"]["configuration"]["chunk_shape"]
    if [codec["name"] for codec in document["codecs"]] != ["sharding_indexed"] or list(shard[1:]) != list(shape[1:]):
        return None
    settings = document["codecs"][0]["configuration"]
    chunk = settings["chunk_shape"]
    names = [[codec["name"] for codec in settings[key]] for key in ("codecs", "index_codecs")]
    endian = [settings[key][0].get("configuration", {}).get("endian", "little") for key in ("codecs", "index_codecs")]
    separator = document["chunk_key_encoding"].get("configuration", {}).get("separator", "/")
    ours = names == [_INNER, _INDEX] and endian == ["little", "little"] and chunk[0] == 1
    ours &= settings.get("index_location", "end") == "end" and separator == "/"
    ours &= document["chunk_key_encoding"]["name"] == "default"
    if not ours or any(size % part for size, part in zip(shape[1:], chunk[1:], strict=True)):
        return None
    dtype = np.dtype(document["data_type"]).newbyteorder("<")
    fill = document["fill_value"] if dtype.kind == "u" and type(document.get("fill_value")) is int else 0
    return ShardLayout(int(shard[0]), tuple(shape[1:]), tuple(chunk[1:]), dtype, fill)


class ShardReader:
    """One array of a dataset; opens files in the process that reads, so it may be pickled and forked."""

    def __init__(self, uri: str, array: str, layout: ShardLayout, cache: Cache | None = None) -> None:
        self.uri, self.folder, self.layout, self.cache = uri, f"dataset.zarr/{array}", layout, cache
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "folder": self.folder, "layout": self.layout, "cache": self.cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._opened: Parts | None = None
        self._indices: OrderedDict[str, npt.NDArray[np.uint64]] = OrderedDict()
        self._lock = threading.Lock()  # of the indices, for readers that use threads

    def pieces(self, row: int, box: Box) -> Iterator[tuple[Box, npt.NDArray[Any]]]:
        """The pieces that make up a box of a sample: where each goes in the box, and its voxels in stored dtype.

        A piece is a view of a buffer that the next piece overwrites. Raises LostError, also for NaN where a sample is none.
        """
        layout, grid = self.layout, self.layout.grid
        wanted = list(_overlaps(box, layout.chunk_shape))
        position = row % layout.samples_per_shard
        places = [(position, *chunk) for chunk, _, _ in wanted]
        flat = np.ravel_multi_index(np.array(places).T, (layout.samples_per_shard, *grid))
        buffer = np.empty(layout.chunk_shape, layout.dtype)
        for (_, source, target), data in zip(wanted, self._encoded(row, flat), strict=True):
            self._decode(data, buffer)
            if np.isnan(buffer.flat[0]) or (layout.fill and buffer.flat[0] == layout.fill):
                raise LostError("it holds no volume")
            yield target, buffer[source]

    def _encoded(self, row: int, flat: npt.NDArray[np.intp]) -> list[bytes]:
        """The stored bytes of chunks of one sample, without their checksum, which fits."""
        if self._pid != os.getpid():
            self._forget()  # a client of an object store does not survive a fork
        if self._opened is None:
            self._opened = self._parts()
        zeros = ["0"] * len(self.layout.sample_shape)
        key = "/".join([self.folder, "c", str(row // self.layout.samples_per_shard), *zeros])
        known = key in self._indices
        try:
            spans = [(int(start), int(start + size)) for start, size in self._index(self._opened, key)[flat]]
            if any(stop - start <= _CRC_BYTES for start, stop in spans):
                raise LostError("a chunk of it is not there")
            return _checked(self._opened, key, spans)
        except FileNotFoundError:
            raise LostError("its shard is not there") from None
        except LostError:
            with self._lock:
                self._indices.pop(key, None)
            if not known:
                raise
        return self._encoded(row, flat)  # the shard may have been repaired since its index was read

    def _parts(self) -> Parts:
        if not is_remote(self.uri):
            return LocalParts(self.uri)
        return RemoteParts(self.uri) if self.cache is None else CachedParts(RemoteParts(self.uri), self.cache, _intact)

    def _index(self, parts: Parts, key: str) -> npt.NDArray[np.uint64]:
        """(chunks, 2) offset and length of every chunk of a shard."""
        with self._lock:
            if key in self._indices:
                self._indices.move_to_end(key)
                return self._indices[key]
        length = 16 * self.layout.samples_per_shard * math.prod(self.layout.grid) + _CRC_BYTES
        tail, end = parts.tail(key, length)
        if len(tail) < length:
            raise LostError("its shard is cut short")
        if not _intact(tail):
            raise LostError("its checksum differs")
        index = np.frombuffer(tail[:-_CRC_BYTES], "<u8").reshape(-1, 2)
        there = index[:, 0] != np.iinfo(np.uint64).max
        if (index[there] > end).any() or (index[there].sum(axis=1) > end).any():
            raise LostError("its shard's index points outside of it")
        index = np.where(there[:, None], index, 0).astype(np.uint64)
        with self._lock:
            self._indices[key] = index
            if len(self._indices) > _CACHED_INDICES:
                self._indices.popitem(last=False)
        return index

    def _decode(self, data: bytes, buffer: npt.NDArray[Any]) -> None:
        # Blosc 1 header, little-endian: 4 bytes of flags, decoded size, block size, encoded size.
        if len(data) < _BLOSC_HEADER_BYTES or struct.unpack_from("<I4xI", data, 4) != (buffer.nbytes, len(data)):
            raise LostError("a chunk has another size")
        try:
            blosc.decompress(data, buffer)
        except (RuntimeError, ValueError) as error:
            raise LostError(f"a chunk cannot be decoded: {error}") from None


def _checked(parts: Parts, key: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
    """What each span holds, without the crc32c that it ends in. Raises LostError when that is another."""
    # Read apart from its checksum: to cut that off afterwards would copy every byte once more.
    wanted = [part for start, stop in spans for part in ((start, stop - _CRC_BYTES), (stop - _CRC_BYTES, stop))]
    read = parts.read(key, wanted)
    for data, checksum in zip(read[::2], read[1::2], strict=True):
        if len(checksum) < _CRC_BYTES or google_crc32c.value(data) != int.from_bytes(checksum, "little"):
            raise LostError("its checksum differs")
    return read[::2]


def _intact(data: bytes) -> bool:
    """True for bytes that end in their crc32c."""
    body, checksum = data[:-_CRC_BYTES], data[-_CRC_BYTES:]
    return len(checksum) == _CRC_BYTES and google_crc32c.value(body) == int.from_bytes(checksum, "little")


def _overlaps(box: Box, chunk_shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], Box, Box]]:
    """(chunk, slices of the chunk, slices of the box) for every chunk that a box touches."""
    axes = []
    for part, size in zip(box, chunk_shape, strict=True):
        axis = []
        for chunk in range(part.start // size, -(-part.stop // size)):
            low, high = max(part.start, chunk * size), min(part.stop, (chunk + 1) * size)
            axis.append(
                (chunk, slice(low - chunk * size, high - chunk * size), slice(low - part.start, high - part.start))
            )
        axes.append(axis)
    for combined in itertools.product(*axes):
        chunks, sources, targets = zip(*combined, strict=True)
        yield chunks, sources, targets
