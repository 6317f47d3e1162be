"""Exports that other fields read, each opened by a package that brainsynth did not write: voxels equal, and in place."""

from __future__ import annotations

import gzip
import importlib.util
import shutil
import subprocess
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import zarr

from brainsynth import cli
from brainsynth.errors import UserError
from brainsynth.export.plan import plan_export
from tests.reading.conftest import OK_ROWS, plan_of
from tests.reading.test_export import CHOSEN, OLDER_WOMEN, export, tree


def test_nifti_zarr_opens_as_nifti(finished: Path, tmp_path: Path, intensities: np.ndarray) -> None:
    niizarr = pytest.importorskip(
        "niizarr", reason="NIfTI-Zarr's own package is not installed: `pip install nifti-zarr`"
    )
    export(finished, tmp_path, "nifti-zarr", where=OLDER_WOMEN)
    plan, _ = plan_of()
    folders = sorted(tmp_path.glob("*.nii.zarr"))
    assert len(folders) == len(CHOSEN)
    for folder, row in zip(folders, CHOSEN, strict=True):
        niizarr.zarr2nii(str(folder), str(tmp_path / "back.nii"))
        image: Any = nibabel.load(tmp_path / "back.nii")
        np.testing.assert_array_equal(np.asarray(image.dataobj), intensities[OK_ROWS.index(row)])
        np.testing.assert_allclose(image.affine, plan.volume.affine)
        assert image.header.get_xyzt_units()[0] == "mm"


def test_nifti_zarr_holds_the_header_that_nifti_has(finished: Path, tmp_path: Path) -> None:
    export(finished, tmp_path / "zarr", "nifti-zarr", where=OLDER_WOMEN)
    export(finished, tmp_path / "nifti", "nifti", where=OLDER_WOMEN)
    (folder, *_), (file, *_) = sorted((tmp_path / "zarr").glob("*.zarr")), sorted((tmp_path / "nifti").glob("*.gz"))
    stored: Any = zarr.open_array(str(folder), path="nifti", mode="r")
    assert (stored.dtype, stored.shape) == (np.uint8, (348,))
    assert np.asarray(stored[:]).tobytes() == gzip.decompress(file.read_bytes())[:348]


def test_axes_have_the_orientation_of_rfc_4(finished: Path, tmp_path: Path) -> None:
    export(finished, tmp_path, "ome-zarr", where=OLDER_WOMEN)
    group = zarr.open_group(str(next(tmp_path.glob("*.ome.zarr"))), mode="r")
    ome: Any = group.attrs["ome"]
    towards = {axis["name"]: axis["orientation"] for axis in ome["multiscales"][0]["axes"]}
    names = {"x": "left-to-right", "y": "posterior-to-anterior", "z": "inferior-to-superior"}
    assert towards == {name: {"type": "anatomical", "value": value} for name, value in names.items()}


def test_dicom_opens_in_simpleitk_and_is_in_place(finished: Path, tmp_path: Path, intensities: np.ndarray) -> None:
    pytest.importorskip("pydicom", reason="pydicom is not installed: `pip install brainsynth[dicom]`")
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed: `pip install SimpleITK`")
    export(finished, tmp_path, "dicom", where=OLDER_WOMEN)
    plan, _ = plan_of()
    for row in CHOSEN:
        folder = tmp_path / f"sub-syn{row:06d}"
        reader = sitk.ImageSeriesReader()
        (series,) = reader.GetGDCMSeriesIDs(str(folder))
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder), series))
        image = reader.Execute()
        voxels = sitk.GetArrayFromImage(image).transpose(2, 1, 0)
        assert voxels.shape == plan.volume.shape_xyz
        wanted = intensities[OK_ROWS.index(row)]
        for place in np.random.default_rng(row).integers(0, plan.volume.shape_xyz, (200, 3)):
            x, y, z = plan.volume.affine[:3] @ [*place, 1]
            there = image.TransformPhysicalPointToContinuousIndex((-x, -y, z))  # ITK's world is LPS+
            np.testing.assert_allclose(there, np.round(there), atol=1e-6)
            assert voxels[tuple(np.round(there).astype(int))] == wanted[tuple(place)] * 2048
        assert voxels.sum() == wanted.sum(dtype=np.float64) * 2048


