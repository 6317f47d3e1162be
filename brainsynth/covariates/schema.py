"""Covariates: what they are, which values are allowed, and the only place that encodes them for a network.

Shapes: B rows, K context width. The context has one number in [0, 1] for a continuous or binary covariate and a one-hot
vector for a categorical one, in the order of the schema. With `missing="indicator"` a second half of the same width
follows: 1 where the value is known, 0 (value 0 too) where it is not; the all-zero context is then the null context that
classifier-free guidance needs. With `missing="refuse"` the context is the paper's: values only.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from brainsynth.errors import UserError, problems_error
from brainsynth.records import record

if TYPE_CHECKING:  # a config holds a schema, and a mistake in it must not wait for pandas
    import pandas as pd


@record
class Covariate:
    """One conditioning variable, in physical units."""

    name: str
    """Column name in every table, for instance `age`."""
    kind: Literal["continuous", "binary", "categorical"]
    unit: str = ""
    """Unit of a continuous covariate: `years`, `ml`, …; empty for the others."""
    low: float | None = None
    """Lowest value of the training support (continuous only); encoded as 0."""
    high: float | None = None
    """Highest value of the training support (continuous only); encoded as 1."""
    scale: Literal["linear", "log"] = "linear"
    """How [low, high] maps to [0, 1]; `log` suits skewed volumes such as the ventricles'."""
    categories: tuple[str, ...] = ()
    """Allowed values of a binary (exactly two: encoded 0 and 1) or categorical covariate."""
    description: str = ""

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"covariate name {self.name!r} must be a plain identifier such as 'age'")
        if self.kind == "continuous":
            if self.low is None or self.high is None or not self.low < self.high:
                raise ValueError(f"continuous covariate {self.name!r} needs low < high")
            if self.scale == "log" and self.low <= 0:
                raise ValueError(f"covariate {self.name!r}: a log scale needs low > 0")
            if self.categories:
                raise ValueError(f"continuous covariate {self.name!r} has no categories")
        else:
            if len(set(self.categories)) != len(self.categories) or len(self.categories) < 2:
                raise ValueError(f"covariate {self.name!r} needs at least two different categories")
            if self.kind == "binary" and len(self.categories) != 2:
                raise ValueError(f"binary covariate {self.name!r} needs exactly two categories")

    @property
    def width(self) -> int:
        """Numbers this covariate takes in the context."""
        return len(self.categories) if self.kind == "categorical" else 1

    def encode(self, values: pd.Series) -> npt.NDArray[np.float32]:
        """(B, width) float32; NaN rows where the value is missing. Values must have been validated."""
        if self.kind == "continuous":
            raw = values.to_numpy(dtype=np.float64, na_value=np.nan)
            low, high = float(self.low or 0.0), float(self.high or 0.0)
            if self.scale == "log":
                raw, low, high = np.log(raw), math.log(low), math.log(high)
            return ((raw - low) / (high - low)).astype(np.float32)[:, None]
        missing = values.isna().to_numpy()
        codes = np.array(
            [
                -1 if gone else self.categories.index(self.category(v) or "")
                for v, gone in zip(values, missing, strict=True)
            ]
        )
        if self.kind == "binary":
            encoded = codes.astype(np.float32)[:, None]
        else:
            encoded = (codes[:, None] == np.arange(len(self.categories))).astype(np.float32)
        encoded[missing] = np.nan
        return encoded

    def problems(self, values: pd.Series, allow_out_of_range: bool) -> list[str]:
        """What is wrong with a column, one line per bad row."""
        found = []
        for row, value, known in zip(row_names(values), values, values.notna(), strict=True):
            if not known:
                continue
            if self.kind != "continuous":
                if self.category(value) is None:
                    listed = f"{', '.join(self.categories)}{did_you_mean(label(value), self.categories)}"
                    found.append(f"{row}: {self.name} = {value!r} is not one of {listed}")
            elif not is_number(value):
                found.append(f"{row}: {self.name} = {value!r} is not a finite number{_number_hint(str(value))}")
            elif not allow_out_of_range and not self.contains(float(value)):
                found.append(
                    f"{row}: {self.name} = {f'{float(value):g} {self.unit}'.strip()} is outside the training "
                    f"support [{self.low:g}, {self.high:g}]"
                )
            elif self.scale == "log" and float(value) <= 0:
                found.append(f"{row}: {self.name} = {float(value):g} must be positive (log scale)")
        return found

    def category(self, value: Any) -> str | None:
        """The category that a value names, or None; see `matching`."""
        return matching(label(value), self.categories)

    def contains(self, value: float) -> bool:
        """True where a continuous value lies in the training support [low, high]."""
        return bool(self.low is not None and self.high is not None and self.low <= value <= self.high)


