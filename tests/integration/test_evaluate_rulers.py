"""jobs/evaluate.py with rulers of the user's own, published measurements, and the usefulness test; on phantoms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from brainsynth import open_dataset
from brainsynth.cohort.phantom_cohort import write_phantom_cohort
from brainsynth.config.evaluation import EvaluateConfig
from brainsynth.config.schema import PrepareConfig
from brainsynth.errors import UserError
from brainsynth.evaluation import usefulness_tasks
from brainsynth.evaluation.finding import Finding
from brainsynth.evaluation.own_rulers import ALLOWED
from brainsynth.executors import stages
from brainsynth.executors.evaluate import describe_evaluate, evaluate
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.verify import verify_dataset
from tests.line import GRID, Line, as_config

CODE = """
calls = 0

def bright(volume, affine):
    global calls
    calls += 1
    if calls == 3:
        raise ValueError("the third one")
    return float((volume > 0.1).sum())

def one(volume, affine):
    return 1.5
"""
VOLUME = "ventricular_volume"


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Phantoms that stand in for generated volumes, and a reference cohort."""
    root = tmp_path_factory.mktemp("rulers")
    made = []
    for name, seed in (("stand-in", 6), ("reference", 5)):
        folder = write_phantom_cohort(root / name / "phantoms", 48, seed, GRID)
        config = Line(root).prepare() | {
            "source": {"path": str(folder)},
            "output": str(root / name / "cohort"),
            "validation_fraction": 0.3,
        }
        stages.prepare_cohort(as_config(config, PrepareConfig, root))
        made.append(str(root / name / "cohort"))
    return made[0], made[1]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A module of the user's, allowed; its name is its own for each test, since Python keeps modules."""
    name = f"lab_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(ALLOWED, name)
    return name


def tables(
    cohorts: tuple[str, str], folder: Path, per_ml: float = 1000.0, dataset_factor: float = 1.0
) -> dict[str, Any]:
    """What another tool might measure: the true volumes in mm³, off by a line and by noise."""
    rng = np.random.default_rng(0)
    paths = {}
    for which, uri, factor in zip(("dataset", "reference"), cohorts, (dataset_factor, 1.0), strict=True):
        table = open_dataset(uri).table
        total = per_ml * (0.9 * factor * table[VOLUME] + 3) * rng.normal(1, 0.02, len(table))
        rows = pd.DataFrame({"subject": "sub-" + table["sample_id"], "left": 0.4 * total, "right": 0.6 * total})
        rows.sample(frac=1, random_state=1).to_csv(folder / f"{which}.csv", index=False)
        paths[which] = str(folder / f"{which}.csv")
    return {VOLUME: paths | {"id_column": "subject", "columns": ["left", "right"], "unit": "mm3"}}


def config_of(cohorts: tuple[str, str], folder: Path, **changes: Any) -> EvaluateConfig:
    config = {
        "dataset": cohorts[0],
        "reference": cohorts[1],
        "output": str(folder / "out"),
        "pairs": 3,
        "runtime": {"workers": 0},
    }
    folder.mkdir(exist_ok=True)
    return as_config(config | changes, EvaluateConfig, folder)


def judged(config: EvaluateConfig) -> dict[str, Finding]:
    return {finding.metric: finding for finding in evaluate(config)}


def test_a_table_and_a_function_measure_and_are_published(cohorts: tuple[str, str], lab: str, tmp_path: Path) -> None:
    config = config_of(
        cohorts, tmp_path, tables=tables(cohorts, tmp_path), functions={"age": f"{lab}:bright"}, publish=True
    )
    before = (Path(cohorts[0]) / "dataset.json").read_bytes()
    found = judged(config)
    r = found[f"{VOLUME}: r of measured with asked"]
    assert r.value > 0.98
    assert r.as_real
    assert abs(found[f"{VOLUME}: bias"].value) < 1  # calibrated: the tool's own line is gone
    assert "age: slope" in found
    assert json.loads((tmp_path / "out" / "report.json").read_text())["facts"]["rulers"].startswith(
        f"age: function {lab}:bright; sex: ridge on tissue maps; {VOLUME}: table, left + right"
    )

    dataset = open_dataset(cohorts[0], measured=True)
    table = dataset.table
    assert np.corrcoef(table[f"measured_{VOLUME}"], table[VOLUME])[0, 1] == pytest.approx(r.value, abs=1e-6)
    assert table["measured_sex"].between(0, 1).all()
    assert np.flatnonzero(table["measured_age"].isna()).tolist() == [2]  # where the function failed; others went on
    assert table["sample_id"].tolist() == dataset.sample_ids
    assert (Path(cohorts[0]) / "dataset.json").read_bytes() == before
    assert verify_dataset(open_store(cohorts[0])).ok

    evaluate(config)  # the same again: the same file
    assert len(list((Path(cohorts[0]) / "quality").iterdir())) == 1
    other = config_of(cohorts, tmp_path / "other", publish=True)
    evaluate(other)
    assert len(list((Path(cohorts[0]) / "quality").iterdir())) == 2
    assert verify_dataset(open_store(cohorts[0])).ok
    with pytest.raises(ValueError, match="2 tables of measured values fit measured=True; there are: [0-9a-f]{12}, "):
        open_dataset(cohorts[0], measured=True)


