"""What is segmented where label maps are stored: the classes of a label table, and which of them are ventricles."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from brainsynth.errors import UserError
from brainsynth.labels import LabelTable
from brainsynth.training.label_augmentation import mirrored_classes

_VENTRICLE = re.compile(r"(^|_)(ventricles?|vent)(_|$)")


@dataclass(frozen=True, slots=True, eq=False)
class Structures:
    """Class 0 is background, k the k-th name."""

    names: tuple[str, ...]
    """Lower-case letters, digits and `_`."""
    mirror: npt.NDArray[np.uint8] | None
    """The class of the other side, by class; None where a side has no other, and nothing may be mirrored."""

    @property
    def ventricles(self) -> tuple[int, ...]:
        """Classes that have `ventricle`, `ventricles` or FreeSurfer's `vent` as a word in their name."""
        return tuple(1 + place for place, name in enumerate(self.names) if _VENTRICLE.search(name))

    def classes(self, table: LabelTable) -> npt.NDArray[np.uint8]:
        """(256,) the class of each stored integer of a table with the same names."""
        classes = np.zeros(256, np.uint8)
        for label in table.labels:
            classes[label.index] = 1 + self.names.index(label.key)
        return classes


def shared_structures(tables: dict[str, LabelTable | None]) -> Structures:
    """The structures of datasets that hold label maps of the same ones; integers and order may differ.

    Args:
        tables: name of a dataset, for the error → its label table. The first gives the order.

    Raises:
        UserError: one has no label maps, or another's structures.
    """
    first: LabelTable | None = None
    for where, table in tables.items():
        if table is None:
            raise UserError(
                f"structures: {where} has no label maps; generate it with labels: true, or prepare it with label_column or "
                "label_folder in source (docs/labels.md)"
            )
        first = first or table
        mine, other = ({label.key for label in each.labels} for each in (first, table))
        if mine != other:
            said = (("lacks", sorted(mine - other)), ("also has", sorted(other - mine)))
            what = " and ".join(f"{word} {', '.join(names[:5])}" for word, names in said if names)
            raise UserError(
                f"structures: the label maps of {where} have other structures than those of {next(iter(tables))}: it {what}"
                "; make both with one labeller or one label table (docs/labels.md)"
            )
    assert first is not None
    mirror = mirrored_classes(first)
    return Structures(
        names=tuple(label.key for label in first.labels),
        mirror=None if mirror is None else mirror.numpy().astype(np.uint8),
    )
