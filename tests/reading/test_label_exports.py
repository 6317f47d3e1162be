"""Exported label maps lie on their images, pass the formats' own validators, and their names and colors are there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import zarr

from brainsynth.errors import UserError
from brainsynth.export.formats import FORMATS
from tests.commands import tree
from tests.reading.conftest import OK_ROWS, ids, plan_of
from tests.reading.test_export import export
from tests.storage.conftest import BANDS

U8 = npt.NDArray[np.uint8]
FEW = "age < 40"
ROWS = [row for row in OK_ROWS if 30 + row * 1.5 < 40]


@pytest.mark.parametrize(
    ("to", "image", "labels"),
    [
        ("nifti", "sub-{}_T1w.nii.gz", "sub-{}_dseg.nii.gz"),
        ("bids", "sub-{0}/anat/sub-{0}_T1w.nii.gz", "derivatives/labels/sub-{0}/anat/sub-{0}_dseg.nii.gz"),
    ],
)
def test_nifti(labelled: Path, tmp_path: Path, label_maps: U8, to: str, image: str, labels: str) -> None:
    export(labelled, tmp_path, to, where=FEW)
    plan, _ = plan_of()
    for name, row in zip(ids(ROWS), ROWS, strict=True):
        scan: Any = nibabel.load(tmp_path / image.format(name))
        seg: Any = nibabel.load(tmp_path / labels.format(name))
        np.testing.assert_array_equal(np.asarray(seg.dataobj), label_maps[OK_ROWS.index(row)])
        assert seg.get_data_dtype() == np.uint8
        assert seg.header.get_intent()[0] == "label"
        np.testing.assert_array_equal(seg.affine, scan.affine)
        np.testing.assert_allclose(seg.affine, plan.volume.affine)
    table = pd.read_csv(tmp_path / FORMATS[to].label_folder / "dseg.tsv", sep="\t")  # type: ignore[index]
    assert list(table["name"]) == ["band 1", "band 2", "band 3"]
    people = pd.read_csv(tmp_path / "participants.tsv", sep="\t")
    counted = [(label_maps[OK_ROWS.index(row)] == 2).sum() * plan.volume.voxel_ml for row in ROWS]
    np.testing.assert_allclose(people["label_volume_band_2"], counted)
    columns = json.loads((tmp_path / "participants.json").read_text())
    assert set(people) == {"participant_id", *columns}
    assert "label maps: 3 structures, by bands of intensity" in (tmp_path / "README.md").read_text()


def test_bids_and_its_derivative_pass_the_real_validator(labelled: Path, tmp_path: Path) -> None:
    export(labelled, tmp_path / "bids", "bids", where=FEW)
    validator = Path(sys.executable).parent / "bids-validator-deno"
    if not validator.exists():
        pytest.skip("the BIDS validator is not installed: `pip install bids-validator-deno`")
    for folder in (tmp_path / "bids", tmp_path / "bids" / "derivatives" / "labels"):
        command = [str(validator), str(folder), "--format", "json"]
        judged = subprocess.run(command, capture_output=True, text=True, timeout=300)
        issues = json.loads(judged.stdout)["issues"]["issues"]
        assert [issue for issue in issues if issue["severity"] == "error"] == []
        assert judged.returncode == 0
    bad = next((tmp_path / "bids" / "derivatives" / "labels").rglob("*_dseg.nii.gz"))
    bad.rename(bad.with_name("labels.nii.gz"))  # the validator does look
    assert subprocess.run(command, capture_output=True, timeout=300).returncode != 0


def test_ome_zarr_has_a_labels_group(labelled: Path, tmp_path: Path, label_maps: U8) -> None:
    export(labelled, tmp_path, "ome-zarr", where=FEW)
    for name, row in zip(ids(ROWS), ROWS, strict=True):
        folder = tmp_path / f"sub-{name}_T1w.ome.zarr"
        group = zarr.open_group(str(folder), mode="r")
        values: Any = group["labels/dseg/0"]
        np.testing.assert_array_equal(np.asarray(values[:]).transpose(2, 1, 0), label_maps[OK_ROWS.index(row)])
        assert values.dtype == np.uint8
        assert group["labels"].attrs["ome"]["labels"] == ["dseg"]  # type: ignore[index, call-overload]
    models = pytest.importorskip(
        "ome_zarr_models.v05", reason="OME-Zarr's validator is not installed: `pip install ome-zarr-models`"
    )
    for folder in sorted(tmp_path.glob("*.ome.zarr")):
        opened = models.Image.from_zarr(zarr.open_group(str(folder), mode="r"))
        assert opened.labels is not None
        assert opened.labels.label_paths == ["dseg"]
        labels = models.ImageLabel.from_zarr(zarr.open_group(str(folder / "labels" / "dseg"), mode="r"))
        about = labels.ome_attributes.image_label
        assert [one.label_value for one in about.colors] == [1, 2, 3]
        assert tuple(about.colors[0].rgba) == (*BANDS.labels[0].rgb, 255)
        placed = [
            x.multiscales[0].datasets[0].coordinateTransformations
            for x in (opened.ome_attributes, labels.ome_attributes)
        ]
        assert placed[0] == placed[1]


def test_webdataset_has_a_member_for_them(labelled: Path, tmp_path: Path, label_maps: U8) -> None:
    wds = pytest.importorskip("webdataset", reason="webdataset is not installed: `pip install webdataset`")
    export(labelled, tmp_path, "webdataset")
    samples = list(wds.WebDataset(sorted(str(path) for path in tmp_path.glob("*.tar")), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == ids(OK_ROWS)
    for sample, labels in zip(samples, label_maps, strict=True):
        np.testing.assert_array_equal(sample["dseg.npy"], labels)
        assert sample["dseg.npy"].dtype == np.uint8


@pytest.mark.parametrize("to", FORMATS)
def test_without_labels_nothing_of_them_is_written(to: str, finished: Path, tmp_path: Path) -> None:
    export(finished, tmp_path, to, where=FEW)
    assert [name for name in tree(tmp_path) if "dseg" in name or "labels" in name] == []


def test_a_format_without_label_maps_does_not_speak_of_them(labelled: Path, tmp_path: Path) -> None:
    pytest.importorskip("pydicom", reason="pydicom is not installed")
    export(labelled, tmp_path, "dicom", where="age < 32")
    assert "without label maps" in (tmp_path / "README.md").read_text()
    assert "label maps: 3 structures" not in (tmp_path / "README.md").read_text()
    assert [name for name in tree(tmp_path) if "dseg" in name] == []


@pytest.mark.parametrize("to", FORMATS)
def test_a_damaged_label_map_takes_its_image_with_it(to: str, labelled: Path, tmp_path: Path) -> None:
    """Neither is exported without the other; repaired, the same command adds both."""
    root = tmp_path / "damaged"
    shutil.copytree(labelled, root)
    shard = "dataset.zarr/dseg/c/0/0/0/0"
    data = bytearray((root / shard).read_bytes())
    data[100] ^= 1
    (root / shard).write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"the label map of row \d is lost or damaged"):
        export(root, tmp_path / "out", to, where=FEW)
    done = export(root, tmp_path / "out", to, partial=True, where=FEW)
    (gone,) = done.left_out
    assert not [name for name in tree(tmp_path / "out") if gone in name]
    shutil.copyfile(labelled / shard, root / shard)
    export(root, tmp_path / "out", to, where=FEW)
    export(labelled, tmp_path / "undisturbed", to, where=FEW)
    assert tree(tmp_path / "out") == tree(tmp_path / "undisturbed")


def test_a_label_map_that_was_cut_since_is_written_again(labelled: Path, tmp_path: Path) -> None:
    export(labelled, tmp_path, "bids", where=FEW)
    before = tree(tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nii.gz")}
    cut = min(path for path in files if "dseg" in path.name)
    cut.write_bytes(b"x")
    export(labelled, tmp_path, "bids", where=FEW)
    assert tree(tmp_path) == before
    assert {path for path, then in files.items() if path.stat().st_mtime_ns != then} == {cut}
