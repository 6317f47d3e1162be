"""jobs/evaluate.py with rulers of the user's own, published measurements, and the usefulness test; on phantoms."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from brainsynth import open_dataset
from brainsynth.cohort.phantom_cohort import DERIVATIVE, write_phantom_cohort
from brainsynth.config.evaluation import EvaluateConfig
from brainsynth.config.schema import PrepareConfig
from brainsynth.errors import UserError
from brainsynth.instruments.own_rulers import ALLOWED
from brainsynth.labels import DSEG
from brainsynth.records import to_dict
from brainsynth.stages import evaluate, prepare_cohort
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.verify import verify_dataset
from brainsynth.usefulness import tasks as usefulness_tasks
from tests.line import GRID, Line, as_config

CODE = """
calls = 0

def bright(volume, affine):
    global calls
    calls += 1
    if calls == 3:
        raise ValueError("the third one")
    return float((volume > 0.1).sum())
"""
VOLUME = "ventricular_volume"
PHANTOM = ("csf", "grey_matter", "white_matter", "ventricles")


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Phantoms that stand in for generated volumes, and a reference cohort."""
    root = tmp_path_factory.mktemp("rulers")
    made = []
    for name, seed in (("stand-in", 6), ("reference", 5)):
        folder = write_phantom_cohort(root / name / "phantoms", 48, seed, GRID, labels=True)
        config = Line(root).prepare() | {
            "source": {"path": str(folder), "label_folder": DERIVATIVE},
            "output": str(root / name / "cohort"),
            "validation_fraction": 0.3,
        }
        prepare_cohort.run(as_config(config, PrepareConfig, root))
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


def tables(cohorts: tuple[str, str], folder: Path) -> dict[str, Any]:
    """What another tool might measure: the true volumes in mm³, off by a line and by noise."""
    rng = np.random.default_rng(0)
    paths = {}
    for which, uri in zip(("dataset", "reference"), cohorts, strict=True):
        table = open_dataset(uri).table
        total = 1000 * (0.9 * table[VOLUME] + 3) * rng.normal(1, 0.02, len(table))
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
        "features": {"steps": 10},
        "runtime": {"workers": 0, "threads_per_worker": 1},
    }
    folder.mkdir(exist_ok=True)
    return as_config(config | changes, EvaluateConfig, folder)


