"""One NIfTI or MGH file → voxels and affine. The header is judged before any voxel is read; nothing else is parsed.

A file from outside may lie about its size, or be a few kilobytes that unpack to terabytes. So: the header comes from the
first 540 bytes, extensions and footers are skipped unread, the declared volume is bounded, and the rest of the file is
unpacked as a stream that must hold what the header declares, no less and hardly more. Memory: the stored voxels, once,
and their float32 copy.

Every field that decides where the data lie or how the axes run is used, or the file is refused and the field named: data
offset, bits of a voxel, units (metres and micrometres become millimetres), form codes, handedness of sform and qform.
"""

from __future__ import annotations

import bz2
import gzip
import os
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
MIN_MM, MAX_MM = 0.02, 50.0
"""Length of a voxel's edge in a scan of a head."""
_UNITS = {0: ("unknown", 1.0), 1: ("metre", 1000.0), 2: ("mm", 1.0), 3: ("micrometre", 0.001)}
_HEADER_BYTES = 540
_PIECE = 1 << 20
_READ_ERRORS = (OSError, EOFError, zlib.error, HeaderDataError, ValueError, TypeError, KeyError, OverflowError)
_OTHERS = (
    (0, b"\0\5\x16\7", "not an image: metadata of macOS (AppleDouble, `._…`)"),
    (128, b"DICM", "a DICOM file: convert the series to NIfTI (dcm2niix)"),
    (0, b"NRRD", "an NRRD file: convert it to NIfTI"),
    (0, b"\x89HDF", "an HDF5 file (MINC 2?): convert it to NIfTI"),
    (0, b"\x1f\x8b", "compressed twice: unpack it once"),
    (0, b"XSym\n", "missing file: a link of a Windows share (XSym), its content is not here"),
    (0, b"IntxLNK", "missing file: a link of a Windows share (IntxLNK), its content is not here"),
)
"""(offset, first bytes, reason) of files that take the place of a scan."""
Affine = npt.NDArray[np.float64]


class FileRejected(Exception):
    """Why a file is not a usable volume, in a few words for the rejects table."""


def read_volume(
    file: Path, max_mib: int, assume: str | None = None, notes: dict[str, str | float] | None = None
) -> tuple[npt.NDArray[np.float32], Affine]:
    """Voxels (float32, RAS+ order) and affine of one 3D image file.

    Args:
        max_mib: bound on the file, and on the volume that it unpacks to (at 4 bytes a voxel, or more if it stores more).
        assume: the directions of the stored axes, such as `LAS`, where the file does not say; else that is refused.
        notes: takes what a record should keep of the header: `forms_differ_mm`, where sform and qform disagree.

    Raises:
        FileRejected: with the reason.
    """
    try:
        if not file.is_file():
            raise FileRejected(
                "not a file: a folder, or a device" if file.exists() else f"missing file{_dangling(file)}"
            )
        size = file.stat().st_size
        if size > max_mib << 20:
            raise FileRejected(f"file larger than {max_mib} MiB")
        with _unpacked(file) as stream:
            head = stream.read(_HEADER_BYTES)
            header, spacing, oriented = _header(head)
            shape, dtype = _checked_shape(header), np.dtype(header.get_data_dtype())
            _check_size(shape, dtype, size, max_mib)
            affine = _checked_affine(
                header, spacing, shape, None if oriented else _assumed(assume), {} if notes is None else notes
            )
            slope, intercept = header.get_slope_inter()
            stored = _read_voxels(stream, head, int(header.get_data_offset()), shape, dtype)
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


