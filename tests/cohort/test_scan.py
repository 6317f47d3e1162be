"""What a scan file may be, and that reading one costs no more memory than its voxels."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brainsynth.cohort import scan_file
from brainsynth.cohort.scan import ScanRejected, load_scan
from brainsynth.cohort.scan_file import FileRejected, read_volume
from tests.conftest import GRID

SHAPE = (12, 14, 16)
AFFINE = np.array([[0, -2.0, 0, 20], [3.0, 0, 0, -10], [0, 0, 1.5, 5], [0, 0, 0, 1]])


def voxels(dtype: type = np.int16) -> np.ndarray:
    return (np.arange(np.prod(SHAPE)).reshape(SHAPE) % 251).astype(dtype)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nii.bz2", ".mgh", ".mgz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32])
def test_every_single_file_kind_is_read_as_nibabel_reads_it(tmp_path: Path, suffix: str, dtype: type) -> None:
    kind = nib.MGHImage if suffix.startswith(".mg") else nib.Nifti1Image
    nib.save(kind(voxels(dtype), AFFINE), tmp_path / f"scan{suffix}")
    wanted = nib.as_closest_canonical(nib.load(tmp_path / f"scan{suffix}"))
    found, affine = read_volume(tmp_path / f"scan{suffix}", 64)
    np.testing.assert_array_equal(found, np.asarray(wanted.dataobj, np.float32))
    np.testing.assert_allclose(affine, wanted.affine)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
def test_scaled_values_of_either_byte_order(tmp_path: Path, kind: type, order: str) -> None:
    header = kind.header_class(endianness=order)
    header.set_data_dtype(np.int16)
    image = kind(voxels(np.float64) * 0.37 - 11, AFFINE, header)
    nib.save(image, tmp_path / "scan.nii.gz")
    found, _ = read_volume(tmp_path / "scan.nii.gz", 64)
    wanted = nib.as_closest_canonical(nib.load(tmp_path / "scan.nii.gz"))
    np.testing.assert_allclose(found, np.asarray(wanted.dataobj, np.float64), rtol=1e-6)


def test_extensions_are_skipped_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = nib.Nifti1Image(voxels(), AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension(32, b"<?xml version='1.0'?><CIFTI" + bytes(4000)))
    nib.save(image, tmp_path / "scan.nii.gz")
    monkeypatch.setattr(nib.nifti1.Nifti1Extensions, "from_fileobj", lambda *_: pytest.fail("parsed"))
    found, _ = read_volume(tmp_path / "scan.nii.gz", 64)
    assert found.max() == 250


def test_what_is_no_single_file_is_refused(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Pair(voxels(), AFFINE), tmp_path / "pair.hdr")
    with pytest.raises(FileRejected, match="a header without its voxels"):
        read_volume(tmp_path / "pair.hdr", 64)
    os.mkfifo(tmp_path / "pipe.nii")
    with pytest.raises(FileRejected, match="not a file"):
        read_volume(tmp_path / "pipe.nii", 64)
    with pytest.raises(FileRejected, match="unreadable"):
        read_volume(tmp_path / ("x" * 5000), 64)
    with pytest.raises(FileRejected, match="missing file"):
        read_volume(tmp_path / "nul\0byte.nii", 64)


def test_the_limit_is_on_the_volume_too(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((80, 80, 80), np.uint8), AFFINE), tmp_path / "scan.nii.gz")
    assert read_volume(tmp_path / "scan.nii.gz", 2)[0].shape == (80, 80, 80)
    with pytest.raises(FileRejected, match="volume larger than 1 MiB"):
        read_volume(tmp_path / "scan.nii.gz", 1)


def test_data_after_the_voxels(tmp_path: Path) -> None:
    raw = nib.Nifti1Image(voxels(), AFFINE).to_bytes()
    (tmp_path / "padded.nii.gz").write_bytes(gzip.compress(raw + bytes(1000)))
    assert read_volume(tmp_path / "padded.nii.gz", 64)[0].shape == (14, 12, 16)
    (tmp_path / "more.nii.gz").write_bytes(gzip.compress(raw + bytes(scan_file.MAX_TRAILING + 1)))
    with pytest.raises(FileRejected, match="far more than its header declares"):
        read_volume(tmp_path / "more.nii.gz", 64)


def test_a_mask_is_judged_like_a_scan(tmp_path: Path) -> None:
    image = np.zeros(GRID.shape_xyz, np.int16)
    image[5:15, 5:15, 5:15] = np.arange(10, dtype=np.int16)
    nib.save(nib.Nifti1Image(image, GRID.affine), tmp_path / "scan.nii")
    (tmp_path / "mask.nii").write_bytes(b"no mask at all")
    with pytest.raises(ScanRejected, match="mask: unreadable"):
        load_scan(str(tmp_path / "scan.nii"), str(tmp_path / "mask.nii"), GRID, "world", 512)


_MEASURE = """
import sys
from pathlib import Path
from brainsynth.cohort.scan_file import read_volume
status = lambda: Path("/proc/self/status").read_text()
mib = lambda field: int(status().split(f"{field}:")[1].split()[0]) / 1024
read_volume(Path(sys.argv[1]), 512)
Path("/proc/self/clear_refs").write_text("5")
before = mib("VmRSS")
data, _ = read_volume(Path(sys.argv[2]), 512)
print(mib("VmHWM") - before, data.shape)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured with Linux's /proc")
def test_a_whole_head_costs_its_voxels_once_as_stored_and_once_as_float(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    head = rng.integers(0, 200, (256, 256, 256), dtype=np.int16)
    nib.save(nib.Nifti1Image(head, np.eye(4)), tmp_path / "head.nii.gz")
    nib.save(nib.Nifti1Image(voxels(), AFFINE), tmp_path / "small.nii.gz")
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / "small.nii.gz"), str(tmp_path / "head.nii.gz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    extra_mib, shape = done.stdout.split(" ", 1)
    assert shape.strip() == "(256, 256, 256)"
    assert float(extra_mib) < (32 + 64) * 1.3
