"""One scan file → one volume on the configured grid, or a reason why not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from brainsynth.cohort.intensity import Brightness, robust_brightness, robust_white, scale_intensities
from brainsynth.cohort.intensity import ScanRejected as ScanRejected
from brainsynth.cohort.scan_file import FileRejected, read_volume
from brainsynth.config.schema import PreparationConfig
from brainsynth.labels import BACKGROUND, LabelTable
from brainsynth.storage.whole_file import file_sha256
from brainsynth.volume import VolumeSpec, resample, resample_labels

HEAD_MM = 160.0
VERTEX_MM2 = 1000.0
MISSING_LABELS = "missing label map"


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
        `source_sha256`, `_bytes` and `_mtime` (of mask and label map, too), `forms_differ_mm` where sform and qform
        disagree, and by the rule `robust` the levels `black` and `white` in the scan's units.

    Raises:
        ScanRejected: with the reason.
    """
    image, _, facts = load_labelled_scan(path, mask_path, "", None, volume, center, max_file_mib, rule, assume)
    return image, facts


def load_labelled_scan(
    path: str,
    mask_path: str,
    label_path: str,
    table: LabelTable | None,
    volume: VolumeSpec,
    center: str,
    max_file_mib: int,
    rule: str,
    assume: str | None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8] | None, dict[str, str | float]]:
    """As `load_scan`, with the scan's label map where a table is given: on the same grid, as the table stores it."""
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
    labels = None if table is None else _labels(table, data.shape, affine, Path(label_path), max_file_mib, assume)
    if labels is not None and mask is not None:
        labels[~mask] = BACKGROUND
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
    if labels is not None:
        facts |= _identity("labels", Path(label_path))
    return conformed, None if labels is None else resample_labels(labels, affine, volume), facts


def scaled(image: npt.NDArray[np.float32], rule: str, percentiles: tuple[float, float]) -> npt.NDArray[np.float32]:
    """A loaded scan's intensities in [0, 1], by the rule that it was loaded with. Raises ScanRejected."""
    return robust_white(image, percentiles[1]) if rule == "robust" else scale_intensities(image, percentiles)


def prepared_scan(
    path: str, mask_path: str, volume: VolumeSpec, preparation: PreparationConfig, max_file_mib: int = 1024
) -> tuple[npt.NDArray[np.float32], str]:
    """One scan as the cohort of a bundle would give it back, and the sha256 of its file. Raises ScanRejected."""
    rule = preparation.intensity_rule
    image, facts = load_scan(path, mask_path, volume, preparation.center, max_file_mib, rule)
    stored = volume.quantise(scaled(image, rule, preparation.intensity_percentiles))
    return volume.dequantise(stored), str(facts["source_sha256"])


def load_label_map(
    path: str, table: LabelTable, volume: VolumeSpec, max_file_mib: int = 1024
) -> tuple[npt.NDArray[np.uint8], float]:
    """A label map without its scan, on the grid of `volume` as the table stores it.

    Returns the map, and which share of what it labels lies on that grid. Raises ScanRejected.
    """
    try:
        data, affine = read_volume(Path(path), max_file_mib)
    except FileRejected as error:
        raise ScanRejected(str(error)) from None
    labels = _as_stored(data, table)
    if not labels.any():
        raise ScanRejected("label map: all background")
    return resample_labels(labels, affine, volume), _share_inside(labels, affine, volume)


def _share_inside(labels: npt.NDArray[np.uint8], affine: npt.NDArray[np.float64], volume: VolumeSpec) -> float:
    """Of the labelled voxels, those whose centre lies in a voxel of the grid."""
    places = np.argwhere(labels)
    to_grid = np.linalg.inv(volume.affine) @ affine
    cells = np.rint(places @ to_grid[:3, :3].T + to_grid[:3, 3])
    return float(((cells >= 0) & (cells < volume.shape_xyz)).all(1).mean())


def _identity(which: str, file: Path) -> dict[str, str | float]:
    """By what a later run knows the file again: its digest, which is looked at where size or time differ."""
    status = file.stat()
    return {
        f"{which}_sha256": file_sha256(file),
        f"{which}_bytes": status.st_size,
        f"{which}_mtime": round(status.st_mtime, 6),
    }


def _mask(
    shape: tuple[int, ...], affine: npt.NDArray[np.float64], mask_file: Path, max_file_mib: int, assume: str | None
) -> npt.NDArray[np.bool_]:
    """Where the mask is above 0."""
    mask = _on_the_grid_of_the_scan("mask", "missing mask file", shape, affine, mask_file, max_file_mib, assume)
    inside: npt.NDArray[np.bool_] = mask > 0
    if not inside.any():
        raise ScanRejected("mask is empty")
    return inside


def _labels(
    table: LabelTable,
    shape: tuple[int, ...],
    affine: npt.NDArray[np.float64],
    label_file: Path,
    max_file_mib: int,
    assume: str | None,
) -> npt.NDArray[np.uint8]:
    """The label map with the integers of the table."""
    read = _on_the_grid_of_the_scan("label map", MISSING_LABELS, shape, affine, label_file, max_file_mib, assume)
    return _as_stored(read, table)


def _as_stored(read: npt.NDArray[np.float32], table: LabelTable) -> npt.NDArray[np.uint8]:
    """The integers of a file as the table stores them."""
    broken = read != np.rint(read)
    if broken.any():
        raise ScanRejected(f"label map: {read[broken][0]:g} is not a whole number")
    known = table.index_of
    largest = max(known)
    outside = np.unique(read[(read < 0) | (read > largest)]).astype(int).tolist()
    places = np.clip(read, 0, largest).astype(np.int32)
    within = np.flatnonzero(np.bincount(places.reshape(-1))).tolist()
    unknown = sorted({*outside, *within} - known.keys())
    if unknown:
        more = ", …" if len(unknown) > 10 else ""
        raise ScanRejected(f"label map: the label table lacks {', '.join(map(str, unknown[:10]))}{more}")
    stored = np.zeros(largest + 1, np.uint8)
    stored[list(known)] = list(known.values())
    return stored[places]


def _on_the_grid_of_the_scan(
    what: str,
    missing: str,
    shape: tuple[int, ...],
    affine: npt.NDArray[np.float64],
    file: Path,
    max_file_mib: int,
    assume: str | None,
) -> npt.NDArray[np.float32]:
    """Another file of the same scan; from outside like the image."""
    try:
        read, its_affine = read_volume(file, max_file_mib, assume)
    except FileRejected as error:
        reason = str(error)
        raise ScanRejected(
            reason.replace("missing file", missing) if reason.startswith("missing file") else f"{what}: {reason}"
        ) from None
    if read.shape != shape or not np.allclose(its_affine, affine, atol=1e-3):
        raise ScanRejected(f"{what} is on another grid than the image")
    return read


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
