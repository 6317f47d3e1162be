"""Networks that may stand next to a bundle, two files each, and are not part of the bundle's digest.

A dataset that depends on one names it by a digest of its own: a bundle that gets one, or a better one, still makes and
verifies the volumes of every other dataset that was made from it before.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from brainsynth.errors import UserError
from brainsynth.labels import LabelTable
from brainsynth.records import seal, unseal
from brainsynth.storage.whole_file import file_sha256, write_whole
from brainsynth.volume import VolumeSpec


class CompanionSpec(Protocol):
    """The sealed record of a network."""

    @property
    def labels(self) -> LabelTable:
        """The structures that it knows."""

    @property
    def volume(self) -> VolumeSpec:
        """The grid that it was trained on."""

    @property
    def weights_sha256(self) -> str:
        """Of its file."""

    @property
    def digest(self) -> str:
        """sha256 of the record; covers the weights through theirs."""


S = TypeVar("S", bound=CompanionSpec)


@dataclasses.dataclass(frozen=True)
class Companion(Generic[S]):
    """A kind of network next to a bundle."""

    name: str
    """`labeller`: of the files `labeller.json`, its record, and `labeller.safetensors`, its weights."""
    spec: type[S]
    """Its record."""
    makes: str
    """What a dataset has of it."""
    asked_by: str
    """Whose need an error names where a bundle has none."""
    without: str
    """What else can be done then."""

    @property
    def record(self) -> str:
        """Name of the record's file."""
        return f"{self.name}.json"

    @property
    def file(self) -> str:
        """Name of the weights' file."""
        return f"{self.name}.safetensors"

    def is_in(self, folder: Path) -> bool:
        """Whether the bundle has one."""
        return (folder / self.record).is_file()

    def read(self, folder: Path, digest: str | None = None) -> S:
        """The record of a bundle's network, its file checked.

        Args:
            digest: of the record, where it must be this one.

        Raises UserError where there is none, or another one than a dataset was made with, or its file is damaged.
        """
        try:
            spec = unseal(self.spec, (folder / self.record).read_bytes(), str(folder / self.record))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{self.asked_by}: the bundle {folder} has no {self.name} ({self.record} is missing); train one with "
                f"brainsynth train-{self.name} and add it by `{self.name}` in the config of export-bundle, or {self.without}"
            ) from None
        path = folder / self.file
        if not path.is_file() or file_sha256(path) != spec.weights_sha256:
            raise UserError(f"{path} is missing or is not the file that {self.record} names; copy the bundle again")
        if digest is not None and spec.digest != digest:
            raise UserError(
                f"the dataset's {self.makes} are of another {self.name}: its plan names {digest[:12]}…, the bundle {folder} "
                f"has {spec.digest[:12]}…"
            )
        return spec

    def write(self, folder: Path, spec: S, weights: bytes) -> None:
        """Put it into a bundle's folder, its record last."""
        for name, data in ((self.file, weights), (self.record, seal(spec))):
            write_whole(folder / name, data)

    def copy(self, source: Path, target: Path) -> None:
        """Copy it from one bundle's folder to another's, where there is one."""
        if self.is_in(source):
            for name in (self.file, self.record):
                shutil.copyfile(source / name, target / name)

    def check_grid(self, trained: VolumeSpec, volume: VolumeSpec) -> None:
        """Raises UserError when it was trained on another grid than the bundle's volumes have."""
        if dataclasses.replace(trained, dtype=volume.dtype) != volume:
            raise UserError(
                f"{self.name}: it learns from volumes of {trained.shape_xyz} voxels of {trained.spacing_mm} mm from "
                f"{trained.origin_mm} mm, and the bundle makes {volume.shape_xyz} of {volume.spacing_mm} mm from "
                f"{volume.origin_mm} mm; train it on a cohort with the bundle's grid"
            )