def label(value: Any) -> str:
    """A category as text: a column of whole numbers with a gap is read as floats, so 1.0 is the category `1`."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def matching(text: str, choices: Collection[str]) -> str | None:
    """The choice that a cell names: the same text, or a whole number that was written with `.0` (as pandas writes a column
    of whole numbers with a gap)."""
    if text in choices:
        return text
    whole = re.fullmatch(r"(-?\d+)\.0+", text)
    return whole[1] if whole and whole[1] in choices else None


def _number_hint(text: str) -> str:
    """What an error adds where a text is a way to write a number, or a missing one, but not ours."""
    if text.strip().casefold() in ("na", "nan", "none", "null", "-", "?", "missing", "unknown"):
        return "; a missing value is an empty cell or n/a"
    return "; write it with a decimal point" if is_number(text.replace(",", ".")) else ""


def did_you_mean(text: str, choices: Collection[str]) -> str:
    """What an error adds where a text nearly is one of the choices: in another case, with a space, as 01 for 1."""
    by_plain = {plain(choice): choice for choice in choices}
    close = difflib.get_close_matches(plain(text), by_plain, n=1)
    if not close:
        return ""
    choice = by_plain[close[0]]
    same = unicodedata.normalize("NFC", text) == unicodedata.normalize("NFC", choice)
    return f"; did you mean {choice!r}{', in other Unicode code points: ' + ascii(choice) if same else ''}?"


def plain(cell: str) -> str:
    """What is equal in texts that people take for the same: without case and spaces, `01` as `1`."""
    bare = unicodedata.normalize("NFC", cell.strip()).casefold()
    return str(float(bare)) if is_number(bare) else bare


def row_names(values: pd.Series) -> Iterator[str]:
    """What an error calls each row: its line in the file, where the table knows it, else its number from 0."""
    word = "line" if values.index.name == "line" else "row"
    return (f"{word} {row}" for row in (values.index if word == "line" else range(len(values))))


def is_number(value: Any) -> bool:
    """True for a finite number, and for a text that is one, with a decimal point."""
    if isinstance(value, str):
        return re.fullmatch(
            r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", value, re.ASCII
        ) is not None and math.isfinite(float(value))
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


@record
class CovariateSchema:
    """The covariates of a model, in order. Saved in the bundle; nothing else encodes covariates."""

    covariates: tuple[Covariate, ...]
    missing: Literal["refuse", "indicator"] = "indicator"
    """`indicator`: a missing value is allowed and marked; `refuse`: every value must be there (the paper's layout)."""

    def __post_init__(self) -> None:
        names = self.names
        if not names or len(set(names)) != len(names):
            raise ValueError("covariates must be at least one, with different names")

    @property
    def names(self) -> tuple[str, ...]:
        """Column names in order."""
        return tuple(c.name for c in self.covariates)

    def unreadable(self) -> list[tuple[str, str]]:
        """(covariate, category) of every category that no table can give back: a schema of a new cohort has none."""
        return [
            (c.name, category)
            for c in self.covariates
            for category in c.categories
            if category.strip() in ("", "n/a") or re.search("[\\0\ud800-\udfff]", category)
        ]

    @property
    def context_size(self) -> int:
        """K, the width of the context vector."""
        width = sum(c.width for c in self.covariates)
        return 2 * width if self.missing == "indicator" else width

    def validate(
        self, table: pd.DataFrame, where: str, allow_out_of_range: bool = False, keep: Sequence[str] = ()
    ) -> pd.DataFrame:
        """The schema's columns of `table`, in order and typed, and after them those of `keep` that it has, as they are.

        Every other function takes rows that were validated, so this is called where rows enter, and nowhere else.

        Raises:
            UserError: lists every bad row and column.
        """
        import pandas as pd

        absent = [name for name in self.names if name not in table.columns]
        if absent:
            raise UserError(
                f"{where}: missing column{'s' if len(absent) > 1 else ''} {', '.join(absent)}; "
                f"the model needs {', '.join(self.names)} and the table has {', '.join(map(str, table.columns))}"
            )
        found = []
        for covariate in self.covariates:
            column = table[covariate.name]
            found += covariate.problems(column, allow_out_of_range)
            if self.missing == "refuse":
                found += [
                    f"{row}: {covariate.name} is missing, and this model needs every covariate"
                    for row, gone in zip(row_names(column), column.isna(), strict=True)
                    if gone
                ]
        if found:
            counted = "" if table.index.name == "line" else "; row 0 is the first below the header"
            raise problems_error(f"{where}: covariates that the model cannot take{counted}", found)
        columns = {
            c.name: pd.to_numeric(table[c.name]).astype("float64")
            if c.kind == "continuous"
            else table[c.name].map(c.category, na_action="ignore").astype("str")
            for c in self.covariates
        }
        checked = pd.DataFrame(columns, index=table.index)
        checked = checked.where(table[list(self.names)].notna(), other=np.nan)
        return checked.assign(**{name: table[name] for name in keep if name in table}).reset_index(drop=True)

    def out_of_range(self, table: pd.DataFrame) -> npt.NDArray[np.bool_]:
        """(B,) True for rows with a continuous value outside its training support."""
        outside = np.zeros(len(table), dtype=bool)
        for c in self.covariates:
            if c.kind == "continuous":
                values = table[c.name].to_numpy(dtype=np.float64, na_value=np.nan)
                outside |= (values < c.low) | (values > c.high)
        return outside

    def encode(self, table: pd.DataFrame) -> npt.NDArray[np.float32]:
        """context_BK, float32, of a validated table."""
        values = np.concatenate([c.encode(table[c.name]) for c in self.covariates], axis=1)
        known = np.isfinite(values)
        if self.missing == "refuse":
            return values
        return np.concatenate([np.where(known, values, 0.0), known], axis=1).astype(np.float32)

    def products(self, name: str) -> tuple[tuple[int, int], ...]:
        """Where the context holds a binary covariate, and each value of the others: pairs to multiply.

        Raises:
            UserError: `name` is not a binary covariate of the schema.
        """
        chosen = [place for c, place in self._places() if c.name == name and c.kind == "binary"]
        if not chosen:
            binary = ", ".join(c.name for c in self.covariates if c.kind == "binary")
            raise UserError(f"architecture.crossed: {name!r} is not a binary covariate; there are: {binary or 'none'}")
        return tuple((chosen[0], other) for other in range(sum(c.width for c in self.covariates)) if other != chosen[0])

    def by_position(self, numbers: Mapping[str, float], where: str) -> dict[int, float]:
        """Numbers given by continuous covariate, by the covariate's position in the context.

        Raises:
            UserError: a name is not a continuous covariate of the schema.
        """
        places = {c.name: place for c, place in self._places() if c.kind == "continuous"}
        for name in numbers:
            if name not in places:
                there = ", ".join(places) or "none"
                raise UserError(f"{where}: {name!r} is not a continuous covariate; there are: {there}")
        return {places[name]: number for name, number in numbers.items()}

    def logarithmic(self) -> frozenset[int]:
        """Where the context holds covariates on a logarithmic scale."""
        return frozenset(place for c, place in self._places() if c.scale == "log")

    def _places(self) -> Iterator[tuple[Covariate, int]]:
        """Each covariate, and where the context holds its last number."""
        ends = itertools.accumulate(c.width for c in self.covariates)
        return ((c, end - 1) for c, end in zip(self.covariates, ends, strict=True))
