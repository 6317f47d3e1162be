"""A bundle's labeller on disk: two files next to `bundle.json`, and not part of the bundle's digest.

Images do not depend on it: a bundle that gets a labeller, or a better one, still makes and verifies the volumes of every
dataset that was made from it before. A dataset with label maps names its labeller by a digest of its own in the plan.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from brainsynth.config.architectures import LabellerArchitecture
from brainsynth.errors import UserError
from brainsynth.labels import LabelTable
from brainsynth.records import digest, record, seal, unseal
from brainsynth.storage.whole_file import file_sha256, write_whole
from brainsynth.volume import VolumeSpec

LABELLER_RECORD = "labeller.json"
LABELLER_FILE = "labeller.safetensors"


@record
class LabellerSpec:
    """A trained labeller: what it names, on which grid, and how well."""

    schema_version: Literal[1] = 1
    architecture: LabellerArchitecture
    labels: LabelTable
    volume: VolumeSpec
    """The grid that it was trained on; its stored dtype does not matter."""
    weights_sha256: str
    provenance: dict[str, str | int | float]
    dice: dict[str, float]
    """Mean Dice with the label maps of validation scans, by structure."""
    dice_scans: int
    """How many scans."""

    @property
    def digest(self) -> str:
        """sha256 of the record; covers the weights through theirs."""
        return digest(self)


def has_labeller(folder: Path) -> bool:
    """Whether the bundle has one."""
    return (folder / LABELLER_RECORD).is_file()


def read_labeller(folder: Path) -> LabellerSpec:
    """The record of a bundle's labeller, its file checked. Raises UserError where there is none, or its file is another."""
    try:
        spec = unseal(LabellerSpec, (folder / LABELLER_RECORD).read_bytes(), str(folder / LABELLER_RECORD))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"labels: the bundle {folder} has no labeller ({LABELLER_RECORD} is missing); train one with "
            "brainsynth train-labeller and add it by `labeller` in the config of export-bundle, or leave labels out"
        ) from None
    path = folder / LABELLER_FILE
    if not path.is_file() or file_sha256(path) != spec.weights_sha256:
        raise UserError(f"{path} is missing or is not the file that {LABELLER_RECORD} names; copy the bundle again")
    return spec


def write_labeller(folder: Path, spec: LabellerSpec, weights: bytes) -> None:
    """Put it into a bundle's folder, its record last."""
    for name, data in ((LABELLER_FILE, weights), (LABELLER_RECORD, seal(spec))):
        write_whole(folder / name, data)


def check_labeller_grid(trained: VolumeSpec, volume: VolumeSpec) -> None:
    """Raises UserError when a labeller was trained on another grid than the bundle's volumes have."""
    if dataclasses.replace(trained, dtype=volume.dtype) != volume:
        raise UserError(
            f"labeller: it learns from volumes of {trained.shape_xyz} voxels of {trained.spacing_mm} mm from "
            f"{trained.origin_mm} mm, and the bundle makes {volume.shape_xyz} of {volume.spacing_mm} mm from "
            f"{volume.origin_mm} mm; train it on a cohort with the bundle's grid"
        )