def test_a_biased_tool_is_seen(cohorts: tuple[str, str], tmp_path: Path) -> None:
    """Measured volumes of the dataset are a fifth too large for what was asked."""
    found = judged(config_of(cohorts, tmp_path, tables=tables(cohorts, tmp_path, dataset_factor=1.2)))
    assert not found[f"{VOLUME}: bias"].as_real
    assert not found[f"{VOLUME}: slope"].as_real
    assert found[f"{VOLUME}: r of measured with asked"].as_real


def test_bad_rulers_are_told_before_anything_is_written(cohorts: tuple[str, str], lab: str, tmp_path: Path) -> None:
    good = tables(cohorts, tmp_path)
    for changes, message in (
        ({"functions": {"size": f"{lab}:one"}}, "functions: size is no covariate"),
        ({"functions": {"age": "os.path:join"}}, f"allow it with {ALLOWED}=os.path"),
        ({"functions": {"age": f"{lab}:two"}}, f"functions.age: the module {lab} has no function 'two'"),
        (
            {"tables": {VOLUME: good[VOLUME] | {"reference": "absent.csv"}}},
            f"tables.{VOLUME}.reference: there is no table",
        ),
        ({"tables": {VOLUME: good[VOLUME] | {"columns": ["lft"]}}}, "did you mean 'left'"),
        ({"usefulness": {"tasks": ["height"]}}, "usefulness.tasks: height is none of age, sex, ventricular_volume"),
        ({"usefulness": {"batch_size": 16}}, "needed are 64 real training scans"),
    ):
        config = config_of(cohorts, tmp_path, **changes)
        with pytest.raises(UserError, match=message):
            evaluate(config)
        if "two" not in message:
            with pytest.raises(UserError, match=message):
                describe_evaluate(config)
    assert not (tmp_path / "out").exists()


def test_a_ruler_that_says_one_thing_of_all_is_told(cohorts: tuple[str, str], lab: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"age: the ruler cannot be calibrated on \d+ training scans"):
        evaluate(config_of(cohorts, tmp_path, functions={"age": f"{lab}:one"}))
    with pytest.raises(UserError, match=r"sex: the ruler must give the probability of M, in \[0, 1\]"):
        evaluate(config_of(cohorts, tmp_path / "sex", functions={"sex": f"{lab}:one"}))


def test_usefulness_is_reported_and_not_trained_twice(
    cohorts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = {"tasks": ["age", "sex"], "steps": 10, "batch_size": 4, "seeds": [0, 1], "volumes": 40}
    config = config_of(cohorts, tmp_path, usefulness=budget)
    found = judged(config)
    lines = [metric for metric in found if metric.startswith("usefulness, ")]
    assert len(lines) == 4
    assert found["usefulness, age: change of MAE, synthetic instead of real"].unit == "years"
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())["usefulness"]
    assert [task["name"] for task in numbers] == ["age", "sex"]
    made, train, test = numbers[0]["available"]
    assert made == len(open_dataset(cohorts[0]))
    assert (train, test) == tuple(len(open_dataset(cohorts[1], split=s)) for s in ("train", "validation"))
    arms = {arm["name"]: (arm["n_real"], arm["n_synthetic"]) for arm in numbers[0]["result"]["arms"]}
    assert arms["synthetic"] == (0, 40)  # of 48
    assert arms["real"] == (train, 0)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Usefulness: train on synthetic, test on real" in page
    assert 'alt="usefulness, sex"' in page

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(usefulness_tasks, "run_usefulness", never)
    assert judged(config) == found
    with pytest.raises(AssertionError, match="trained again"):
        judged(config_of(cohorts, tmp_path, usefulness=budget | {"steps": 11}))