@pytest.mark.slow
def test_all_at_once(cohorts: tuple[str, str], lab: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table, a function, published measurements and the usefulness test, in one evaluation."""
    budget = {"tasks": ["age", "structures"], "steps": 10, "batch_size": 4, "seeds": [0, 1], "volumes": 24}
    budget["box_xyz"] = [16, 24, 16]
    config = config_of(
        cohorts,
        tmp_path,
        tables=tables(cohorts, tmp_path),
        functions={"age": f"{lab}:bright"},
        publish=True,
        usefulness=budget,
    )
    before = (Path(cohorts[0]) / "dataset.json").read_bytes()
    found = {finding.metric: finding for finding in evaluate.run(config)}
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())

    r = found[f"{VOLUME}: r of measured with asked"]
    assert r.value > 0.98
    assert r.as_real
    assert abs(found[f"{VOLUME}: bias"].value) < 1  # calibrated: the tool's own line is gone
    assert numbers["facts"]["rulers"].split("; ")[:3] == [
        f"age: function {lab}:bright",
        "sex: ridge on tissue maps",
        f"{VOLUME}: table, left + right",
    ]

    dataset = open_dataset(cohorts[0], measured=True)
    table = dataset.table
    assert np.corrcoef(table[f"measured_{VOLUME}"], table[VOLUME])[0, 1] == pytest.approx(r.value, abs=1e-6)
    assert table["measured_sex"].between(0, 1).all()
    assert np.flatnonzero(table["measured_age"].isna()).tolist() == [2]  # where the function failed; others went on
    assert table["sample_id"].tolist() == dataset.sample_ids
    assert (Path(cohorts[0]) / "dataset.json").read_bytes() == before
    assert verify_dataset(open_store(cohorts[0])).ok

    lines = [metric for metric in found if metric.startswith("usefulness, ")]
    assert len(lines) == 4
    assert found["usefulness, age: change of MAE, synthetic instead of real"].unit == "years"
    tasks = numbers["usefulness"]
    assert [task["name"] for task in tasks] == ["age", "structures"]
    assert tasks[1]["available"] == tasks[0]["available"]
    assert tasks[1]["ventricles"] == ["ventricles"]
    assert tasks[1]["result"]["config"]["box_xyz"] == [16, 24, 16]
    found_of = tasks[1]["result"]["arms"][0]["metrics"]
    assert list(found_of) == ["dice", "dice_all_ventricles", *(f"dice_{name}" for name in PHANTOM)]
    assert found_of["dice_all_ventricles"] == found_of["dice_ventricles"]
    assert 0 < found_of["dice"]["mean"] < 1
    made, train, test = tasks[0]["available"]
    assert made == len(dataset)
    assert (train, test) == tuple(len(open_dataset(cohorts[1], split=s)) for s in ("train", "validation"))
    arms = {arm["name"]: (arm["n_real"], arm["n_synthetic"]) for arm in tasks[0]["result"]["arms"]}
    assert arms["synthetic"] == (0, 24)  # of 48
    assert arms["real"] == (min(train, 24), 0)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Usefulness: train on synthetic, test on real" in page
    assert 'alt="usefulness, age"' in page
    assert 'alt="usefulness, structures"' in page
    assert "dice_grey_matter" in page

    place = (str(tmp_path / "out" / "measured-dataset"), str(tmp_path / "out" / "measured-reference"))
    store, reference = open_store(str(tmp_path / "out")), open_dataset(cohorts[1])
    other = replace(config, usefulness=replace(config.usefulness, steps=11, tasks=("structures",)))
    shutil.copytree(cohorts[0], tmp_path / "damaged")
    shutil.rmtree(tmp_path / "damaged" / "dataset.zarr" / DSEG / "c" / "1")
    (left,) = usefulness_tasks.usefulness_results(
        other, *place, open_dataset(str(tmp_path / "damaged")), reference, store
    )
    assert left.available == (len(dataset) - 8, train, test)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(usefulness_tasks, "run_usefulness", never)
    datasets = dataset, reference
    again = usefulness_tasks.usefulness_results(config, *place, *datasets, store)
    assert [to_dict(task) for task in again] == tasks
    other = replace(config, usefulness=replace(config.usefulness, steps=12))
    with pytest.raises(AssertionError, match="trained again"):
        usefulness_tasks.usefulness_results(other, *place, *datasets, store)


def test_bad_rulers_are_told_before_anything_is_written(cohorts: tuple[str, str], lab: str, tmp_path: Path) -> None:
    good = tables(cohorts, tmp_path)
    for changes, message in (
        ({"functions": {"size": f"{lab}:bright"}}, "functions: size is not a covariate"),
        ({"functions": {"age": "os.path:join"}}, f"allow it with {ALLOWED}=os.path"),
        (
            {"tables": {VOLUME: good[VOLUME] | {"reference": "absent.csv"}}},
            f"tables.{VOLUME}.reference: there is no table",
        ),
        ({"tables": {VOLUME: good[VOLUME] | {"columns": ["lft"]}}}, "did you mean 'left'"),
        ({"usefulness": {"tasks": ["height"]}}, "usefulness.tasks: height is none of age, sex, ventricular_volume"),
        ({"usefulness": {"batch_size": 16}}, "needed are 64 real training scans"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.describe(config_of(cohorts, tmp_path, **changes))
    with pytest.raises(UserError, match=f"functions.age: the module {lab} has no function 'two'"):
        evaluate.run(config_of(cohorts, tmp_path, functions={"age": f"{lab}:two"}))
    assert not (tmp_path / "out").exists()


def test_structures_without_label_maps_are_refused(cohorts: tuple[str, str], tmp_path: Path) -> None:
    write_phantom_cohort(tmp_path / "phantoms", 4, 7, GRID)
    prepare_cohort.run(as_config(Line(tmp_path).prepare(), PrepareConfig, tmp_path))
    bare = str(tmp_path / "cohort")
    for which, pair in (("dataset", (bare, cohorts[1])), ("reference", (cohorts[0], bare))):
        with pytest.raises(
            UserError, match=f"structures: {which}: .*/cohort has no label maps; generate it with labels"
        ):
            evaluate.run(config_of(pair, tmp_path, usefulness={"tasks": ["structures"]}))
    assert not (tmp_path / "out").exists()
