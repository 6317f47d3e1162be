"""One scan file → one volume on the configured grid, or a reason why not."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from brainsynth.cohort.intensity import Brightness, robust_brightness
from brainsynth.cohort.intensity import ScanRejected as ScanRejected
from brainsynth.cohort.scan_file import FileRejected, read_volume
from brainsynth.volume import VolumeSpec, resample

HEAD_MM = 160.0
VERTEX_MM2 = 1000.0


def load_scan(
    path: str,
    mask_path: str,
    volume: VolumeSpec,
    center: str,
    max_file_mib: int,
    rule: str = "percentiles",
    assume: str | None = None,
) -> tuple[npt.NDArray[np.float32], dict[str, str | float]]:
    """The scan on the grid of `volume`, and what its record keeps of the file.

    Returns:
        float32 in the scan's own units, 0 outside; by the rule `robust` in units of the rough white, background 0. And
        `source_sha256`, `_bytes` and `_mtime` (of a mask, too), `forms_differ_mm` where sform and qform disagree, and by the
        rule `robust` the levels `black` and `white` in the scan's units.

    Raises:
        ScanRejected: with the reason.
    """
    if not path:
        raise ScanRejected("missing file")
    file = Path(path)
    facts: dict[str, str | float] = {}
    try:
        data, affine = read_volume(file, max_file_mib, assume, facts)
    except FileRejected as error:
        raise ScanRejected(str(error)) from None
    if float(data.min()) == float(data.max()):
        raise ScanRejected("constant image")
    mask = _mask(data.shape, affine, Path(mask_path), max_file_mib, assume) if mask_path else None
    if rule == "robust":
        found: Brightness = robust_brightness(data, mask)
        data = found.voxels
        facts |= {"black": found.black, "white": found.white}
    elif mask is not None:
        data = np.where(mask, data, 0).astype(np.float32)
    if center == "foreground":
        affine = centred(data, affine, volume)
    conformed = resample(data, affine, volume)
    if float(conformed.min()) == float(conformed.max()):
        raise ScanRejected("nothing of the image lies on the configured grid")
    facts |= _identity("source", file)
    if mask_path:
        facts |= _identity("mask", Path(mask_path))
    return conformed, facts


def _identity(which: str, file: Path) -> dict[str, str | float]:
    """By what a later run knows the file again: its digest, which is looked at where size or time differ."""
    status = file.stat()
    return {
        f"{which}_sha256": file_sha256(file),
        f"{which}_bytes": status.st_size,
        f"{which}_mtime": round(status.st_mtime, 6),
    }


def file_sha256(file: Path) -> str:
    """Digest (hex) of a file's bytes."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _mask(
    shape: tuple[int, ...], affine: npt.NDArray[np.float64], mask_file: Path, max_file_mib: int, assume: str | None
) -> npt.NDArray[np.bool_]:
    """Where the mask is above 0; it is a file from outside like the image."""
    try:
        mask, mask_affine = read_volume(mask_file, max_file_mib, assume)
    except FileRejected as error:
        reason = str(error)
        raise ScanRejected(
            reason.replace("missing file", "missing mask file")
            if reason.startswith("missing file")
            else f"mask: {reason}"
        ) from None
    if mask.shape != shape or not np.allclose(mask_affine, affine, atol=1e-3):
        raise ScanRejected("mask is on another grid than the image")
    inside: npt.NDArray[np.bool_] = mask > 0
    if not inside.any():
        raise ScanRejected("mask is empty")
    return inside


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
