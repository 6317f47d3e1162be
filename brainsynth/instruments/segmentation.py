"""The segmentation ruler: volumes on any grid → structures in ml, by a pretrained network that saw no generated image.

A volume is cut to what is not empty, brought to 1 mm by `brainsynth.volume.resample`, scaled to [0, 1], segmented, and
its voxels are counted. Volumes go through one by one: a 1 mm brain has millions of voxels, so batches would win no time,
and no volume's figures depend on its neighbours.

The network draws its borders elsewhere than other tools do, and elsewhere on blurred images than on sharp ones. So quote
calibrated volumes (`Calibration.fit`, on subjects of the same grid that are not measured later) with the ruler's own error
(`brainsynth.metrics.agreement.agreement`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

from brainsynth.config.evaluation import SegmentationConfig
from brainsynth.errors import UserError
from brainsynth.models import segmenter as networks
from brainsynth.models.device import able
from brainsynth.models.segmenter import STRUCTURES
from brainsynth.records import record
from brainsynth.storage.filesystem import resolve_uri
from brainsynth.storage.whole_file import file_sha256
from brainsynth.volume import VolumeSpec, resample

F32 = npt.NDArray[np.float32]

LATERAL_VENTRICLES = ("lateral ventricle", "inferior lateral ventricle")
VENTRICLES = (*LATERAL_VENTRICLES, "3rd ventricle", "4th ventricle")
BRAIN = tuple(name for name in STRUCTURES[1:] if name not in VENTRICLES)
"""Grey and white matter with cerebellum and brain stem; neither ventricles nor sulcal CSF."""

MARGIN_MM = 4
"""Empty rim around the brain; a wider one changes volumes by less than 0.1 % and costs time."""
WHITE_PERCENTILE = 99.5
"""This percentile of the voxels that are not empty becomes 1, as the network's specification asks for brains."""
_EMPTY = 0.02  # share of the 99.9th percentile below which a voxel is empty: decoders leave a haze where scans hold 0
# Limits of the flags, in ml. On scans of 96 adults, at 2 and at 4 mm, the network found 786 to 1506 ml of brain and 14 to
# 127 ml of ventricles; the landmarks below had at least four times these volumes, and vanish in a head turned wrongly.
_LEAST_BRAIN, _LEAST_VENTRICLES, _MOST_VENTRICLES, _PLAUSIBLE_BRAIN = 100.0, 1.0, 300.0, (550.0, 2200.0)
_LANDMARKS = {"thalamus": 2.5, "hippocampus": 1.4, "brain stem": 3.5, "cerebellum cortex": 16.0}
_WHOLE = 0.97  # share of the brain in its largest piece
_CUT_MM2 = 500.0  # brain on one face of the image


@record
class StructureVolumes:
    """What the ruler found in one volume."""

    ml: dict[str, float]
    """Volume of each of STRUCTURES but the background, in ml; NaN where nothing could be measured."""
    flags: tuple[str, ...] = ()
    """Doubts, such as `no ventricles`, gravest first; empty if there are none."""

    @property
    def lateral_ventricles_ml(self) -> float:
        """Lateral ventricles with inferior horns."""
        return math.fsum(self.ml[name] for name in LATERAL_VENTRICLES)

    @property
    def ventricles_ml(self) -> float:
        """Lateral ventricles with inferior horns, third and fourth ventricle."""
        return math.fsum(self.ml[name] for name in VENTRICLES)

    @property
    def brain_ml(self) -> float:
        """All of BRAIN."""
        return math.fsum(self.ml[name] for name in BRAIN)


