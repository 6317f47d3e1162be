"""One NIfTI or MGH file → voxels and affine. The header is judged before any voxel is read; nothing else is parsed.

A file from outside may lie about its size, or be a few kilobytes that unpack to terabytes. So: the header comes from the
first 540 bytes, extensions and footers are skipped unread, the declared volume is bounded, and the rest of the file is
unpacked as a stream that must hold what the header declares, no less and hardly more. Memory: the stored voxels, once,
and their float32 copy.
"""

from __future__ import annotations

import bz2
import gzip
import zlib
from pathlib import Path
from typing import IO, Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.freesurfer.mghformat import MGHHeader
from nibabel.spatialimages import HeaderDataError

MAX_AXIS = 1024
MAX_OFFSET = 16 << 20
"""Bytes before the first voxel: the header and its extensions."""
MAX_TRAILING = 1 << 20
"""Bytes after the last voxel: a footer, padding."""
LARGE, MAX_RATIO = 128 << 20, 500
"""A volume above LARGE bytes that its file packs more than MAX_RATIO times is not a head; zeros pack 1000 times."""
_HEADER_BYTES = 540
_PIECE = 1 << 20
_READ_ERRORS = (OSError, EOFError, zlib.error, HeaderDataError, ValueError, TypeError, KeyError, OverflowError)
Affine = npt.NDArray[np.float64]


class FileRejected(Exception):
    """Why a file is not a usable volume, in a few words for the rejects table."""


def read_volume(file: Path, max_mib: int) -> tuple[npt.NDArray[np.float32], Affine]:
    """Voxels (float32, RAS+ order) and affine of one 3D image file.

    Args:
        max_mib: bound on the file, and on the volume that it unpacks to (at 4 bytes a voxel, or more if it stores more).

    Raises:
        FileRejected: with the reason.
    """
    try:
        if not file.is_file():
            raise FileRejected("missing file")
        size = file.stat().st_size
        if size > max_mib << 20:
            raise FileRejected(f"file larger than {max_mib} MiB")
        with _unpacked(file) as stream:
            head = stream.read(_HEADER_BYTES)
            header, spacing = _header(head)
            shape, dtype = _checked_shape(header), np.dtype(header.get_data_dtype())
            _check_size(shape, dtype, size, max_mib)
            affine = _checked_affine(header, spacing)
            slope, intercept = header.get_slope_inter()
            offset = int(header.get_data_offset())
            if not 0 <= offset <= MAX_OFFSET:
                raise FileRejected(f"implausible data offset {offset}")
            stored = _read_voxels(stream, head, offset, shape, dtype)
    except _READ_ERRORS as error:
        raise FileRejected(f"unreadable: {_short(error)}") from None
    return _canonical(_scaled(stored, slope, intercept), affine)


def _unpacked(file: Path) -> IO[bytes] | gzip.GzipFile:
    """The file's contents as a stream; by its first bytes, not by its name."""
    with open(file, "rb") as plain:
        magic = plain.read(3)
    if magic[:2] == b"\x1f\x8b":
        return gzip.open(file)
    return bz2.open(file) if magic == b"BZh" else open(file, "rb")


def _header(head: bytes) -> tuple[Any, npt.NDArray[np.float64]]:
    """The header object of a single-file NIfTI-1, NIfTI-2 or MGH image, and the voxel size along the stored axes.

    nibabel quietly turns a NIfTI's voxel size 0 into 1 when it checks a header: the size is that of the unchecked one.
    """
    if b"<GIFTI" in head:
        raise FileRejected("not a volume: GiftiImage")
    if head[344:347] == b"ni1" or head[4:7] == b"ni2":
        raise FileRejected("a header without its voxels: give one .nii or .nii.gz file")
    if head[344:348] == b"n+1\0" or (head[4:8] == b"n+2\0" and len(head) == _HEADER_BYTES):
        kind: Any = nib.Nifti1Header if head[344:348] == b"n+1\0" else nib.Nifti2Header
        block = head[: kind.template_dtype.itemsize]
        unchecked = kind(block, check=False)
        if np.isinf(unchecked["scl_slope"]):
            raise FileRejected("infinite intensity scale")
        return kind(block), np.abs(np.asarray(unchecked["pixdim"][1:4], dtype=np.float64))
    if head[:4] == b"\0\0\0\1" and len(head) > MGHHeader._hdrdtype.itemsize:
        # The footer, after the voxels, only holds scan parameters.
        header = MGHHeader(head[: MGHHeader._hdrdtype.itemsize] + bytes(MGHHeader._ftrdtype.itemsize))
        return header, np.asarray(header["delta"], dtype=np.float64)
    raise FileRejected("unreadable: neither a NIfTI nor an MGH file" if head else "unreadable: empty file")


