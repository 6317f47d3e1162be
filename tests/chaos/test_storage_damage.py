"""What is stored is damaged, lost or cannot be written: it is named, never guessed, and the same command goes on."""

from __future__ import annotations

import builtins
import errno
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from brainsynth import open_dataset
from brainsynth.config.schema import RuntimeConfig
from brainsynth.errors import UserError
from brainsynth.executors.dataset import make_dataset
from brainsynth.storage import filesystem
from brainsynth.storage.commit import commit_key, committed_shards, read_commit, read_plan
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.repair import repair
from brainsynth.storage.verify import verify_dataset
from tests.chaos.ledger import Finding, Ledger
from tests.chaos.noise import noise_work
from tests.chaos.test_generation_faults import PAIR, named
from tests.chaos.test_generation_faults import judge as judge_volumes
from tests.storage.conftest import tiny_plan, write_dataset

Size = Callable[[int, int], int]
SHARD, LABELS, RECORD = "dataset.zarr/t1w/c/1/0/0/0", "dataset.zarr/dseg/c/1/0/0/0", commit_key(1)
LOCAL = RuntimeConfig(workers=0)


@pytest.mark.parametrize(
    ("what", "key"), [("shard", SHARD), ("commit record", RECORD), ("shard of label maps", LABELS)]
)
def test_no_flip_and_no_truncation_is_silent(tmp_path: Path, ledger: Ledger, size: Size, what: str, key: str) -> None:
    write_dataset(open_store(str(tmp_path)), *tiny_plan(labels=key == LABELS))
    store, dice = open_store(str(tmp_path)), np.random.default_rng(5)
    whole, tries = store.read(key), size(15, 60)
    named = 0
    for number in range(2 * tries):
        damaged = bytearray(whole)
        if number < tries:
            bit = int(dice.integers(len(whole) * 8))
            damaged[bit // 8] ^= 1 << bit % 8
        else:
            damaged = damaged[: int(dice.integers(len(whole)))]
        store.write(key, bytes(damaged))
        problems = verify_dataset(store).problems
        named += [(p.kind, p.key, p.shard) for p in problems] == [("corrupt", key, 1)]
    store.write(key, whole)
    ledger.record(
        Finding(
            "corruption is never silent", f"{tries} bit flips + {tries} truncations of a {what}", 2 * tries,
            f"{named}/{2 * tries} detected and named", "all detected and named (480 over four kinds)",
            wrong=2 * tries - named,
        )
    )  # fmt: skip
    assert named == 2 * tries


def drop_chunk(data: bytes, chunk: int, chunks: int) -> bytes:
    """A shard object that has lost one inner chunk, with an index that says so and is itself intact."""
    size = 16 * chunks
    index = bytearray(data[-size - 4 : -4])
    index[16 * chunk : 16 * chunk + 16] = struct.pack("<QQ", 2**64 - 1, 2**64 - 1)
    return data[: -size - 4] + bytes(index) + struct.pack("<I", google_crc32c.value(bytes(index)))


@pytest.mark.parametrize(("dtype", "array"), [("float16", "t1w"), ("uint8", "t1w"), ("float16", "dseg")])
def test_lost_is_never_blank(tmp_path: Path, ledger: Ledger, dtype: str, array: str) -> None:
    def read(root: Path, row: int) -> Any:
        opened = open_dataset(str(root))
        return opened.label_map(row) if array == "dseg" else opened.volume(row)

    reported = refused = tries = 0

    def judge(root: Path, row: int, key: str) -> None:
        nonlocal reported, refused, tries
        tries += 1
        reported += any(p.key == key for p in verify_dataset(open_store(str(root))).problems)
        try:
            refused += not np.isfinite(read(root, row)).all()
        except (ValueError, FileNotFoundError):
            refused += 1

    plan, samples = tiny_plan(dtype=dtype, labels=array == "dseg")
    for row in range(plan.num_samples):
        index = row // 3
        object_key = f"dataset.zarr/{array}/c/{index}/0/0/0"
        for way in ("shard", "chunk"):
            root = tmp_path / f"{way}-{row}"
            store = open_store(str(root))
            write_dataset(store, plan, samples)
            if way == "shard":
                store.delete(object_key)
            else:
                store.write(object_key, drop_chunk(store.read(object_key), row % 3, 3))
            judge(root, row, object_key)
    for index in range(plan.num_shards):
        root = tmp_path / f"record-{index}"
        store = open_store(str(root))
        write_dataset(store, plan, samples)
        store.delete(commit_key(index))
        tries, refused = tries + 1, refused + 1  # the volume is whole, and reads as what it is
        reported += any(p.key == commit_key(index) for p in verify_dataset(store).problems)
        assert np.isfinite(read(root, 3 * index)).all()
    ledger.record(
        Finding(
            "lost ≠ blank", f"shard, chunk or record deleted ({dtype if array == 't1w' else 'label maps'})", tries,
            f"{reported}/{tries} reported; {refused}/{tries} reads give an error, NaN or the true volume",
            "100 % reported; never zeros", wrong=tries - min(reported, refused),
        )
    )  # fmt: skip
    assert reported == tries
    assert refused == tries


class FullDisk:
    """A disk that is full from its n-th change on, until there is space again; half of what was written last is there."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.left: float = float("inf")
        self.changes = 0
        for name in ("link", "replace", "fsync"):
            patch.setattr(filesystem.os, name, self._limited(getattr(filesystem.os, name)))
        patch.setattr(Path, "mkdir", self._limited(Path.mkdir))
        patch.setattr(filesystem, "open", self._open, raising=False)

    def _spend(self) -> None:
        self.changes += 1
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    def _limited(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def limited(*arguments: Any, **options: Any) -> Any:
            self._spend()
            return real(*arguments, **options)

        return limited

    def _open(self, path: Any, mode: str = "r") -> Any:
        handle = builtins.open(path, mode)  # noqa: SIM115
        if "x" in mode or "w" in mode:
            real = handle.write

            def write(data: bytes) -> int:
                try:
                    self._spend()
                except OSError:
                    real(data[: len(data) // 2])
                    raise
                return int(real(data))

            return _Writer(handle, write)
        return handle


class _Writer:
    def __init__(self, handle: Any, write: Callable[[bytes], int]) -> None:
        self.handle, self.write = handle, write

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handle, name)


@PAIR
def test_a_full_disk_tears_nothing(
    tmp_path: Path, ledger: Ledger, size: Size, monkeypatch: pytest.MonkeyPatch, labels: bool
) -> None:
    def run(root: Path) -> None:
        make_dataset(noise_work(str(root), 24, 2, 0.0, str(tmp_path / "diary"), labels=labels), LOCAL)

    run(tmp_path / "peace")
    truth = json.loads((tmp_path / "peace" / "dataset.json").read_text())["record"]["shards_digest"]
    torn = wrong = unclear = tries = 0
    with monkeypatch.context() as patch:
        disk = FullDisk(patch)
        run(tmp_path / "count")
        places, step = disk.changes, size(20, 1)
        assert places > 200
        for place in range(0, 200, step):
            root = tmp_path / f"full-{place}"
            tries += 1
            disk.left = place
            try:
                run(root)
                unclear += 1
            except UserError as error:
                unclear += "disk is full" not in str(error)
            disk.left = float("inf")
            store = open_store(str(root))
            for shard in committed_shards(store) if (root / "plan.json").exists() else ():
                try:
                    commit = read_commit(store, read_plan(store), shard)
                    torn += any(len(store.read(one.key)) != one.size_bytes for one in commit.objects)
                except (UserError, FileNotFoundError):
                    torn += 1
            run(root)
            wrong += json.loads((root / "dataset.json").read_text())["record"]["shards_digest"] != truth
            wrong += not verify_dataset(store).ok
            wrong += judge_volumes(root) != (0, 0, 0)
    ledger.record(
        Finding(
            "disk full", named(f"no space from the n-th change on, n = 0, {step}, … of {places}", labels), tries,
            f"{torn} torn commits, {unclear} unclear errors; {tries - wrong}/{tries} resumed to the same dataset",
            "0 torn commits; clear error; resumes when space is back", wrong=torn + wrong,
        )
    )  # fmt: skip
    assert (torn, wrong, unclear) == (0, 0, 0)


@PAIR
def test_a_repair_makes_the_damaged_rows_again_and_no_others(
    tmp_path: Path, ledger: Ledger, size: Size, labels: bool
) -> None:
    def run(root: Path) -> str:
        make_dataset(noise_work(str(root), 24, 4, 0.0, str(tmp_path / "diary"), labels=labels), LOCAL)
        return str(json.loads((root / "dataset.json").read_text())["record"]["shards_digest"])

    truth = run(tmp_path / "whole")
    dice, tries, wrong, rows_made = np.random.default_rng(7), size(6, 20), 0, 0
    for number in range(tries):
        root = tmp_path / f"hit-{number}"
        shutil.copytree(tmp_path / "whole", root)
        store = open_store(str(root))
        objects = sorted(key for key, _ in store.list("dataset.zarr") if "/c/" in key)
        key = objects[int(dice.integers(len(objects)))]
        data = bytearray(store.read(key))
        if number % 3 == 0:
            store.delete(key)
        else:
            data[int(dice.integers(len(data)))] ^= 1 << int(dice.integers(8))
            store.write(key, bytes(data))
        lost = repair(store, verify_dataset(store))
        rows_made += sum(map(len, lost.values()))
        wrong += list(lost) != [int(key.split("/c/")[1].split("/")[0])]
        wrong += run(root) != truth
        wrong += judge_volumes(root) != (0, 0, 0) or not verify_dataset(store).ok
        made_again = sum(
            int(read_commit(store, read_plan(store), shard).runtime.get("rows_remade", 4)) for shard in lost
        )
        wrong += made_again != sum(map(len, lost.values()))
    ledger.record(
        Finding(
            "repair", named("an object deleted, or one of its bits flipped", labels), tries,
            f"{rows_made} of {24 * tries} rows made again, only those that the damage reached; {tries - wrong}/{tries} then "
            "equal to the dataset before", "exactly the damaged rows; equal digests", wrong=wrong,
        )
    )  # fmt: skip
    assert wrong == 0
