"""A bundle's renderer on disk: it makes images of label maps, those that a user brings or those of generated volumes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from brainsynth.bundle.companion import Companion
from brainsynth.bundle.labeller import LABELLER, LabellerSpec
from brainsynth.config.architectures import RendererArchitecture
from brainsynth.covariates.schema import CovariateSchema
from brainsynth.labels import LabelTable
from brainsynth.records import digest, record
from brainsynth.volume import VolumeSpec


@record
class StructureRange:
    """What the label maps of a training have of a structure."""

    volume_ml: tuple[float, float]
    """Smallest and largest volume; 0 where a map lacks it."""
    lowest_mm: tuple[float, float, float] | None = None
    """World coordinates of its centre: along each axis the lowest. None where no map has it."""
    highest_mm: tuple[float, float, float] | None = None


@record
class RendererSpec:
    """A trained renderer: which structures it knows, on which grid, and how near its images come to scans."""

    schema_version: Literal[1] = 1
    architecture: RendererArchitecture
    labels: LabelTable
    structures: dict[str, StructureRange]
    """How large each is and where, in the label maps that it was trained on; by the label's key."""
    covariates: CovariateSchema
    """Which it may be asked for."""
    volume: VolumeSpec
    """The grid that it was trained on; its stored dtype does not matter."""
    weights_sha256: str
    provenance: dict[str, str | int | float]
    metrics: dict[str, float]
    """Of images of validation scans' label maps, compared with the scans."""

    @property
    def digest(self) -> str:
        """sha256 of the record; covers the weights through theirs."""
        return digest(self)


class Measured(NamedTuple):
    """A structure of a label map."""

    volume_ml: float
    centre_mm: npt.NDArray[np.float64]
    """World coordinates; NaN where the map lacks it."""


def measured_structures(labels: npt.NDArray[np.uint8], table: LabelTable, volume: VolumeSpec) -> dict[str, Measured]:
    """Volume and centre of each structure of an (X, Y, Z) label map, by its key."""
    flat = labels.reshape(-1)
    counts = np.bincount(flat, minlength=256)
    sums = [np.bincount(flat, axis.reshape(-1), minlength=256) for axis in np.indices(labels.shape, np.float64)]
    with np.errstate(invalid="ignore"):
        centres = np.stack(sums, axis=1) / counts[:, None] * volume.spacing_mm + volume.origin_mm
    return {
        label.key: Measured(float(counts[label.index]) * volume.voxel_ml, centres[label.index])
        for label in table.labels
    }


def structure_ranges(
    maps: Iterable[npt.NDArray[np.uint8]], table: LabelTable, volume: VolumeSpec
) -> dict[str, StructureRange]:
    """How large each structure is in these label maps, and where."""
    measured = [measured_structures(labels, table, volume) for labels in maps]
    ranges = {}
    for label in table.labels:
        ones = [one[label.key] for one in measured]
        volumes, there = [one.volume_ml for one in ones], [one.centre_mm for one in ones if one.volume_ml > 0]
        limits = [tuple(np.round(end(there, 0), 3).tolist()) for end in (np.min, np.max)] if there else [None, None]
        ranges[label.key] = StructureRange(
            volume_ml=(round(min(volumes), 6), round(max(volumes), 6)), lowest_mm=limits[0], highest_mm=limits[1]
        )
    return ranges


RENDERER = Companion("renderer", RendererSpec, "images", "render", "name another bundle")
COMPANIONS: tuple[Companion[LabellerSpec] | Companion[RendererSpec], ...] = (LABELLER, RENDERER)