def _checked_shape(header: Any) -> tuple[int, int, int]:
    declared = tuple(int(n) for n in header.get_data_shape())
    shape = declared
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise FileRejected(f"not 3D: shape {declared}")
    if min(shape) < 2 or max(shape) > MAX_AXIS:
        raise FileRejected(f"implausible shape {shape}")
    return (shape[0], shape[1], shape[2])


def _checked_affine(header: Any, spacing: npt.NDArray[np.float64]) -> Affine:
    affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    if not np.isfinite(affine).all() or not np.isfinite(spacing).all() or spacing.min() <= 0:
        raise FileRejected("zero or non-finite spacing")
    if abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        raise FileRejected("singular affine")
    return affine


def _check_size(shape: tuple[int, int, int], dtype: np.dtype[Any], file_bytes: int, max_mib: int) -> None:
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise FileRejected(f"unsupported voxel type {dtype}")
    declared = shape[0] * shape[1] * shape[2] * max(4, dtype.itemsize)
    if declared > max_mib << 20:
        raise FileRejected(f"volume larger than {max_mib} MiB: shape {shape}")
    if declared > LARGE and declared // max(4, dtype.itemsize) * dtype.itemsize > MAX_RATIO * file_bytes:
        raise FileRejected(f"implausible: {file_bytes} bytes for a volume of shape {shape}")


def _read_voxels(
    stream: IO[bytes] | gzip.GzipFile, head: bytes, offset: int, shape: tuple[int, int, int], dtype: np.dtype[Any]
) -> npt.NDArray[Any]:
    """The stored voxels. Reads the stream to its end: a compressed file has its checksum there."""
    count = shape[0] * shape[1] * shape[2] * dtype.itemsize
    for skipped in range(len(head), offset, _PIECE):
        stream.read(min(_PIECE, offset - skipped))
    # Not reserved at once: what a header declares becomes memory only as far as the file really holds it.
    voxels = bytearray(head[offset : offset + count])
    while len(voxels) < count:
        piece = stream.read(min(_PIECE, count - len(voxels)))
        if not piece:
            raise FileRejected(f"unreadable: the file ends after {len(voxels)} of {count} bytes of voxels")
        voxels += piece
    trailing = 0
    while piece := stream.read(_PIECE):
        trailing += len(piece)
        if trailing > MAX_TRAILING:
            raise FileRejected("unreadable: the file holds far more than its header declares")
    return np.frombuffer(voxels, dtype=dtype).reshape(shape, order="F")


def _scaled(stored: npt.NDArray[Any], slope: float | None, intercept: float | None) -> npt.NDArray[np.float32]:
    """float32 values, a slab at a time: only a slab is ever float64."""
    data = np.empty(stored.shape, np.float32, order="F")
    factor, shift = (1.0 if slope is None else slope), intercept or 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for z in range(stored.shape[2]):
            slab = stored[:, :, z]
            data[:, :, z] = slab if (factor, shift) == (1.0, 0.0) else slab.astype(np.float64) * factor + shift
            if not np.isfinite(data[:, :, z]).all():
                raise FileRejected("NaN or infinite voxels")
    return data


def _canonical(data: npt.NDArray[np.float32], affine: Affine) -> tuple[npt.NDArray[np.float32], Affine]:
    """Axes turned and flipped to the closest RAS+ order."""
    turns = nib.orientations.io_orientation(affine)
    turned = np.asarray(nib.orientations.apply_orientation(data, turns), dtype=np.float32)
    return turned, np.asarray(affine @ nib.orientations.inv_ornt_aff(turns, data.shape), dtype=np.float64)


def _short(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text.splitlines()[0][:120]
