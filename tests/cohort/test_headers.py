"""Headers as programs write them: what decides where the data lie is used, or the scan is refused with the field's name."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from brainsynth.cohort.scan import ScanRejected, load_scan
from brainsynth.cohort.scan_file import FileRejected, read_volume
from tests.cohort.scans import GRID, Array, head

IMAGE = head(3).astype(np.int16)


def raw(affine: Array | None = GRID.affine, kind: Any = nib.Nifti1Image, **codes: int) -> bytearray:
    image = kind(IMAGE, affine)
    if "sform" in codes:
        image.set_sform(affine, codes["sform"])
    if "qform" in codes:
        image.set_qform(affine, codes["qform"])
    return bytearray(image.to_bytes())


def saved(folder: Path, data: bytes | bytearray, name: str = "scan.nii") -> Path:
    (folder / name).write_bytes(data)
    return folder / name


@pytest.mark.parametrize("offset", [0.0, 1.0, 348.0, 351.0, -352.0, 352.5, float("nan"), float("inf"), 1e9])
def test_data_that_begin_where_they_cannot(tmp_path: Path, offset: float) -> None:
    data = raw()
    data[108:112] = struct.pack("<f", offset)
    with pytest.raises(FileRejected, match="data offset|unreadable"):
        read_volume(saved(tmp_path, data), 64)


def test_the_offset_of_a_nifti_2_file(tmp_path: Path) -> None:
    data = raw(kind=nib.Nifti2Image)
    assert read_volume(saved(tmp_path, data), 64)[0].shape == IMAGE.shape
    data[168:176] = struct.pack("<q", 352)
    with pytest.raises(FileRejected, match="lies in the header, which ends at 544"):
        read_volume(saved(tmp_path, data), 64)


@pytest.mark.parametrize(("code", "millimetres"), [(0, 1.0), (2, 1.0), (1, 1000.0), (3, 0.001), (2 | 8, 1.0)])
def test_lengths_are_in_the_unit_that_the_header_names(tmp_path: Path, code: int, millimetres: float) -> None:
    affine = GRID.affine.copy()
    affine[:3] /= millimetres
    data = raw(affine)
    data[123] = code
    np.testing.assert_allclose(read_volume(saved(tmp_path, data), 64)[1], GRID.affine, rtol=1e-5)


@pytest.mark.parametrize(
    ("code", "message"), [(1, "5000 x 5000 x 5000 mm .*metre"), (3, "0.005 .*micro"), (5, "xyzt_units 5")]
)
def test_a_unit_that_cannot_be_is_refused(tmp_path: Path, code: int, message: str) -> None:
    data = raw()
    data[123] = code
    with pytest.raises(FileRejected, match=message):
        read_volume(saved(tmp_path, data), 64)


def test_without_a_form_code_left_and_right_are_unknown(tmp_path: Path) -> None:
    path = saved(tmp_path, raw(sform=0, qform=0))
    with pytest.raises(ScanRejected, match="orientation unknown.*source.assume_orientation"):
        load_scan(str(path), "", GRID, "world", 64)
    first, second = (load_scan(str(path), "", GRID, "foreground", 64, "robust", axes)[0] for axes in ("RAS", "LAS"))
    np.testing.assert_allclose(first[1:-1], second[::-1][1:-1], atol=0.02)
    plain = load_scan(str(saved(tmp_path, raw(), "plain.nii")), "", GRID, "foreground", 64, "robust")[0]
    np.testing.assert_allclose(first, plain, atol=0.02)


@pytest.mark.parametrize("axes", ["PSR", "LPI"])
def test_assumed_axes_are_those_of_the_array(tmp_path: Path, axes: str) -> None:
    _, affine = read_volume(saved(tmp_path, raw(sform=0, qform=0)), 64, axes)
    assert nib.aff2axcodes(affine) == ("R", "A", "S")  # turned to RAS+
    np.testing.assert_allclose(np.abs(np.diag(affine)[:3]), 5.0)


@pytest.mark.parametrize(("sform", "qform"), [(1, 0), (0, 1), (2, 4)])
def test_one_form_code_is_enough(tmp_path: Path, sform: int, qform: int) -> None:
    np.testing.assert_allclose(
        read_volume(saved(tmp_path, raw(sform=sform, qform=qform)), 64)[1], GRID.affine, atol=1e-3
    )


def test_forms_that_disagree(tmp_path: Path) -> None:
    image = nib.Nifti1Image(IMAGE, GRID.affine)
    moved = GRID.affine.copy()
    moved[:3, 3] += [0, 3, 4]
    image.set_qform(moved, 1)
    notes: dict[str, str | float] = {}
    np.testing.assert_allclose(read_volume(saved(tmp_path, image.to_bytes()), 64, None, notes)[1], GRID.affine)
    assert notes == {"forms_differ_mm": 5.0}
    mirror = GRID.affine @ np.diag([-1.0, 1, 1, 1])
    image.set_qform(mirror, 1)
    with pytest.raises(FileRejected, match="disagree on left and right"):
        read_volume(saved(tmp_path, image.to_bytes()), 64)


def test_an_mgh_file_without_its_orientation(tmp_path: Path) -> None:
    nib.save(nib.MGHImage(IMAGE.astype(np.float32), GRID.affine), tmp_path / "scan.mgz")
    data = bytearray(gzip.decompress((tmp_path / "scan.mgz").read_bytes()))
    data[28:30] = bytes(2)
    with pytest.raises(FileRejected, match="orientation unknown"):
        read_volume(saved(tmp_path, data, "scan.mgh"), 64)


@pytest.mark.parametrize("shape", [(1, 20, 20), (20, 20, 1), (20, 20), (20, 1, 20)])
def test_axes_of_one_row_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    image = nib.Nifti1Image(np.random.default_rng(0).integers(0, 99, shape).astype(np.int16), GRID.affine)
    with pytest.raises(FileRejected, match="implausible shape|not 3D"):
        read_volume(saved(tmp_path, image.to_bytes()), 64)


def test_bits_that_contradict_the_type(tmp_path: Path) -> None:
    data = raw()
    data[72:74] = struct.pack("<h", 8)
    with pytest.raises(FileRejected, match="bitpix is 8, the voxel type int16 has 16|unreadable"):
        read_volume(saved(tmp_path, data), 64)


STAND_INS = {
    "git-annex pointer": (b"/annex/objects/MD5E-s1048576--0123.nii.gz\n", "missing file: a git-annex pointer"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "missing file: a Git LFS"),
    "macOS metadata": (b"\0\5\x16\7\0\2\0\0Mac OS X        ", "metadata of macOS"),
    "web page": (b"<!DOCTYPE html><html>404</html>", "neither a NIfTI nor an MGH"),
    "DICOM": (bytes(128) + b"DICM" + bytes(600), "a DICOM file: convert the series to NIfTI"),
    "ANALYZE header": (struct.pack("<i", 348) + bytes(344), "an ANALYZE header .left and right unknown"),
    "packed twice": (gzip.compress(gzip.compress(bytes(900))), "compressed twice"),
    "link of a share": (b"XSym\n0012\nabc" + b" " * 1000, "missing file: a link of a Windows share"),
    "empty": (b"", "empty file"),
}


@pytest.mark.parametrize("kind", STAND_INS)
def test_a_file_that_stands_for_a_scan_is_named_as_what_it_is(tmp_path: Path, kind: str) -> None:
    data, message = STAND_INS[kind]
    with pytest.raises(FileRejected, match=message):
        read_volume(saved(tmp_path, data, "scan.nii.gz"), 64)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("../.git/annex/objects/x/MD5E-s1--x.nii.gz", "a git-annex link.*datalad get"),
        ("gone.nii", "a link to gone.nii"),
    ],
)
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, target: str, message: str) -> None:
    os.symlink(target, tmp_path / "scan.nii")
    with pytest.raises(FileRejected, match=f"^missing file: {message}"):
        read_volume(tmp_path / "scan.nii", 64)


def test_a_folder_in_the_place_of_a_scan_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "scan.nii").mkdir()
    with pytest.raises(FileRejected, match="^not a file: a folder"):
        read_volume(tmp_path / "scan.nii", 64)
