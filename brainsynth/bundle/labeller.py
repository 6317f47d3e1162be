"""A bundle's labeller on disk. A dataset with label maps names it by the digest of its record, in the plan."""

from __future__ import annotations

from typing import Literal

from brainsynth.bundle.companion import Companion
from brainsynth.config.architectures import LabellerArchitecture
from brainsynth.labels import LabelTable
from brainsynth.records import digest, record
from brainsynth.volume import VolumeSpec


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


LABELLER = Companion("labeller", LabellerSpec, "label maps", "labels", "leave labels out")
