"""Rulers that a user brings: tables of what another tool measured, and functions of their own.

A function is code. Only the command line and the environment are trusted to choose what runs (SECURITY.md), so a config
may name a function, but its module must be allowed by the environment; it is imported only where volumes are measured.
"""

from __future__ import annotations

import difflib
import importlib
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from brainsynth.config.evaluation import TableRuler
from brainsynth.errors import UserError
from brainsynth.storage.filesystem import resolve_uri
from brainsynth.storage.tables import read_table

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Function = Callable[[F32, F64], Any]
ALLOWED = "BRAINSYNTH_FUNCTIONS"
"""Environment variable: the modules, separated by commas, that `functions` of a config may name."""
_IN_ML = {"ml": 1.0, "cm3": 1.0, "mm3": 1e-3, "l": 1e3}


def check_allowed(functions: Mapping[str, str]) -> None:
    """Raises UserError for a function whose module the environment does not allow."""
    allowed = {name.strip() for name in os.environ.get(ALLOWED, "").split(",")}
    for covariate, path in functions.items():
        module = path.partition(":")[0]
        if module not in allowed:
            raise UserError(
                f"functions.{covariate}: {path} would run code that the config names; if you trust the module, allow it "
                f"with {ALLOWED}={module} in the environment"
            )


def load_functions(functions: Mapping[str, str]) -> dict[str, Function]:
    """Covariate → function. Raises UserError where a module or function is not there or fails to import."""
    return {covariate: _load(path, f"functions.{covariate}") for covariate, path in functions.items()}


def _load(path: str, where: str) -> Function:
    module, _, name = path.partition(":")
    try:
        loaded = importlib.import_module(module)
    except Exception as error:  # whatever a stranger's module does
        raise UserError(
            f"{where}: the module {module} cannot be imported ({type(error).__name__}: {error}); it must be installed, or "
            "be on PYTHONPATH, wherever volumes are measured"
        ) from error
    found = getattr(loaded, name, None)
    if not callable(found):
        raise UserError(f"{where}: the module {module} has no function {name!r}")
    function: Function = found
    return function


def function_columns(covariate: str) -> tuple[str, str]:
    """Where a measurement keeps what a function returned, and why it returned nothing of use."""
    return f"function {covariate}", f"function {covariate}: failed"


def call_functions(functions: Mapping[str, Function], volume: F32, affine: F64) -> dict[str, str | int | float]:
    """What each function finds in one volume. One that fails gives a reason; the other rulers are still called."""
    results: dict[str, str | int | float] = {}
    for covariate, function in functions.items():
        column, failed = function_columns(covariate)
        try:
            value = float(function(volume.copy(), affine.copy()))
            if not math.isfinite(value):
                raise ValueError(f"it returned {value}")
            results[column] = value
        except Exception as error:
            results[failed] = f"{type(error).__name__}: {error}"[:200]
    return results


def function_values(table: pd.DataFrame, covariate: str) -> F64:
    """(N,) what a function found, by the table of measurements; NaN where it failed.

    Raises UserError, with the first reason, where it failed on every volume.
    """
    column, failed = function_columns(covariate)
    if column not in table:
        reason = table[failed].iloc[0] if failed in table else "it was not called"
        raise UserError(f"functions.{covariate}: it failed on all {len(table)} volumes; on the first: {reason}")
    return table[column].to_numpy(np.float64)


class MeasuredTable:
    """A table of what another tool measured, read and checked."""

    def __init__(self, ruler: TableRuler, which: str, covariate: str, unit: str) -> None:
        """Read the table of `which` (dataset or reference) for a covariate in this unit.

        Raises UserError for a table that is not there, lacks a column, names a volume twice, holds words where numbers
        belong, or is in a unit that cannot be turned into the covariate's.
        """
        self.where, path = f"tables.{covariate}.{which}", getattr(ruler, which)
        table = read_table(resolve_uri(path, self.where), self.where, (ruler.id_column,))
        for name in (ruler.id_column, *ruler.columns):
            if name not in table:
                close = difflib.get_close_matches(name, [str(c) for c in table], n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(map(str, table))[:300]}"
                raise UserError(f"{self.where}: {path} has no column {name!r}; {hint}")
        ids = _plain(table[ruler.id_column])
        if ids.duplicated().any():
            raise UserError(f"{self.where}: {path} names {ids[ids.duplicated()].iloc[0]} more than once")
        words = [c for c in ruler.columns if not pd.api.types.is_numeric_dtype(table[c])]
        if words:
            raise UserError(f"{self.where}: {path}: the column {words[0]!r} holds more than numbers")
        values = table[list(ruler.columns)].sum(axis=1, skipna=False).to_numpy(np.float64)
        self.path = path
        self.values = pd.Series(values * _factor(ruler.unit, unit, f"tables.{covariate}.unit"), ids)

    def of(self, sample_ids: pd.Series) -> F64:
        """(N,) values of these volumes; NaN where the table has no row, or no number. Raises UserError if it has none."""
        values = np.asarray(self.values.reindex(_plain(sample_ids)), np.float64)
        if not np.isfinite(values).any():
            raise UserError(
                f"{self.where}: {self.path} has no number for any of the {len(values)} volumes; they are named like "
                f"{sample_ids.iloc[0]}, its rows like {self.values.index[0] if len(self.values) else '(none)'}"
            )
        return values


def _plain(ids: pd.Series) -> pd.Series:
    """As a prepared cohort names its subjects: `sub-` and all that is neither letter nor digit left out."""
    return ids.astype(str).str.removeprefix("sub-").str.replace(r"[^A-Za-z0-9]", "", regex=True)


def _factor(given: str | None, wanted: str, where: str) -> float:
    if given is None or given == wanted:
        return 1.0
    if given not in _IN_ML or wanted not in _IN_ML:
        raise UserError(f"{where}: {given!r} cannot be turned into the covariate's {wanted or 'probability'!r}")
    return _IN_ML[given] / _IN_ML[wanted]