def test_dicom_says_that_it_is_synthetic(finished: Path, tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed: `pip install brainsynth[dicom]`")
    export(finished, tmp_path, "dicom", where=OLDER_WOMEN)
    folders = sorted(path for path in tmp_path.iterdir() if path.is_dir() and path.name.startswith("sub-"))
    seen: dict[str, set[str]] = {"series": set(), "study": set(), "instance": set()}
    for folder in folders:
        slices = [pydicom.dcmread(file) for file in sorted(folder.iterdir())]
        for image in slices:
            assert (image[0x0008, 0x001C].keyword, image.SyntheticData) == ("SyntheticData", "YES")
            assert image.ImageComments.startswith("AI-generated, of no real person, not for diagnosis.")
            assert (image.PatientSex, image.Modality) == ("F", "MR")
            assert image.file_meta.MediaStorageSOPInstanceUID == image.SOPInstanceUID
            assert pydicom.uid.UID(image.SOPInstanceUID).is_valid
        assert slices[0].PatientAge.endswith("Y")
        assert len({image.SeriesInstanceUID for image in slices}) == 1
        seen["series"].add(slices[0].SeriesInstanceUID)
        seen["study"].add(slices[0].StudyInstanceUID)
        seen["instance"] |= {image.SOPInstanceUID for image in slices}
    assert (len(seen["series"]), len(seen["study"])) == (len(folders), len(folders))
    assert len(seen["instance"]) == sum(len(list(folder.iterdir())) for folder in folders)


def test_dicom_passes_its_validator(finished: Path, tmp_path: Path) -> None:
    """Every image by dciodvfy, every series by dcentvfy. Of 2022, they do not know Synthetic Data (0008,001C) of 2024."""
    judge = shutil.which("dciodvfy")
    if judge is None:
        pytest.skip("DICOM's validator is not installed: `apt-get install dicom3tools`")
    export(finished, tmp_path, "dicom", where=OLDER_WOMEN)
    series = sorted(path for path in tmp_path.iterdir() if path.is_dir() and path.name.startswith("sub-"))

    def errors(command: str, *files: Path) -> list[str]:
        done = subprocess.run([command, *map(str, files)], capture_output=True, text=True, timeout=120)
        lines = (done.stdout + done.stderr).splitlines()
        assert command != judge or "MRImage" in lines  # it knew what to compare with
        return [line for line in lines if "Error" in line and "0x0008,0x001c" not in line]

    for folder in series:
        files = sorted(folder.iterdir())
        assert [errors(judge, file) for file in (files[0], files[-1])] == [[], []]
        assert errors("dcentvfy", *files) == []
    pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed: `pip install brainsynth[dicom]`")
    broken = pydicom.dcmread(files[0])
    del broken.PatientPosition
    broken.save_as(tmp_path / "broken.dcm")
    assert errors(judge, tmp_path / "broken.dcm") != []


def test_dicom_twice_has_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("pydicom", reason="pydicom is not installed: `pip install brainsynth[dicom]`")
    for name in ("a", "b"):
        export(finished, tmp_path / name, "dicom", where=OLDER_WOMEN)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_without_pydicom_nothing_is_begun(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "pydicom" else find(name, *more)
    )
    with pytest.raises(UserError, match=r"--to dicom needs pydicom.*pip install 'brainsynth\[dicom\]'"):
        plan_export(str(finished), str(tmp_path / "out"), "dicom")
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(finished), "--to", "dicom", "--output", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert not (tmp_path / "out").exists()