@record
class Calibration:
    """reference = ml_per_ml * measured + offset_ml: the ruler's ml into those of a reference tool, on one kind of grid."""

    ml_per_ml: float
    offset_ml: float
    n: int
    """Scans it was fitted on; measure none of their subjects with it when the error is quoted."""

    @classmethod
    def fit(cls, measured_ml: npt.ArrayLike, reference_ml: npt.ArrayLike) -> Calibration:
        """Least squares over (N,) pairs in ml, N >= 8. Raises UserError on data that fix no line."""
        m, t = np.asarray(measured_ml, np.float64), np.asarray(reference_ml, np.float64)
        if m.shape != t.shape or m.ndim != 1 or len(m) < 8:
            raise UserError(f"a calibration needs two lists of at least 8 volumes, not {m.shape} and {t.shape}")
        if not (np.isfinite(m) & np.isfinite(t)).all():
            raise UserError("some volumes to calibrate on are not finite; leave those scans out and report how many")
        if np.ptp(m) <= 1e-9 * max(1.0, float(np.abs(m).max())):
            raise UserError("the measured volumes are all the same; calibrate on different ones")
        slope, offset = np.polyfit(m, t, 1)
        if slope <= 0:
            raise UserError("measured volumes fall where the reference grows; are both lists in the same order?")
        return cls(ml_per_ml=float(slope), offset_ml=float(offset), n=len(m))

    def apply(self, measured_ml: npt.ArrayLike, floor: float = 0.0) -> npt.NDArray[np.float64]:
        """Calibrated ml, never below the floor; NaN stays NaN."""
        return np.maximum(self.ml_per_ml * np.asarray(measured_ml, np.float64) + self.offset_ml, floor)


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentationRuler:
    """A loaded network, ready to measure. Make one with `load`."""

    segmenter: networks.Segmenter
    weights_sha256: str = ""
    """sha256 (hex) of the segmenter's file: two measurements compare only if it is the same."""

    @classmethod
    def load(cls, config: SegmentationConfig, device: torch.device, where: str = "segmentation") -> SegmentationRuler:
        """The network of a config on a device. Raises UserError when a file is missing or does not fit."""
        path = Path(resolve_uri(config.segmenter, f"{where}.segmenter"))
        segmenter = networks.load_segmenter(path, device, able(device, config.precision))
        return cls(segmenter=segmenter, weights_sha256=file_sha256(path))

    def segment(self, image: F32, grid: VolumeSpec) -> tuple[npt.NDArray[np.uint8], VolumeSpec]:
        """Labels of one volume, and the 1 mm grid that they are on.

        Args:
            image: (X, Y, Z) finite intensities on any scale, RAS+, on `grid`; a brain on an empty background.

        Raises:
            ValueError: the image is blank; `measure_labelled` flags such a volume instead.
        """
        fine, target = self._scaled(image, grid)
        return self.segmenter.labels(fine).cpu().numpy(), target

    def label_map(self, image: F32, grid: VolumeSpec) -> npt.NDArray[np.uint8]:
        """(X, Y, Z) labels of one volume on its own grid, whose voxels are whole millimetres and have their faces at such.

        Args:
            image: as for `segment`.

        Raises:
            ValueError: the image is blank, or the grid is another.
        """
        fine, target = self._scaled(image, grid)
        size = round(grid.spacing_mm[0])
        first = [
            (low - 0.5 * one - (origin - 0.5 * size)) / size
            for low, one, origin in zip(target.origin_mm, target.spacing_mm, grid.origin_mm, strict=True)
        ]
        rest = [abs(place - round(place)) for place in first] + [n % size for n in target.shape_xyz]
        if grid.spacing_mm != (float(size),) * 3 or max(rest) > 1e-3:
            raise ValueError(
                f"labels at 1 mm cannot be brought to voxels of {grid.spacing_mm} mm at {grid.origin_mm} mm"
            )
        coarse = self.segmenter.coarse_labels(fine, size).cpu().numpy()
        labels = np.zeros(grid.shape_xyz, np.uint8)
        inside, of_coarse = [], []
        for start, length, size_here in zip(map(round, first), coarse.shape, grid.shape_xyz, strict=True):
            inside.append(slice(max(0, start), min(start + length, size_here)))
            of_coarse.append(slice(max(0, -start), min(length, size_here - start)))
        labels[tuple(inside)] = coarse[tuple(of_coarse)]
        return labels

    def _scaled(self, image: F32, grid: VolumeSpec) -> tuple[torch.Tensor, VolumeSpec]:
        """The image as the network wants it, and its 1 mm grid."""
        kept = _foreground(image)
        if not kept.any():
            raise ValueError("a blank image cannot be segmented")
        scaled = np.clip(image / np.float32(np.percentile(image[kept], WHITE_PERCENTILE)), 0, 1)
        target = network_grid(kept, grid)
        return torch.from_numpy(np.ascontiguousarray(resample(scaled, grid.affine, target))), target

    def measure_labelled(
        self, image: npt.NDArray[Any], grid: VolumeSpec
    ) -> tuple[StructureVolumes, npt.NDArray[np.uint8], VolumeSpec]:
        """Structures of one (X, Y, Z) volume, the labels, and their grid.

        What cannot be measured is flagged: its volumes are NaN, its labels background alone.
        """
        if image.shape != grid.shape_xyz:
            raise UserError(f"a volume of shape {image.shape} is not on the grid given for it, {grid.shape_xyz}")
        image = np.asarray(image, np.float32)
        unknown, nothing = dict.fromkeys(STRUCTURES[1:], math.nan), np.zeros(image.shape, np.uint8)
        if not np.isfinite(image).all():
            return StructureVolumes(ml=unknown, flags=("not finite",)), nothing, grid
        if image.min() == image.max() or not _foreground(image).any():
            return StructureVolumes(ml=unknown, flags=("blank",)), nothing, grid
        labels, fine = self.segment(image, grid)
        volumes = StructureVolumes(ml=structure_ml(labels, fine.voxel_ml))
        return StructureVolumes(ml=volumes.ml, flags=quality_flags(volumes, labels, fine, grid)), labels, fine


