"""Rulers of the user's own: tables and functions, and what is said of bad ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brainsynth.config.evaluation import EvaluateConfig, TableRuler
from brainsynth.errors import UserError
from brainsynth.instruments import own_rulers
from brainsynth.instruments.own_rulers import MeasuredTable, call_functions, function_values, load_functions

IDS = pd.Series(["OAS10001MR1", "OAS10002MR1", "OAS10003MR1"])
CODE = """
import math

def bright(volume, affine):
    assert volume.dtype.name == "float32" and affine.shape == (4, 4)
    volume[:] = 0  # its own copy
    return abs(affine[0, 0]) * 3

def shy(volume, affine):
    if volume.max() > 1:
        raise ValueError("too bright")
    return math.nan

number = 3
"""


def table(tmp_path: Path, rows: pd.DataFrame, name: str = "volumes.csv") -> str:
    rows.to_csv(tmp_path / name, index=False, sep="\t" if name.endswith("tsv") else ",")
    return str(tmp_path / name)


def rows(**changes: list[object]) -> pd.DataFrame:
    columns = {"subject": ["sub-OAS1_0002_MR1", "OAS1_0001_MR1"], "left": [20.0, 1000.0], "right": [30.0, 4000.0]}
    return pd.DataFrame(columns | changes)


def read(path: str, **changes: object) -> MeasuredTable:
    given = {"id_column": "subject", "columns": ("left", "right"), "unit": "mm3"} | changes
    ruler = TableRuler(dataset=path, reference="absent.csv", **given)  # type: ignore[arg-type]
    return MeasuredTable(ruler, "dataset", "ventricular_volume", "ml")


@pytest.mark.parametrize("name", ["volumes.csv", "volumes.tsv"])
def test_columns_are_added_turned_into_the_unit_and_put_in_order(tmp_path: Path, name: str) -> None:
    found = read(table(tmp_path, rows(), name)).of(IDS)
    assert found[:2].tolist() == pytest.approx([5.0, 0.05])
    assert np.isnan(found[2])


def test_a_gap_in_one_column_is_a_gap_in_the_sum(tmp_path: Path) -> None:
    assert np.isnan(read(table(tmp_path, rows(left=[20.0, None]))).of(IDS)[0])


@pytest.mark.parametrize(
    ("change", "given", "message"),
    [
        ({}, {"columns": ("lefd",)}, "has no column 'lefd'; did you mean 'left'"),
        ({}, {"id_column": "person"}, "has no column 'person'; it has subject, left, right"),
        ({}, {"unit": "years"}, "unit: 'years' cannot be turned into the covariate's 'ml'"),
        ({"left": ["many", "few"]}, {}, "'left' holds more than numbers"),
        ({"subject": ["OAS1_0001_MR1", "sub-OAS10001MR1"]}, {}, "names OAS10001MR1 more than once"),
        (
            {"subject": ["a", "b"]},
            {},
            "for any of the 3 volumes; they are named like OAS10001MR1, its rows like a",
        ),
    ],
)
def test_bad_tables_are_told(
    tmp_path: Path, change: dict[str, list[object]], given: dict[str, object], message: str
) -> None:
    path = table(tmp_path, rows(**change))
    with pytest.raises(UserError, match="tables.ventricular_volume") as error:
        read(path, **given).of(IDS)
    assert message in str(error.value)


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tables.ventricular_volume.dataset: there is no table at .*none.csv"):
        read(str(tmp_path / "none.csv"))


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "lab_rulers.py").write_text(CODE)
    (tmp_path / "broken_rulers.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "lab_rulers"


def test_functions_measure_and_their_failures_are_reasons(module: str) -> None:
    functions = load_functions({"a": f"{module}:bright", "b": f"{module}:shy"})
    volume = np.full((2, 2, 2), 0.5, np.float32)
    dark = call_functions(functions, volume, np.diag([2.0, 2.0, 2.0, 1.0]))
    assert dark == {"function a": 6.0, "function b: failed": "ValueError: it returned nan"}
    assert (volume == 0.5).all()
    assert call_functions(functions, volume * 4, np.eye(4))["function b: failed"] == "ValueError: too bright"
    found = pd.DataFrame([dark, dark])
    assert function_values(found, "a").tolist() == [6.0, 6.0]
    with pytest.raises(UserError, match="failed on all 2 volumes; on the first: ValueError: it returned nan"):
        function_values(found, "b")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_rulers:f", "cannot be imported .ModuleNotFoundError"),
        ("broken_rulers:f", "cannot be imported .ZeroDivisionError"),
        ("lab_rulers:absent", "has no function 'absent'"),
        ("lab_rulers:number", "has no function 'number'"),
    ],
)
def test_functions_that_cannot_be_had_are_told(module: str, path: str, message: str) -> None:
    with pytest.raises(UserError, match=f"functions.age: the module .*{message}"):
        load_functions({"age": path})


def test_only_the_environment_lets_a_config_run_code(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = {"age": f"{module}:bright"}
    for allowed in ("", "lab", "lab_rulers.more", "other,lab_rulersx"):
        monkeypatch.setenv(own_rulers.ALLOWED, allowed)
        with pytest.raises(UserError, match=f"allow it with {own_rulers.ALLOWED}=lab_rulers in the environment"):
            own_rulers.check_allowed(functions)
    monkeypatch.setenv(own_rulers.ALLOWED, "other, lab_rulers")
    own_rulers.check_allowed(functions)


def test_configs_that_make_no_sense_are_refused() -> None:
    one = TableRuler(dataset="a.csv", reference="b.csv", columns=("x",))
    given = {"dataset": "d", "reference": "r", "output": "o"}
    for wrong, message in (
        ({"functions": {"age": "os.system"}}, "not of the form package.module:function"),
        ({"functions": {"age": "a b:c"}}, "not of the form package.module:function"),
        ({"functions": {"age": "a:b"}, "tables": {"age": one}}, "age: one ruler per covariate"),
    ):
        with pytest.raises(ValueError, match=message):
            EvaluateConfig(**given, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one"):
        TableRuler(dataset="a.csv", reference="b.csv", columns=())
