"""The label table of a cohort: a BIDS `dseg.tsv`, with a column more where the files use other integers than are stored."""

from __future__ import annotations

import re

from brainsynth.errors import UserError, problems_error
from brainsynth.labels import BACKGROUND, LOST, MAX_LABEL, Label, LabelTable
from brainsynth.storage.cells import read_cells

_MAX_VALUES = 4096
"""Integers of one structure."""
_VALUE = re.compile(r"(\d{1,6})(?:\s*-\s*(\d{1,6}))?")


def read_label_table(path: str, source: str, where: str = "source.label_table") -> LabelTable:
    """The structures that a table names: columns `index` and `name`, and optionally `abbreviation`, `color` and `values`.

    A row with index 0 is background: its `values` are integers of the files that are none of the structures.

    Args:
        source: where the label maps come from.
        where: the config's key or the option, for errors.

    Raises:
        UserError: with every line that is wrong.
    """
    table = read_cells(path, where)
    absent = [name for name in ("index", "name") if name not in table.columns]
    if absent:
        raise UserError(
            f"{where}: {path}: missing column(s) {', '.join(absent)}; a label table has index and name, and may have "
            "abbreviation, color and values"
        )
    labels: list[Label] = []
    background: tuple[int, ...] = ()
    problems: list[str] = []
    for line, cells in zip(table.index, table.to_dict("records"), strict=True):
        try:
            index, values = _index(cells["index"]), _values(cells.get("values"))
            if index == BACKGROUND:
                background += tuple(value for value in values if value != BACKGROUND)
            else:
                labels.append(
                    Label(
                        index=index,
                        name=cells["name"] or "",
                        abbreviation=cells.get("abbreviation") or "",
                        color=(cells.get("color") or "").lower(),
                        values=() if values == (index,) else values,
                    )
                )
        except ValueError as error:
            problems.append(f"line {line}: {error}")
    if problems:
        raise problems_error(f"{where}: {path} is not a label table", problems)
    try:
        return LabelTable(labels=tuple(labels), source=source, background=background)
    except ValueError as error:
        raise UserError(f"{where}: {path}: {error}") from None


def _index(cell: str | None) -> int:
    """0 to 254. Raises ValueError, which says what to do with the integers of FreeSurfer."""
    if cell is None or not re.fullmatch(r"\d{1,6}", cell):
        raise ValueError(f"index is a whole number, not {cell!a}")
    index = int(cell)
    if index > MAX_LABEL:
        why = f"{LOST} marks lost data" if index == LOST else f"stored are 1 to {MAX_LABEL}"
        raise ValueError(f"index {index} cannot be stored ({why}): choose a free index, and put {index} in `values`")
    return index


def _values(cell: str | None) -> tuple[int, ...]:
    """`3, 42, 1000-1035` as numbers."""
    found: list[int] = []
    for part in re.split(r"[,;]", cell) if cell else ():
        match = _VALUE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not 0 <= last - first < _MAX_VALUES:
            raise ValueError(f"values are whole numbers and ranges of them, such as 3, 1000-1035, not {cell!a}")
        found += range(first, last + 1)
    return tuple(found)
