"""Zarr v3 arrays, one whole shard at a time.

A shard is encoded in memory, so its digest is known before it is written and the write is one put. Every inner chunk ends
in a crc32c (else a flipped bit is silent); float arrays are filled with NaN and label maps with 255 (else a lost shard reads
as zeros).
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from numcodecs import blosc
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.core.indexing import morton_order_iter
from zarr.storage import MemoryStore

from brainsynth.errors import UserError
from brainsynth.labels import DSEG
from brainsynth.plan import ArraySpec, Plan, ShardSpec
from brainsynth.records import to_dict
from brainsynth.storage.filesystem import Store
from brainsynth.volume import StoredCodec

GROUP = "dataset.zarr"
_BLOSC: dict[StoredCodec, tuple[str, int]] = {"zstd-3": ("zstd", 3), "zstd-1": ("zstd", 1), "lz4": ("lz4", 5)}
_ABSENT, _CRC_BYTES = np.iinfo(np.uint64).max, 4
_DECODE_ERRORS = (ValueError, RuntimeError, OSError, IndexError, OverflowError)


def shard_key(array: ArraySpec, shard: int) -> str:
    """Where a shard's object lives, relative to the dataset's root."""
    return "/".join([GROUP, array.name, "c", str(shard), *["0"] * len(array.sample_shape)])


def metadata_keys(plan: Plan) -> list[str]:
    """Where the metadata of the group and of its arrays live."""
    return [f"{GROUP}/zarr.json", *(f"{GROUP}/{array.name}/zarr.json" for array in plan.arrays)]


def create_arrays(store: Store, plan: Plan) -> None:
    """Write the group's and the arrays' metadata; harmless to repeat, since equal plans give equal bytes.

    The group also holds the arrays' metadata (consolidated), without which xarray warns.
    """
    documents: dict[str, Any] = {}
    for array in plan.arrays:
        metadata = _memory_array(array, plan.num_samples, plan.samples_per_shard)[1]["zarr.json"].to_bytes()
        document = json.loads(metadata)
        document["attributes"] = {"brainsynth": _array_attributes(plan, array)}
        documents[array.name] = document
    group: dict[str, Any] = {"zarr_format": 3, "node_type": "group", "attributes": _group_attributes(plan)}
    group["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": documents}
    store.write_new(f"{GROUP}/zarr.json", _json(group))
    for name, document in documents.items():
        store.write_new(f"{GROUP}/{name}/zarr.json", _json(document))


def encode_shard(plan: Plan, array: ArraySpec, samples: npt.NDArray[Any], threads: int = 1) -> bytes:
    """The bytes of one shard object from its (n, *sample_shape) samples; equal samples give equal bytes.

    They are what zarr makes of them (a test compares), at less than its cost and in any number of threads. A shard is its
    chunks in Morton order, then offset and length of each in C order, and the checksum of that.
    """
    if samples.shape[1:] != array.sample_shape or samples.dtype != np.dtype(array.dtype):
        raise ValueError(
            f"{array.name}: got {samples.dtype}{samples.shape}, want {array.dtype}{('n', *array.sample_shape)}"
        )
    with ThreadPoolExecutor(threads) as pool:
        encoded = list(pool.map(lambda sample: _encoded_chunks(array, sample), samples))
    grid = [size // chunk for size, chunk in zip(array.sample_shape, array.chunk_shape, strict=True)]
    index = np.full((plan.samples_per_shard, *grid, 2), _ABSENT, "<u8")
    parts: list[bytes] = []
    end = 0
    for row, *place in morton_order_iter((plan.samples_per_shard, *grid)):
        if row < len(samples):
            chunk = encoded[row][tuple(place)]
            index[row, *place] = end, len(chunk) + _CRC_BYTES
            parts += [chunk, _checksum(chunk)]
            end += len(chunk) + _CRC_BYTES
    last = index.tobytes()
    return b"".join([*parts, last, _checksum(last)])


def _encoded_chunks(array: ArraySpec, sample: npt.NDArray[Any]) -> dict[tuple[int, ...], bytes]:
    """Each chunk of a sample, by its place, compressed."""
    name, level = _BLOSC[array.codec]
    cuts = [
        [slice(start, start + chunk) for start in range(0, size, chunk)]
        for size, chunk in zip(array.sample_shape, array.chunk_shape, strict=True)
    ]
    item, chunks = sample.dtype.itemsize, {}
    for place in itertools.product(*(range(len(axis)) for axis in cuts)):
        chunk = np.ascontiguousarray(sample[tuple(axis[i] for axis, i in zip(cuts, place, strict=True))])
        chunks[place] = blosc.compress(chunk, name.encode(), level, blosc.SHUFFLE, 0, item)
    return chunks


def _checksum(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(_CRC_BYTES, "little")


def decode_shard(plan: Plan, array: ArraySpec, shard: ShardSpec, data: bytes) -> npt.NDArray[Any]:
    """(n, *sample_shape) samples of a shard object. Raises ValueError when it is damaged."""
    if not data:
        raise ValueError("the shard cannot be decoded: it is empty")
    memory = _loaded(plan, array, shard, data)
    try:
        return np.asarray(memory[:])
    except _DECODE_ERRORS as error:
        raise ValueError(f"the shard cannot be decoded: {error}") from None


def decode_rows(plan: Plan, array: ArraySpec, shard: ShardSpec, data: bytes) -> list[npt.NDArray[Any] | None]:
    """Each sample of a shard object, None for those that a damage has reached."""
    try:
        return list(decode_shard(plan, array, shard, data))
    except ValueError:
        samples: list[npt.NDArray[Any] | None] = [None] * (shard.stop - shard.start)
    memory = _loaded(plan, array, shard, data)
    for row in range(len(samples) if data else 0):
        with contextlib.suppress(*_DECODE_ERRORS):
            samples[row] = np.asarray(memory[row])
    return samples


def _loaded(plan: Plan, array: ArraySpec, shard: ShardSpec, data: bytes) -> zarr.Array[Any]:
    """An array in memory whose only shard is `data`."""
    memory, stored = _memory_array(array, shard.stop - shard.start, plan.samples_per_shard)
    prototype = zarr.core.buffer.default_buffer_prototype()
    stored["/".join(["c", *["0"] * (len(array.sample_shape) + 1)])] = prototype.buffer.from_bytes(data)
    return memory


def empty_arrays(plan: Plan, shard: ShardSpec) -> list[npt.NDArray[Any]]:
    """Arrays of a shard before any sample is in: fill values."""
    return [np.full((shard.stop - shard.start, *a.sample_shape), a.fill_value, dtype=a.dtype) for a in plan.arrays]


def _memory_array(array: ArraySpec, num_samples: int, samples_per_shard: int) -> tuple[zarr.Array[Any], dict[str, Any]]:
    stored: dict[str, Any] = {}
    dtype = np.dtype(array.dtype)
    name, level = _BLOSC[array.codec]
    created = zarr.create_array(
        MemoryStore(stored),
        shape=(num_samples, *array.sample_shape),
        shards=(samples_per_shard, *array.sample_shape),
        chunks=(1, *array.chunk_shape),
        dtype=dtype,
        fill_value=array.fill_value,
        serializer=BytesCodec(endian="little") if dtype.itemsize > 1 else BytesCodec(endian=None),
        compressors=[BloscCodec(typesize=dtype.itemsize, cname=name, clevel=level, shuffle="shuffle"), Crc32cCodec()],  # type: ignore[arg-type]
        dimension_names=array.dimension_names,
        config={"write_empty_chunks": True},  # a shard of nothing but rejects is an object too
    )
    return created, stored


def _array_attributes(plan: Plan, array: ArraySpec) -> dict[str, Any]:
    labelled = {} if plan.labels is None or array.name != DSEG else {"labels": to_dict(plan.labels)}
    return {"kind": plan.kind, "plan_fingerprint": plan.fingerprint, **labelled}


def _group_attributes(plan: Plan) -> dict[str, Any]:
    """OME-Zarr 0.5 axes and scale of the first array, and our own affine (0.5 has no rotation or orientation)."""
    attributes: dict[str, Any] = {
        "brainsynth": {
            "schema_version": 1,
            "kind": plan.kind,
            "plan_fingerprint": plan.fingerprint,
            "affine": plan.volume.affine.tolist(),
            "axes": "RAS+",
            "value_range": [0.0, 1.0],
            "synthetic": plan.kind == "generated",
        }
    }
    if len(plan.arrays[0].sample_shape) == 3:
        space: Sequence[dict[str, str]] = [{"name": n, "type": "space", "unit": "millimeter"} for n in "xyz"]
        transforms = [
            {"type": "scale", "scale": [1.0, *plan.volume.spacing_mm]},
            {"type": "translation", "translation": [0.0, *plan.volume.origin_mm]},
        ]
        attributes["ome"] = {
            "version": "0.5",
            "multiscales": [
                {
                    "name": plan.arrays[0].name,
                    "axes": [{"name": "subject"}, *space],
                    "datasets": [{"path": plan.arrays[0].name, "coordinateTransformations": transforms}],
                }
            ],
        }
    return attributes


def _json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()


def check_array(plan: Plan, array: ArraySpec, shard: ShardSpec) -> tuple[int, ...]:
    """Shape that a shard's samples must have. Raises UserError for a shard that is not of the plan."""
    if shard != plan.shard(shard.index):
        raise UserError(f"shard {shard.index} with rows [{shard.start}, {shard.stop}) is not a shard of this plan")
    return (shard.stop - shard.start, *array.sample_shape)