def table_line(volumes: StructureVolumes) -> dict[str, float | str]:
    """Flat, for tables: three sums, each structure in ml, flags joined by `; `."""
    return {
        "ventricles_ml": volumes.ventricles_ml,
        "lateral_ventricles_ml": volumes.lateral_ventricles_ml,
        "brain_ml": volumes.brain_ml,
        **{structure_column(name): volume for name, volume in volumes.ml.items()},
        "flags": "; ".join(volumes.flags),
    }


def structure_column(name: str) -> str:
    """The column of a structure's volume."""
    return f"{name.replace(' ', '_').lower()}_ml"


def structure_ml(labels: npt.NDArray[np.uint8], voxel_ml: float) -> dict[str, float]:
    """Voxels of each label, any shape, times the volume of a voxel (ml); background left out."""
    counts = np.bincount(labels.ravel(), minlength=len(STRUCTURES))
    if len(counts) > len(STRUCTURES):
        raise ValueError(f"label {len(counts) - 1} is none of the {len(STRUCTURES)} structures")
    return {name: int(count) * voxel_ml for name, count in zip(STRUCTURES[1:], counts[1:], strict=True)}


def quality_flags(
    volumes: StructureVolumes, labels: npt.NDArray[np.uint8], fine: VolumeSpec, grid: VolumeSpec
) -> tuple[str, ...]:
    """Doubts about a segmentation: `labels` on the grid `fine`, of an image on `grid`."""
    if volumes.brain_ml < _LEAST_BRAIN:
        return ("no brain",)
    brain, flags = labels > 0, []
    if volumes.ventricles_ml < _LEAST_VENTRICLES:
        flags.append("no ventricles")
    if any(volumes.ml[name] < least for name, least in _LANDMARKS.items()):
        flags.append("landmarks missing")
    if not _PLAUSIBLE_BRAIN[0] <= volumes.brain_ml <= _PLAUSIBLE_BRAIN[1]:
        flags.append("implausible brain")
    if volumes.ventricles_ml > _MOST_VENTRICLES:
        flags.append("implausible ventricles")
    pieces, _ = ndimage.label(brain)
    if np.bincount(pieces.ravel())[1:].max() < _WHOLE * brain.sum():
        flags.append("brain in pieces")
    if _largest_cut_mm2(brain, fine, grid) > _CUT_MM2:
        flags.append("brain cut off")
    return tuple(flags)


def network_grid(kept: npt.NDArray[np.bool_], grid: VolumeSpec) -> VolumeSpec:
    """The 1 mm grid around the true voxels of `kept`, an array on `grid`, with an empty rim of MARGIN_MM."""
    low, size = _extent_mm(kept, grid)
    shape = [math.ceil(side - 1e-3) + 2 * MARGIN_MM for side in size]
    x, y, z = (float(edge - MARGIN_MM + 0.5) for edge in low)
    return VolumeSpec(shape_xyz=(shape[0], shape[1], shape[2]), spacing_mm=(1.0, 1.0, 1.0), origin_mm=(x, y, z))


def _extent_mm(kept: npt.NDArray[np.bool_], grid: VolumeSpec) -> tuple[list[float], list[float]]:
    """Lower edges and sizes (mm, world axes) of the box of the true voxels, faces of voxels counted in."""
    low, size = [], []
    for axis, (spacing, origin) in enumerate(zip(grid.spacing_mm, grid.origin_mm, strict=True)):
        planes = np.flatnonzero(kept.any(axis=tuple(other for other in range(3) if other != axis)))
        low.append(origin + (planes[0] - 0.5) * spacing)
        size.append((planes[-1] - planes[0] + 1) * spacing)
    return low, size


def _foreground(image: F32) -> npt.NDArray[np.bool_]:
    top = float(np.percentile(image, 99.9))
    return image > _EMPTY * top if top > 0 else np.zeros(image.shape, np.bool_)


def _largest_cut_mm2(brain: npt.NDArray[np.bool_], fine: VolumeSpec, grid: VolumeSpec) -> float:
    """Area of brain (mm²) on that face of the image's field of view where most of it lies."""
    largest = 0
    for axis in range(3):
        spacing, origin = grid.spacing_mm[axis], grid.origin_mm[axis]
        for edge, inward in ((origin - 0.5 * spacing, 1), (origin + (grid.shape_xyz[axis] - 0.5) * spacing, -1)):
            plane = math.floor(edge + 1.5 * inward - fine.origin_mm[axis] + 0.5)
            if 0 <= plane < brain.shape[axis]:
                largest = max(largest, int(brain.take(plane, axis).sum()))
    return float(largest)