def _header(head: bytes) -> tuple[Any, npt.NDArray[np.float64], bool]:
    """The header of a single-file NIfTI-1, NIfTI-2 or MGH image, the voxel size along the stored axes, and whether it says
    how they lie.

    nibabel repairs a header when it checks it (voxel size 0 becomes 1, bitpix and offset fit): the unchecked one counts.
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
        _check_layout(unchecked)
        spacing = np.abs(np.asarray(unchecked["pixdim"][1:4], dtype=np.float64))
        return kind(block), spacing, max(int(unchecked["sform_code"]), int(unchecked["qform_code"])) > 0
    if head[:4] == b"\0\0\0\1" and len(head) > MGHHeader._hdrdtype.itemsize:
        # The footer, after the voxels, only holds scan parameters.
        header = MGHHeader(head[: MGHHeader._hdrdtype.itemsize] + bytes(MGHHeader._ftrdtype.itemsize))
        oriented = int.from_bytes(head[28:30], "big", signed=True) > 0  # goodRASFlag; without it nibabel makes one up
        return header, np.asarray(header["delta"], dtype=np.float64), oriented
    raise FileRejected(_what_it_is(head))


def _what_it_is(head: bytes) -> str:
    """The reason for a file that is not an image at all."""
    if not head:
        return "unreadable: empty file"
    if head.startswith(b"version https://git-lfs"):
        return "missing file: a Git LFS pointer, its content is not here (git lfs pull)"
    if b"/annex/objects/" in head[:256]:
        return "missing file: a git-annex pointer, its content is not here (datalad get, or git annex get)"
    if len(head) == 348 and head[:4] in (b"\x5c\1\0\0", b"\0\0\1\x5c"):
        return (
            "an ANALYZE header (left and right unknown), its voxels are elsewhere: convert the pair to one NIfTI file"
        )
    for place, mark, what in _OTHERS:
        if head[place:].startswith(mark):
            return what
    return "unreadable: neither a NIfTI nor an MGH file"


def _dangling(file: Path) -> str:
    """What is missing where a link leads nowhere."""
    if not file.is_symlink():
        return ""
    target = os.readlink(file)
    if "annex/objects" in target:
        return ": a git-annex link, its content is not here (datalad get, or git annex get)"
    return f": a link to {target[-80:]}, which is not there"


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


def _check_layout(header: Any) -> None:
    """Where the voxels of a NIfTI file begin, and what each takes."""
    declared, first = float(header["vox_offset"]), header.template_dtype.itemsize + 4
    if not declared.is_integer() or declared > MAX_OFFSET:
        raise FileRejected(f"implausible data offset (vox_offset) {declared:g}")
    if declared < first:
        raise FileRejected(f"data offset (vox_offset) {declared:g} lies in the header, which ends at {first}")
    bits, expected = int(header["bitpix"]), 8 * np.dtype(header.get_data_dtype()).itemsize
    if bits not in (0, expected):
        raise FileRejected(f"bitpix is {bits}, the voxel type {header.get_data_dtype()} has {expected}")


def _assumed(assume: str | None) -> str:
    if assume is None:
        raise FileRejected("orientation unknown: the header has no form code; see source.assume_orientation")
    return assume


def _checked_affine(
    header: Any,
    spacing: npt.NDArray[np.float64],
    shape: tuple[int, int, int],
    assume: str | None,
    notes: dict[str, str | float],
) -> Affine:
    """Voxel → world in mm; sform before qform, as everybody reads it, or as `assume` says. Adds to `notes` where they
    disagree."""
    if not np.isfinite(spacing).all() or spacing.min() <= 0:
        raise FileRejected("zero or non-finite spacing")
    unit, factor = _unit(header)
    if assume is not None:
        affine = _assumed_affine(assume, spacing, shape)
    else:
        affine = np.array(header.get_best_affine(), dtype=np.float64)
        _compare_forms(header, affine, shape, factor, notes)
    affine[:3] *= factor
    if not np.isfinite(affine).all():
        raise FileRejected("zero or non-finite spacing")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if np.abs(np.linalg.det(affine[:3, :3] / np.maximum(lengths, 1e-12))) < 1e-6:
        raise FileRejected("singular affine")
    if lengths.min() < MIN_MM or lengths.max() > MAX_MM:
        shown = " x ".join(f"{length:g}" for length in lengths)
        raise FileRejected(f"implausible voxel size {shown} mm (the header's unit: {unit})")
    return affine


def _unit(header: Any) -> tuple[str, float]:
    """The unit of length, and its millimetres."""
    code = 2 if isinstance(header, MGHHeader) else int(header["xyzt_units"]) & 7
    if code not in _UNITS:
        raise FileRejected(f"unknown unit of length: xyzt_units {int(header['xyzt_units'])}")
    return _UNITS[code]


def _assumed_affine(axes: str, spacing: npt.NDArray[np.float64], shape: tuple[int, int, int]) -> Affine:
    """Of axes with these directions; the middle of the array is the origin of the world."""
    affine = np.eye(4)
    affine[:3, :3] = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(tuple(axes)), shape)[:3, :3] * spacing
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def _compare_forms(
    header: Any, affine: Affine, shape: tuple[int, int, int], factor: float, notes: dict[str, str | float]
) -> None:
    """Refuse forms that take left for right; note by how much others disagree at the corners of the array."""
    if isinstance(header, MGHHeader) or int(header["sform_code"]) <= 0 or int(header["qform_code"]) <= 0:
        return
    try:
        other = np.asarray(header.get_qform(), dtype=np.float64)
    except (HeaderDataError, ValueError):
        return  # the sform counts
    if np.linalg.det(other[:3, :3]) * np.linalg.det(affine[:3, :3]) < 0:
        raise FileRejected("sform and qform disagree on left and right: one is the mirror image of the other")
    corners = np.array([[x, y, z, 1] for x in (0, shape[0]) for y in (0, shape[1]) for z in (0, shape[2])], float)
    apart = float(np.linalg.norm(corners @ (other - affine).T, axis=1).max()) * factor
    if np.isfinite(apart) and apart > 1.0:
        notes["forms_differ_mm"] = round(apart, 2)


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
