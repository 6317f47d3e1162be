"""Label maps: which stored integer is which structure. A dataset with labels holds a second array, `dseg`, next to `t1w`.

A label map is uint8 on the grid of its image: 0 is background, 1 to 254 are structures of the table, and 255 marks lost
data and is never a label. A structure's volume is its number of voxels times the volume of one.
"""

from __future__ import annotations

import colorsys
import re
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from brainsynth.records import left_out_at, record

DSEG = "dseg"
"""Name of the array of label maps."""
BACKGROUND, MAX_LABEL, LOST = 0, 254, 255
VOLUME_PREFIX = "label_volume_"
"""Of the manifest's columns with the volume of each structure in ml."""
TSV_COLUMNS = ("index", "name", "abbreviation", "color")
"""Of `dseg.tsv`, as BIDS names them."""
_TEXT = re.compile(r"[ -~]{1,64}")
_COLOR = re.compile(r"#[0-9a-f]{6}")


@record
class Label:
    """One structure of a label table."""

    index: int
    """The stored integer, 1 to 254."""
    name: str
    """As in `Left-Hippocampus`: printable ASCII."""
    abbreviation: Annotated[str, left_out_at("")] = ""
    color: Annotated[str, left_out_at("")] = ""
    """`#rrggbb`; without one, `rgb` chooses a color by the index."""
    values: Annotated[tuple[int, ...], left_out_at(())] = ()
    """Integers that are this structure in the files that were read, where they are not just the index."""

    def __post_init__(self) -> None:
        if not 1 <= self.index <= MAX_LABEL:
            raise ValueError(
                f"label {self.index} ({self.name!a}): an index is 1 to {MAX_LABEL}; 0 is background, {LOST} marks lost data"
            )
        if not _TEXT.fullmatch(self.name) or not self.key or not _TEXT.fullmatch(self.abbreviation or "-"):
            raise ValueError(f"label {self.index}: name and abbreviation are 1 to 64 letters, digits or signs of ASCII")
        if self.color and not _COLOR.fullmatch(self.color):
            raise ValueError(f"label {self.index} ({self.name}): color is #rrggbb, not {self.color[:20]!a}")

    @property
    def key(self) -> str:
        """The name in lower-case letters, digits and `_`: `left_hippocampus`."""
        return re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_")

    @property
    def column(self) -> str:
        """The manifest's column with this structure's volume in ml: `label_volume_left_hippocampus`."""
        return VOLUME_PREFIX + self.key

    @property
    def rgb(self) -> tuple[int, int, int]:
        """The color, 0 to 255 each."""
        if self.color:
            return int(self.color[1:3], 16), int(self.color[3:5], 16), int(self.color[5:7], 16)
        r, g, b = colorsys.hsv_to_rgb(self.index * 0.618034 % 1, 0.75, 0.95)  # golden angle: neighbours differ
        return round(255 * r), round(255 * g), round(255 * b)


def volume_columns(structures: str) -> list[str]:
    """The manifest's columns of structures, named with ` + ` between. Raises ValueError for what cannot be a name."""
    return [Label(index=1, name=name.strip()).column for name in structures.split("+")]


@record
class LabelTable:
    """The structures of a dataset's label maps; part of its plan, and so of its fingerprint."""

    labels: tuple[Label, ...]
    source: str
    """Where the label maps come from: a segmentation tool and its version, or the model that drew them."""
    background: Annotated[tuple[int, ...], left_out_at(())] = ()
    """Integers apart from 0 that are background in the files that were read."""

    def __post_init__(self) -> None:
        if not self.labels:
            raise ValueError("a label table needs at least one label")
        read = [str(value) for label in self.labels for value in label.values or (label.index,)]
        for what, seen in (
            ("index", [str(label.index) for label in self.labels]),
            ("name", [label.key for label in self.labels]),
            ("value", [*read, *map(str, self.background)]),
        ):
            twice = sorted({value for value in seen if seen.count(value) > 1})
            if twice:
                raise ValueError(f"the label table has the same {what} more than once: {', '.join(twice[:5])}")

    @property
    def indices(self) -> tuple[int, ...]:
        """The stored integers, in the table's order."""
        return tuple(label.index for label in self.labels)

    @property
    def class_of(self) -> npt.NDArray[np.uint8]:
        """(256,) the class of each stored integer: its place in the table, counted from 1; 0 where it has none."""
        classes = np.zeros(256, np.uint8)
        classes[list(self.indices)] = np.arange(1, len(self.labels) + 1)
        return classes

    @property
    def index_of(self) -> dict[int, int]:
        """Integer in the files that were read → stored integer."""
        read = {value: label.index for label in self.labels for value in label.values or (label.index,)}
        return {BACKGROUND: BACKGROUND} | dict.fromkeys(self.background, BACKGROUND) | read

    def unknown(self, labels: npt.NDArray[np.uint8]) -> list[int]:
        """Integers of a label map that are neither background nor in the table."""
        there = np.flatnonzero(np.bincount(labels.reshape(-1), minlength=256))
        return [int(value) for value in there if value != BACKGROUND and value not in self.indices]

    def fault(self, labels: npt.NDArray[np.uint8]) -> str:
        """Why an array is not a label map of this table, in a few words for the rejects table; empty when it is one."""
        unknown = self.unknown(labels)
        if LOST in unknown:
            return f"label map: {LOST} marks lost data and cannot be a label"
        if unknown:
            return f"label map: the label table lacks {', '.join(map(str, unknown[:10]))}"
        return "" if labels.any() else "label map: all background"

    def volumes_ml(self, labels: npt.NDArray[np.uint8], voxel_ml: float) -> dict[str, float]:
        """The volume of every structure of one label map, counted; by the manifest's column."""
        counts = np.bincount(labels.reshape(-1), minlength=256)
        return {label.column: round(float(counts[label.index]) * voxel_ml, 6) for label in self.labels}

    def tsv(self) -> bytes:
        """`dseg.tsv`, the table as BIDS wants it."""
        rows = [
            (str(label.index), label.name, label.abbreviation or "n/a", "#{:02x}{:02x}{:02x}".format(*label.rgb))
            for label in sorted(self.labels, key=lambda label: label.index)
        ]
        return "".join("\t".join(cells) + "\n" for cells in (TSV_COLUMNS, *rows)).encode()

    def facts(self) -> list[dict[str, Any]]:
        """One dict a structure, for readers: index, name, abbreviation, color as [r, g, b]."""
        return [
            {"index": label.index, "name": label.name, "abbreviation": label.abbreviation, "rgb": list(label.rgb)}
            for label in self.labels
        ]
