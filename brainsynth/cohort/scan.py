"""One scan file → one volume on the configured grid, or a reason why not."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, SpatialImage
from scipy import ndimage

from brainsynth.volume import VolumeSpec, resample

MAX_AXIS = 1024
HEAD_MM = 160.0
VERTEX_MM2 = 1000.0
_READ_ERRORS = (
    OSError,
    EOFError,
    zlib.error,
    gzip.BadGzipFile,
    ImageFileError,
    HeaderDataError,
    ValueError,
    OverflowError,
)


class ScanRejected(Exception):
    """Why a scan is not usable, in a few words for the rejects table."""


def load_scan(
    path: str, mask_path: str, volume: VolumeSpec, center: str, max_file_mib: int
) -> tuple[npt.NDArray[np.float32], str]:
    """The scan on the grid of `volume` (float32, original units, 0 outside) and the sha256 of its file.

    Raises:
        ScanRejected: with the reason.
    """
    file = Path(path)
    if not path or not file.is_file():
        raise ScanRejected("missing file")
    if file.stat().st_size > max_file_mib << 20:
        raise ScanRejected(f"file larger than {max_file_mib} MiB")
    data, affine = _read(file)
    if float(data.min()) == float(data.max()):
        raise ScanRejected("constant image")
    if mask_path:
        mask, mask_affine = _read(Path(mask_path))
        if mask.shape != data.shape or not np.allclose(mask_affine, affine, atol=1e-3):
            raise ScanRejected("mask is on another grid than the image")
        data = np.where(mask > 0, data, 0).astype(np.float32)
    if center == "foreground":
        affine = centred(data, affine, volume)
    conformed = resample(data, affine, volume)
    if float(conformed.min()) == float(conformed.max()):
        raise ScanRejected("nothing of the image lies on the configured grid")
    with open(file, "rb") as handle:
        sha = hashlib.file_digest(handle, "sha256").hexdigest()
    return conformed, sha


def _read(file: Path) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """Voxels (float32, RAS+ order) and affine; the header is judged before any voxel is read."""
    try:
        _check_gzip(file)
        image: Any = nib.load(file)
        if not isinstance(image, SpatialImage):
            raise ScanRejected(f"not a volume: {type(image).__name__}")
        shape, affine = image.shape, np.asarray(image.affine, dtype=np.float64)
        spacing = _stored_spacing(image)
    except FileNotFoundError:
        raise ScanRejected("missing mask file") from None
    except _READ_ERRORS as error:
        raise ScanRejected(f"unreadable: {_short(error)}") from None
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise ScanRejected(f"not 3D: shape {tuple(image.shape)}")
    if min(shape) < 2 or max(shape) > MAX_AXIS:
        raise ScanRejected(f"implausible shape {tuple(shape)}")
    if np.dtype(image.get_data_dtype()).kind not in "iuf":
        raise ScanRejected(f"unsupported voxel type {image.get_data_dtype()}")
    if not np.isfinite(affine).all() or not np.isfinite(spacing).all() or min(spacing) <= 0:
        raise ScanRejected("zero or non-finite spacing")
    if abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        raise ScanRejected("singular affine")
    try:
        canonical = nib.as_closest_canonical(image)
        data = np.asarray(canonical.dataobj, dtype=np.float32)
    except _READ_ERRORS as error:
        raise ScanRejected(f"unreadable: {_short(error)}") from None
    data = data.reshape(data.shape[:3])
    if not np.isfinite(data).all():
        raise ScanRejected("NaN or infinite voxels")
    return data, np.asarray(canonical.affine, dtype=np.float64)


def _check_gzip(file: Path) -> None:
    """Read a compressed file to its end, where its checksum is: nibabel stops at the last voxel and never compares it."""
    with open(file, "rb") as plain:
        if plain.read(2) != b"\x1f\x8b":
            return
    with gzip.open(file) as stream:
        while stream.read(1 << 20):
            pass


def _stored_spacing(image: Any) -> npt.NDArray[np.float64]:
    """Voxel size along the stored axes. nibabel quietly turns a NIfTI's 0 into 1, so that is read from the file."""
    if not isinstance(image, nib.Nifti1Pair):
        return np.asarray(image.header.get_zooms()[:3], dtype=np.float64)
    holder = image.file_map.get("header", image.file_map["image"])
    with holder.get_prepare_fileobj("rb") as stream:
        header = type(image.header).from_fileobj(stream, check=False)
    return np.abs(np.asarray(header["pixdim"][1:4], dtype=np.float64))


def centred(
    data: npt.NDArray[np.float32], affine: npt.NDArray[np.float64], volume: VolumeSpec
) -> npt.NDArray[np.float64]:
    """The affine shifted so that the centroid of the head (or stripped brain) is the centre of the grid.

    Only the upper HEAD_MM below the vertex count: a scan holds more or less of the neck, which would pull the centroid down.
    """
    foreground = data > data.mean()
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    area_mm2 = foreground.sum((0, 1)) * spacing[0] * spacing[1]
    vertex = int(np.flatnonzero(area_mm2 > min(VERTEX_MM2, area_mm2.max() / 2)).max())
    foreground[:, :, : max(0, vertex - round(HEAD_MM / spacing[2]))] = False
    centroid = np.array(ndimage.center_of_mass(foreground))
    middle = (np.array(volume.shape_xyz) - 1) / 2
    shifted = affine.copy()
    shifted[:3, 3] += (volume.affine[:3, :3] @ middle + volume.affine[:3, 3]) - (
        affine[:3, :3] @ centroid + affine[:3, 3]
    )
    return shifted


def _short(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text.splitlines()[0][:120]
