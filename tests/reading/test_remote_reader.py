"""The reader on object storage: the same environment as for writing, in every process that reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brainsynth import open_dataset
from brainsynth.errors import UserError
from brainsynth.storage import object_store
from brainsynth.storage.filesystem import open_store
from tests.servers.fault_proxy import MIX, FaultProxy
from tests.storage.conftest import tiny_plan, values, write_dataset

OK_ROWS = [0, 1, 2, 3, 5, 6]
SHARD = "dataset.zarr/t1w/c/1/0/0/0"


@pytest.fixture
def remote_dataset(s3_root: str) -> str:
    """The address of a finished dataset of seven rows; row 4 is a reject."""
    write_dataset(open_store(s3_root), *tiny_plan(), bad=[4])
    return s3_root


def check_volumes(found: np.ndarray[Any, Any]) -> None:
    plan, _ = tiny_plan()
    np.testing.assert_array_equal(found, np.stack([values(plan, row).astype(np.float32) for row in OK_ROWS]))


@pytest.mark.parametrize("end", ["", "/"])
def test_samples_are_what_was_committed(remote_dataset: str, end: str) -> None:
    opened = open_dataset(remote_dataset + end)
    check_volumes(opened.volumes())
    assert [sample["sample_id"] for sample in opened] == [f"syn{row:06d}" for row in OK_ROWS]
    assert list(opened.table["row"]) == OK_ROWS


LOADER = """
import sys

import numpy as np
from torch.utils.data import DataLoader

import brainsynth

if __name__ == "__main__":
    opened = brainsynth.open_dataset(sys.argv[1])
    opened.volumes()  # opens the array here, before the workers start
    loader = DataLoader(opened.torch(), batch_size=2, num_workers=2, multiprocessing_context="forkserver", timeout=120)
    np.save(sys.argv[2], np.concatenate([batch["image"].numpy()[:, 0] for batch in loader]))
"""


def test_workers_of_a_dataloader(remote_dataset: str, tmp_path: Path) -> None:
    # In a program of its own: a fork server keeps the environment of its first use, here that of another test.
    (tmp_path / "loader.py").write_text(LOADER)
    command = [sys.executable, str(tmp_path / "loader.py"), remote_dataset, str(tmp_path / "read.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    check_volumes(np.load(tmp_path / "read.npy"))


def test_forked_workers_are_refused_instead_of_hanging(remote_dataset: str) -> None:
    from torch.utils.data import DataLoader

    opened = open_dataset(remote_dataset)
    loader = DataLoader(opened.torch(), num_workers=1, multiprocessing_context="fork", timeout=120)
    with pytest.raises(UserError, match="multiprocessing_context='forkserver'"):
        list(loader)


def test_reading_survives_a_store_that_fails(remote_dataset: str, faulty: FaultProxy) -> None:
    faulty.reset(MIX)
    for _ in range(5):
        check_volumes(open_dataset(remote_dataset).volumes())
    assert sum(faulty.counts().values()) > 5


def test_a_lost_shard_is_an_error_and_never_zeros(remote_dataset: str) -> None:
    open_store(remote_dataset).delete(SHARD)
    opened = open_dataset(remote_dataset)
    with pytest.raises(ValueError, match="the volume of row 3 is lost or damaged"):
        opened.volume(OK_ROWS.index(3))
    assert opened.volume(2).max() > 0.5


def test_there_is_no_dataset(s3_root: str) -> None:
    with pytest.raises(FileNotFoundError, match="there is no finished dataset at s3://"):
        open_dataset(s3_root)
    with pytest.raises(UserError, match="there is no such bucket"):
        open_dataset("s3://nowhere/dataset")


def test_refused_access(remote_dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_dataset(remote_dataset)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-0001")
    for action in (lambda: open_dataset(remote_dataset), lambda: opened.volume(0)):
        with pytest.raises(UserError, match="cannot read s3://.*HTTP 403.*check AWS_ACCESS_KEY_ID") as caught:
            action()
        assert "canary" not in str(caught.value)


def test_a_store_that_goes_down_while_reading(
    remote_dataset: str, faulty: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "ATTEMPTS", 3)
    opened = open_dataset(remote_dataset)
    faulty.reset({"error": 1.0})
    with pytest.raises(UserError, match=r"cannot read s3://.*HTTP 50[03]"):
        opened.volume(0)


def test_an_address_with_credentials_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must not carry credentials") as caught:
        open_dataset("s3://key:canary@bucket/dataset")
    assert "canary" not in str(caught.value)
