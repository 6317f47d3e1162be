"""What earlier versions stored is opened by this one: the same rows, the same voxels, a bundle that still generates."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brainsynth import open_dataset
from brainsynth.bundle.files import read_bundle
from brainsynth.errors import OtherVersion
from brainsynth.records import SCHEMA_VERSION, canonical_json
from brainsynth.stages.regenerate import regenerate
from brainsynth.storage.commit import commit_key
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.verify import verify_dataset
from tests.commands import brainsynth, tree
from tests.stored.__main__ import EXPECTED, VOXEL

HERE = Path(__file__).parent
VERSIONS = sorted(HERE.glob("v*"))


@pytest.fixture(params=VERSIONS, ids=lambda folder: folder.name)
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of what one version stored."""
    return Path(shutil.copytree(request.param, tmp_path / "stored"))


def expected(stored: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((stored / EXPECTED).read_text())
    return found


def test_what_this_version_writes_is_stored_too() -> None:
    assert [folder.name for folder in VERSIONS] == [f"v{version}" for version in range(1, SCHEMA_VERSION + 1)]


def test_a_dataset_opens_with_its_rows_and_voxels(stored: Path) -> None:
    dataset, asked = open_dataset(str(stored / "dataset")), expected(stored)
    assert len(dataset) == len(asked["covariates"]) == 6
    assert (dataset.manifest["plan_fingerprint"], dataset.manifest["shards_digest"]) == (asked["plan"], asked["shards"])
    for index, (row, sha, intensity) in enumerate(
        zip(asked["covariates"], asked["voxels"], asked["intensities"], strict=True)
    ):
        sample = dataset[index]
        assert {name: sample[name] for name in row} == row
        assert hashlib.sha256(dataset.stored(index).tobytes()).hexdigest() == sha
        assert float(sample["image"][VOXEL]) == intensity
        np.testing.assert_array_equal(sample["affine"], asked["affine"])
    partly = open_dataset(str(stored / "dataset"), partial=True)
    np.testing.assert_array_equal(partly.volumes(), dataset.volumes())


def test_a_dataset_is_whole(stored: Path) -> None:
    report = verify_dataset(open_store(str(stored / "dataset")))
    assert report.ok, report.summary()
    assert (report.shards, report.samples_ok) == (2, 6)


def test_a_bundle_makes_a_row_again(stored: Path) -> None:
    """On another kind of processor the voxels differ by rounding, so the bound is far above it and far below an image's."""
    assert read_bundle(stored / "bundle").digest == expected(stored)["bundle"]
    (row,) = regenerate(str(stored / "dataset"), str(stored / "bundle"), [4])
    assert row.as_recorded
    assert row.largest_difference < 0.01
    dataset = open_dataset(str(stored / "dataset"))
    assert np.abs(dataset.volume(4) - dataset.volume(3)).max() > 0.1


def test_records_say_which_schema_they_have(stored: Path) -> None:
    schemas = expected(stored)["schemas"]
    assert {schema.partition("/")[0] for schema in schemas.values()} == {
        "BundleSpec", "DatasetManifest", "ModelRecord", "Plan", "ShardManifest"
    }  # fmt: skip
    for key, schema in schemas.items():
        assert json.loads((stored / key).read_text())["schema"] == schema


def of_a_later_version(path: Path) -> str:
    """The record as the next version would seal it, with a field that this one does not know; returns its schema."""
    sealed = json.loads(path.read_text())
    name = sealed["schema"].partition("/")[0]
    content = {"record": sealed["record"] | {"later": 1}, "schema": f"{name}/{SCHEMA_VERSION + 1}"}
    sealed = {"sha256": hashlib.sha256(canonical_json(content)).hexdigest(), **content}
    path.write_text(json.dumps(sealed, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    return str(content["schema"])


@pytest.mark.parametrize("key", ["plan.json", "dataset.json", commit_key(1)])
def test_a_record_of_a_later_version_is_named_and_nothing_is_mended(
    key: str, stored: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = stored / "dataset"
    later = of_a_later_version(root / key)
    before = tree(root)
    assert brainsynth(monkeypatch, "verify", root, "--repair", "--failed") == 2
    told = capsys.readouterr().err
    assert f"{key} is a record {later!r}, this brainsynth reads '{later.partition('/')[0]}/{SCHEMA_VERSION}'" in told
    assert "use the version that wrote it, or a newer one" in told
    assert tree(root) == before
    if key != "dataset.json":
        (root / "dataset.json").unlink()  # a reader asks the plan and the commits only where this is missing
    with pytest.raises(OtherVersion, match=later):
        open_dataset(str(root), partial=True)


def test_a_bundle_of_a_later_version_is_named(stored: Path) -> None:
    later = of_a_later_version(stored / "bundle" / "bundle.json")
    with pytest.raises(OtherVersion, match=f"bundle.json is a record '{later}'.* use the version that wrote it"):
        read_bundle(stored / "bundle")
