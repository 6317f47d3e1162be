"""The only encoder of covariates: known values, marked gaps, and every bad row named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.errors import UserError

AGE = Covariate(name="age", kind="continuous", unit="years", low=20.0, high=90.0)
VENTRICLES = Covariate(name="ventricles", kind="continuous", unit="ml", low=5.0, high=80.0, scale="log")
SEX = Covariate(name="sex", kind="binary", categories=("F", "M"))
SITE = Covariate(name="site", kind="categorical", categories=("a", "b", "c"))
SCHEMA = CovariateSchema(covariates=(AGE, VENTRICLES, SEX, SITE))
PAPER = CovariateSchema(covariates=(AGE, SEX), missing="refuse")


def table(**columns: list[Any]) -> pd.DataFrame:
    whole: dict[str, list[Any]] = {
        "age": [20.0, 55.0],
        "ventricles": [80.0, 20.0],
        "sex": ["M", "F"],
        "site": ["c", "a"],
    }
    return pd.DataFrame(whole | columns)


def refusal(rows: pd.DataFrame, schema: CovariateSchema = SCHEMA, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        schema.validate(rows, "rows.csv", **options)
    return str(caught.value)


def test_context_of_known_values() -> None:
    assert SCHEMA.context_size == 12
    context = SCHEMA.encode(SCHEMA.validate(table(), "rows.csv"))
    assert context.dtype == np.float32
    known = [1.0] * 6
    np.testing.assert_allclose(
        context, [[0, 1, 1, 0, 0, 1, *known], [0.5, 0.5, 0, 1, 0, 0, *known]], atol=1e-7
    )  # ln 20 is half-way between ln 5 and ln 80


def test_a_gap_is_zero_and_marked() -> None:
    rows = table(age=[None, 55.0], sex=["M", None], site=[None, "b"])
    context = SCHEMA.encode(SCHEMA.validate(rows, "rows.csv"))
    np.testing.assert_allclose(context[0], [0, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0], atol=1e-7)
    np.testing.assert_allclose(context[1], [0.5, 0.5, 0, 0, 1, 0, 1, 1, 0, 1, 1, 1], atol=1e-7)


def test_a_row_of_gaps_is_the_null_context_and_nothing_else_is() -> None:
    rows = table(age=[None, 20.0], ventricles=[None, 5.0], sex=[None, "F"], site=[None, "a"])
    context = SCHEMA.encode(SCHEMA.validate(rows, "rows.csv"))
    assert not context[0].any()
    assert context[1].any()


def test_the_papers_context_is_values_only() -> None:
    assert PAPER.context_size == 2
    context = PAPER.encode(PAPER.validate(table(), "rows.csv"))
    np.testing.assert_allclose(context, [[0, 1], [0.5, 0]])
    assert "row 1: age is missing, and this model needs every covariate" in refusal(table(age=[30.0, None]), PAPER)


def test_every_bad_row_is_named_at_once() -> None:
    rows = table(age=[19.0, "forty"], ventricles=[float("inf"), 81.0], sex=["m", "F"], site=["a", "z"])
    told = refusal(rows)
    assert "rows.csv: covariates that the model cannot take; row 0 is the first below the header (6 problems)" in told
    assert "row 0: age = 19 years is outside the training support [20, 90]" in told
    assert "row 1: age = 'forty' is not a finite number" in told
    assert "row 0: ventricles = inf is not a finite number" in told
    assert "row 1: ventricles = 81 ml is outside the training support [5, 80]" in told
    assert "row 0: sex = 'm' is not one of F, M" in told
    assert "row 1: site = 'z' is not one of a, b, c" in told


def test_extrapolation_is_allowed_when_asked_for_and_flagged() -> None:
    rows = table(age=[95.0, 55.0], ventricles=[20.0, 2.5])
    checked = SCHEMA.validate(rows, "rows.csv", allow_out_of_range=True)
    assert SCHEMA.out_of_range(checked).tolist() == [True, True]
    assert SCHEMA.out_of_range(table()).tolist() == [False, False]
    assert SCHEMA.out_of_range(table(age=[None, 90.0])).tolist() == [False, False]
    np.testing.assert_allclose(SCHEMA.encode(checked)[:, 0], [75 / 70, 0.5], rtol=1e-6)
    assert "ventricles = 0 must be positive" in refusal(table(ventricles=[0.0, 5.0]), allow_out_of_range=True)


def test_missing_columns_are_named_with_what_there_is() -> None:
    told = refusal(pd.DataFrame({"age": [30.0], "gender": ["F"]}))
    assert "rows.csv: missing columns ventricles, sex, site" in told
    assert "the table has age, gender" in told
    assert "missing column sex;" in refusal(table()[["age", "ventricles", "site"]])


def test_validated_rows_are_typed_ordered_and_alone() -> None:
    rows = table(age=["20", " 55 "], note=["x", "y"])[["note", "site", "sex", "ventricles", "age"]]
    rows.index = pd.Index([7, 7])
    checked = SCHEMA.validate(rows, "rows.csv")
    assert list(checked.columns) == ["age", "ventricles", "sex", "site"]
    assert list(checked.index) == [0, 1]
    assert checked["age"].tolist() == [20.0, 55.0]
    assert "age = '5_5' is not a finite number" in refusal(table(age=["20", "5_5"]))


@pytest.mark.parametrize("values", [[1, 2], [1.0, 2.0], ["1", "2"], pd.array([1, 2], dtype="Int64")])
def test_categories_that_are_numbers(values: Any) -> None:
    schema = CovariateSchema(covariates=(Covariate(name="sex", kind="binary", categories=("1", "2")),))
    checked = schema.validate(pd.DataFrame({"sex": values}), "rows.csv")
    np.testing.assert_array_equal(schema.encode(checked), [[0, 1], [1, 1]])
    assert schema.encode(schema.validate(pd.DataFrame({"sex": [2, None]}), "rows.csv")).tolist() == [[1, 1], [0, 0]]
    assert "sex = 1.5 is not one of 1, 2" in refusal(pd.DataFrame({"sex": [1.5]}), schema)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"name": "my age", "kind": "continuous", "low": 0.0, "high": 1.0}, "must be a plain identifier"),
        ({"name": "age", "kind": "continuous", "low": 2.0, "high": 2.0}, "needs low < high"),
        ({"name": "age", "kind": "continuous", "low": 2.0}, "needs low < high"),
        ({"name": "age", "kind": "continuous", "low": 0.0, "high": 2.0, "scale": "log"}, "log scale needs low > 0"),
        ({"name": "age", "kind": "continuous", "low": 0.0, "high": 2.0, "categories": ("a",)}, "has no categories"),
        ({"name": "sex", "kind": "binary", "categories": ("F", "M", "X")}, "exactly two categories"),
        ({"name": "site", "kind": "categorical", "categories": ("a", "a")}, "at least two different categories"),
    ],
)
def test_covariates_that_make_no_sense_are_refused(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Covariate(**arguments)


@pytest.mark.parametrize("covariates", [(), (AGE, SEX, AGE)])
def test_a_schema_has_different_names(covariates: tuple[Covariate, ...]) -> None:
    with pytest.raises(ValueError, match="at least one, with different names"):
        CovariateSchema(covariates=covariates)
