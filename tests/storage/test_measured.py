"""Measured values beside the manifest: put once, joined on request, and verified like everything else."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from brainsynth import open_dataset
from brainsynth.manifest import DatasetManifest
from brainsynth.records import unseal
from brainsynth.storage.filesystem import Store
from brainsynth.storage.finalise import DATASET_KEY
from brainsynth.storage.measured import put_measured, read_measured
from brainsynth.storage.repair import garbage, repair
from brainsynth.storage.verify import verify_dataset
from tests.storage.conftest import flip, tiny_plan, write_dataset


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty folder that can be opened twice."""
    return str(request.getfixturevalue("s3_root")) if request.param == "s3" else str(tmp_path / "dataset")


@pytest.fixture
def digest(store: Store) -> str:
    """A finished dataset of six volumes and a reject; the digest of its manifest."""
    write_dataset(store, *tiny_plan(), bad=[4])
    return unseal(DatasetManifest, store.read(DATASET_KEY), DATASET_KEY).shards_digest


def table(shift: float = 0.0) -> pd.DataFrame:
    """Values of some volumes, in another order than the dataset's."""
    ids = ["syn000005", "syn000000", "syn000002"]
    return pd.DataFrame({"sample_id": ids, "measured_age": [50 + shift, 20 + shift, None]})


def test_it_is_put_once_and_joined_on_request(store: Store, digest: str) -> None:
    key = put_measured(store, table(), digest, {"instruments": "one"})
    assert put_measured(store, table(), digest, {"instruments": "one"}) == key
    assert verify_dataset(store).ok
    assert garbage(store) == []
    assert "measured_age" not in open_dataset(store.uri).table
    read = open_dataset(store.uri, measured=True).table.set_index("sample_id")
    assert len(read) == 6
    assert read["measured_age"].to_dict() == pytest.approx(
        {f"syn00000{i}": {0: 20.0, 5: 50.0}.get(i, float("nan")) for i in (0, 1, 2, 3, 5, 6)}, nan_ok=True
    )
    assert read_measured(store.read(key), key, digest)[1] == {"instruments": "one"}


def test_another_evaluation_is_another_table(store: Store, digest: str) -> None:
    first = put_measured(store, table(), digest, {"instruments": "one"})
    second = put_measured(store, table(1.0), digest, {"instruments": "two"})
    assert first != second
    assert verify_dataset(store).ok
    with pytest.raises(ValueError, match="2 tables of measured values fit measured=True; there are: "):
        open_dataset(store.uri, measured=True)
    name = second.removeprefix("quality/measured-")[:8]
    assert open_dataset(store.uri, measured=name).table["measured_age"].max() == 51
    with pytest.raises(ValueError, match="0 tables"):
        open_dataset(store.uri, measured="xyz")


def test_none_is_told(store: Store, digest: str) -> None:
    with pytest.raises(ValueError, match="there are: none; `brainsynth evaluate` with publish: true makes one"):
        open_dataset(store.uri, measured=True)


def test_every_flipped_bit_is_corrupt_and_repair_removes_the_file(store: Store, digest: str) -> None:
    key = put_measured(store, table(), digest, {})
    whole = store.read(key)
    for bit in range(0, 8 * len(whole), 8 * len(whole) // 12):
        flip(store, key, bit)
        report = verify_dataset(store)
        assert [(p.kind, p.key) for p in report.problems] == [("corrupt", key)]
        with pytest.raises(ValueError, match="is damaged: its sha256"):
            _ = open_dataset(store.uri, measured=True).table
        store.write(key, whole)
    flip(store, key, 5)
    assert repair(store, verify_dataset(store)) == {}
    assert key not in dict(store.list())


def test_of_another_state_of_the_dataset(store: Store, digest: str) -> None:
    key = put_measured(store, table(), "0" * 64, {})
    (problem,) = verify_dataset(store).problems
    assert (problem.kind, problem.key) == ("corrupt", key)
    assert "another state" in problem.detail
    with pytest.raises(ValueError, match="another state"):
        _ = open_dataset(store.uri, measured=True).table


def test_other_files_in_the_folder_stay_unexpected(store: Store, digest: str) -> None:
    for key in ("quality/notes.txt", "quality/measured-00.parquet"):
        store.write(key, b"x")
        assert [(p.kind, p.key) for p in verify_dataset(store).problems] == [("unexpected", key)]
        store.delete(key)


def test_only_measured_columns_are_stored(store: Store, digest: str) -> None:
    with pytest.raises(ValueError, match=r"not \['age'\]"):
        put_measured(store, table().assign(age=1), digest, {})
