"""What the page knows of a dataset, as one JSON document: facts of the whole, and the rows column by column, without voxels.

A column of numbers is a list (null where missing); one of texts is {"values": [...], "codes": [...]}, -1 where missing.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from brainsynth.covariates.schema import Covariate, label
from brainsynth.manifest import STATUSES, ModelRecord
from brainsynth.viewer.rows import Rows

_QUALITY = ("gate_score", "gate_attempts", "mean", "std")
_DIGITS = 6


def document(rows: Rows, title: str, model: ModelRecord | None) -> bytes:
    """The document of the rows as they are now."""
    plan, table = rows.plan, rows.table
    covariates, labels = plan.covariates.covariates, plan.structures
    facts = {
        "title": title,
        "kind": plan.kind,
        "synthetic": plan.kind == "generated",
        "finished": rows.finished,
        "planned": plan.num_samples,
        "model": None if model is None else {"name": model.name, "licence": model.licence, "data": model.training_data},
        "volume": {
            "shape": list(plan.volume.shape_xyz),
            "spacing_mm": list(plan.volume.spacing_mm),
            "origin_mm": list(plan.volume.origin_mm),
        },
        "covariates": [_covariate(c) for c in covariates],
        "labels": [{"index": one.index, "name": one.name, "color": list(one.rgb)} for one in labels],
        "measured_by": rows.measured_by,
        "note": rows.note,
        "rows": {
            "row": table["row"].tolist(),
            "sample_id": table["sample_id"].tolist(),
            "status": _texts(table["status"], STATUSES),
            "reason": _texts(table["reason"].replace("", None)),
            "extrapolated": _flags(table, "extrapolated"),
            "series": _series(table),
            "asked": {c.name: _asked(c, table[c.name]) for c in covariates},
            "measured": _present(table, {c.name: f"measured_{c.name}" for c in covariates}),
            "label_volumes": [_numbers(table[one.column]) for one in labels if one.column in table],
            "quality": _present(table, {name: name for name in _QUALITY}),
            "gate_check": _texts(table["gate_check"]) if "gate_check" in table else None,
        },
    }
    return json.dumps(facts, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _covariate(covariate: Covariate) -> dict[str, Any]:
    return {
        "name": covariate.name,
        "numeric": covariate.kind == "continuous",
        "unit": covariate.unit,
        "categories": list(covariate.categories),
        "description": covariate.description,
    }


def _asked(covariate: Covariate, values: pd.Series) -> Any:
    if covariate.kind == "continuous":
        return _numbers(values)
    return _texts(values.map(label, na_action="ignore"), covariate.categories)


def _present(table: pd.DataFrame, columns: dict[str, str]) -> dict[str, list[float | None]]:
    """Those of the columns that are there, in whole or in part, under the page's names."""
    there = {name: column for name, column in columns.items() if column in table and table[column].notna().any()}
    return {name: _numbers(table[column]) for name, column in there.items()}


def _numbers(values: pd.Series) -> list[float | None]:
    """Rounded to six digits, which is more than anybody sees and a third of the bytes."""
    numbers = pd.to_numeric(values, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    known = np.isfinite(numbers)
    return [float(f"{value:.{_DIGITS}g}") if ok else None for value, ok in zip(numbers.tolist(), known, strict=True)]


def _texts(values: pd.Series, known: tuple[str, ...] = ()) -> dict[str, Any]:
    """The texts that are `known`, in that order, then any other; and for each row which of them."""
    present = values.dropna().astype(str)
    ordered = [*known, *sorted(set(present) - set(known))]
    return {"values": ordered, "codes": pd.Categorical(values, categories=ordered).codes.tolist()}


def _flags(table: pd.DataFrame, name: str) -> list[int]:
    return table[name].astype(bool).astype(int).tolist() if name in table else [0] * len(table)


def _series(table: pd.DataFrame) -> list[int]:
    """Of each row the number of its series, rows made from one noise; -1 for a row that shares its noise with none."""
    if "seed" not in table or table.empty:
        return [-1] * len(table)
    shared = table["seed"].duplicated(keep=False).to_numpy()
    codes: npt.NDArray[np.int64] = np.full(len(table), -1, dtype=np.int64)
    codes[shared] = pd.factorize(table["seed"][shared])[0]
    series: list[int] = codes.tolist()
    return series
