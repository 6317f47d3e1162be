"""Shard objects: the same bytes each time, and no damage goes unnoticed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import zarr

from brainsynth.errors import UserError
from brainsynth.plan import ShardSpec
from brainsynth.storage.arrays import _memory_array, check_array, create_arrays, decode_shard, encode_shard, shard_key
from brainsynth.storage.filesystem import open_store
from brainsynth.volume import StoredCodec
from tests.storage.conftest import commit, tiny_plan, values, write_dataset

DTYPES = ["float16", "float32", "uint16", "uint8"]


def shard_values(plan: Any, index: int) -> Any:
    shard = plan.shard(index)
    return np.stack([values(plan, row) for row in range(shard.start, shard.stop)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [0, 2])
def test_round_trip_whole_and_partly_filled(dtype: str, index: int) -> None:
    plan, _ = tiny_plan(dtype=dtype)
    stored = shard_values(plan, index)
    data = encode_shard(plan, plan.arrays[0], stored)
    found = decode_shard(plan, plan.arrays[0], plan.shard(index), data)
    assert found.dtype == np.dtype(dtype)
    assert len(found) == (3 if index == 0 else 1)
    np.testing.assert_array_equal(found, stored)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_samples_have_equal_bytes(dtype: str) -> None:
    plan, _ = tiny_plan(dtype=dtype)
    stored = shard_values(plan, 0)
    first = encode_shard(plan, plan.arrays[0], stored)
    assert encode_shard(plan, plan.arrays[0], np.asfortranarray(stored)) == first
    other = stored.copy()
    other[1, 2, 3, 4] = 0 if other[1, 2, 3, 4] else 1
    assert encode_shard(plan, plan.arrays[0], other) != first


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", get_args(StoredCodec))
@pytest.mark.parametrize("index", [0, 2])
def test_bytes_are_those_that_zarr_writes(dtype: str, codec: Any, index: int) -> None:
    """Whole and partly filled, in any number of threads, with chunks of several shapes."""
    plan, _ = tiny_plan(dtype=dtype)
    stored = shard_values(plan, index)
    for chunk in ((4, 5, 6), (2, 5, 3), (1, 1, 2)):
        array = replace(plan.arrays[0], codec=codec, chunk_shape=chunk)
        memory, objects = _memory_array(array, len(stored), plan.samples_per_shard)
        memory[:] = stored
        data = encode_shard(plan, array, stored, threads=2)
        assert data == objects["c/0/0/0/0"].to_bytes()
        np.testing.assert_array_equal(decode_shard(plan, array, plan.shard(index), data), stored)


def test_zeros_are_stored_as_data_and_not_left_out() -> None:
    plan, _ = tiny_plan(dtype="uint8")
    empty = np.zeros((3, 4, 5, 6), np.uint8)
    np.testing.assert_array_equal(
        decode_shard(plan, plan.arrays[0], plan.shard(0), encode_shard(plan, plan.arrays[0], empty)), empty
    )
    assert len(encode_shard(plan, plan.arrays[0], empty)) > 3 * 16


def test_wrong_shape_and_type_are_refused() -> None:
    plan, _ = tiny_plan()
    stored = shard_values(plan, 0)
    with pytest.raises(ValueError, match="want float16"):
        encode_shard(plan, plan.arrays[0], stored.astype(np.float32))
    with pytest.raises(ValueError, match="t1w: got"):
        encode_shard(plan, plan.arrays[0], stored[:, :3])


@pytest.mark.parametrize("shard", [(0, 0, 2), (1, 2, 5), (2, 6, 9), (0, 1, 3), (5, 15, 18)])
def test_a_shard_that_is_not_of_the_plan_is_refused(shard: tuple[int, int, int]) -> None:
    plan, _ = tiny_plan()
    index, start, stop = shard
    with pytest.raises(UserError, match="is not a shard of this plan"):
        check_array(plan, plan.arrays[0], ShardSpec(index=index, start=start, stop=stop))


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_a_flipped_bit_is_noticed_wherever_it_is(dtype: str) -> None:
    plan, _ = tiny_plan(dtype=dtype)
    data = encode_shard(plan, plan.arrays[0], shard_values(plan, 0))
    unnoticed = []
    for bit in np.random.default_rng(0).choice(len(data) * 8, 120, replace=False):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            decode_shard(plan, plan.arrays[0], plan.shard(0), bytes(damaged))
            unnoticed.append(int(bit))
        except ValueError as error:
            assert "cannot be decoded" in str(error)
    assert unnoticed == []


@pytest.mark.parametrize("left", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_object_is_noticed(left: float) -> None:
    plan, _ = tiny_plan()
    data = encode_shard(plan, plan.arrays[0], shard_values(plan, 0))
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode_shard(plan, plan.arrays[0], plan.shard(0), data[: int(left * len(data))])


def test_plain_zarr_reads_what_was_written(tmp_path: Any) -> None:
    plan, samples = tiny_plan()
    write_dataset(open_store(str(tmp_path)), plan, samples, bad=[4])
    group = zarr.open_group(str(tmp_path / "dataset.zarr"), mode="r")
    array = group["t1w"]
    assert isinstance(array, zarr.Array)
    assert (array.shape, array.shards, array.chunks) == ((7, 4, 5, 6), (3, 4, 5, 6), (1, 4, 5, 6))
    assert np.isnan(array.fill_value)
    for row in range(7):
        expected = np.full((4, 5, 6), np.nan, np.float16) if row == 4 else values(plan, row)
        np.testing.assert_array_equal(np.asarray(array[row]), expected)
    scale = group.attrs["ome"]["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]["scale"]
    assert scale == [1.0, 1.0, 2.0, 3.0]
    np.testing.assert_array_equal(group.attrs["brainsynth"]["affine"], plan.volume.affine)
    assert group.attrs["brainsynth"]["synthetic"] is True


def test_array_metadata_holds_what_makes_damage_visible(tmp_path: Any) -> None:
    plan, samples = tiny_plan()
    store = open_store(str(tmp_path))
    create_arrays(store, plan)
    before = store.read("dataset.zarr/t1w/zarr.json")
    create_arrays(store, plan)
    assert store.read("dataset.zarr/t1w/zarr.json") == before
    document = json.loads(before)
    assert document["fill_value"] == "NaN"
    (sharding,) = document["codecs"]
    assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["bytes", "blosc", "crc32c"]
    assert [codec["name"] for codec in sharding["configuration"]["index_codecs"]] == ["bytes", "crc32c"]
    commit(store, plan, samples, 1)
    assert store.read(shard_key(plan.arrays[0], 1))
    assert shard_key(plan.arrays[0], 1) == "dataset.zarr/t1w/c/1/0/0/0"
