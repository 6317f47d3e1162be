"""A bundle's labeller as an instrument: the volume of every structure, counted on the label map that it makes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from brainsynth.bundle.files import bundle_folder
from brainsynth.bundle.labeller import LABELLER, LabellerSpec
from brainsynth.errors import UserError
from brainsynth.labels import VOLUME_PREFIX, volume_columns
from brainsynth.volume import VolumeSpec


def planned_labeller(bundle: str, grid: VolumeSpec, structures: Iterable[str]) -> LabellerSpec:
    """The record of a bundle's labeller.

    Args:
        structures: what it must know, each as `volume_columns` takes it.

    Raises:
        UserError: the bundle has no labeller, or it is of another grid or does not know a structure.
    """
    spec = LABELLER.read(bundle_folder(bundle, "labeller"))
    LABELLER.check_grid(spec.volume, grid)
    known = {label.column for label in spec.labels.labels}
    for structure in structures:
        try:
            lacking = [
                column.removeprefix(VOLUME_PREFIX) for column in volume_columns(structure) if column not in known
            ]
        except ValueError:
            raise UserError(f"structures: {structure!a} is not a list of structures with + between them") from None
        if lacking:
            names = ", ".join(label.name for label in spec.labels.labels)
            raise UserError(f"structures: {', '.join(lacking)} is not a structure of the labeller; it knows {names}")
    return spec


class StructureCounter:
    """A loaded labeller that measures volumes."""

    def __init__(self, bundle: str, device: torch.device) -> None:
        from brainsynth.models.loading import load_labeller  # and with it every network

        folder = bundle_folder(bundle, "labeller")
        self.spec = LABELLER.read(folder)
        self.label = load_labeller(folder, device, self.spec.digest)

    def volumes_ml(self, volume: npt.NDArray[np.float32]) -> dict[str, float]:
        """`label_volume_…` → ml, of one (X, Y, Z) volume in [0, 1]."""
        (labels,) = self.label(volume[None])
        return self.spec.labels.volumes_ml(labels, self.spec.volume.voxel_ml)
