"""NIfTI: one float32 .nii.gz a volume, and one uint8 .nii.gz with its label map."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from pathlib import Path

import nibabel
import numpy as np
import numpy.typing as npt

from brainsynth.export.file_format import ExportedVolume, FileFormat
from brainsynth.volume import VolumeSpec

GZIP_LEVEL = 1


HEADER_BYTES = 348


def nifti_bytes(image: npt.NDArray[np.float32 | np.uint8], volume: VolumeSpec, whose: str) -> bytes:
    """(X, Y, Z) intensities or labels (uint8) → an uncompressed .nii: sform and qform are the affine (code 2, aligned).

    `whose`: of whom a generated image is; empty for a scan.
    """
    nifti = nibabel.Nifti1Image(image, volume.affine)
    nifti.set_sform(volume.affine, code=2)
    nifti.set_qform(volume.affine, code=2)
    nifti.header.set_xyzt_units("mm")
    nifti.header["descrip"] = f"AI-generated, {whose}; brainsynth" if whose else "brainsynth"
    if image.dtype == np.uint8:
        nifti.header.set_intent("label")
    else:
        nifti.header["cal_max"] = 1.0
    data: bytes = nifti.to_bytes()
    return data


def packed_nifti(image: npt.NDArray[np.float32 | np.uint8], volume: VolumeSpec, whose: str) -> bytes:
    """`nifti_bytes` as a .nii.gz; equal volumes give equal bytes."""
    return gzip.compress(nifti_bytes(image, volume, whose), GZIP_LEVEL, mtime=0)


def _write(path: Path, volumes: Iterable[ExportedVolume]) -> None:
    (volume,) = volumes
    _write_array(path, volume.image, volume)


def _write_labels(path: Path, volumes: Iterable[ExportedVolume]) -> None:
    (volume,) = volumes
    assert volume.labels is not None
    _write_array(path, volume.labels, volume)


def _write_array(path: Path, values: npt.NDArray[np.float32 | np.uint8], volume: ExportedVolume) -> None:
    path.write_bytes(packed_nifti(values, volume.grid, volume.whose))


FORMAT = FileFormat(
    path="sub-{id}_T1w.nii.gz",
    about="`sub-<id>_T1w.nii.gz`: float32 NIfTI",
    write=_write,
    label_path="sub-{id}_dseg.nii.gz",
    write_labels=_write_labels,
    bids_sidecar=True,
)
