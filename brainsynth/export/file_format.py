"""What a file format of an export is, and what it is given to write."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from brainsynth.labels import LabelTable
from brainsynth.plan import NOBODY
from brainsynth.volume import VolumeSpec


@dataclasses.dataclass(frozen=True)
class ExportedVolume:
    """One volume, checked against its commit record."""

    sample_id: str
    stored: npt.NDArray[Any]
    """(X, Y, Z) voxels in the dataset's dtype."""
    grid: VolumeSpec
    facts: dict[str, Any]
    """What a file says of its own volume, in formats that have a place for it: `tables.about`."""
    labels: npt.NDArray[np.uint8] | None = None
    """(X, Y, Z) label map, of a dataset that has them."""
    label_table: LabelTable | None = None

    @property
    def image(self) -> npt.NDArray[np.float32]:
        """(X, Y, Z) intensities in [0, 1]."""
        return self.grid.dequantise(self.stored)

    @property
    def whose(self) -> str:
        """Of whom a generated image is (`Plan.whose`); empty for a scan."""
        return str(self.facts.get("whose", NOBODY)) if self.facts["synthetic"] else ""


@dataclasses.dataclass(frozen=True)
class FileFormat:
    """One entry of `formats.FORMATS`. Equal volumes give equal bytes: no file carries a time, a host or a user."""

    path: str
    """Of a file in the output folder: `{id}` is the subject, `{unit}` the number of the unit of subjects."""
    about: str
    """What the files are, for the read-me of an export."""
    write: Callable[[Path, Iterable[ExportedVolume]], None]
    """Writes one file, or a folder, under a temporary name."""
    holds_labels: bool = True
    """Whether label maps are exported at all: in the files, or in second ones."""
    label_path: str = ""
    """Of a second file with the label map, in formats that do not hold it in the first one."""
    write_labels: Callable[[Path, Iterable[ExportedVolume]], None] | None = None
    """Writes that file."""
    needs: str = ""
    """A library that the base install has not; the extra that has it is called as the format (pyproject.toml)."""
    subjects_per_file: int = 1
    bids_sidecar: bool = False
    """Whether T1w.json lies next to the files."""
    label_folder: str = ""
    """Where dseg.tsv lies; a folder is a BIDS derivative of its own."""

    def files(self, labelled: bool) -> dict[str, Callable[[Path, Iterable[ExportedVolume]], None]]:
        """Path → what writes it, of the files of one subject, or of one unit."""
        second = {self.label_path: self.write_labels} if labelled and self.write_labels is not None else {}
        return {self.path: self.write} | second
