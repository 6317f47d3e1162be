"""Cases on a real tiny model: one noise under many covariates with its pictures, and cohorts by their description."""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from brainsynth import open_dataset
from brainsynth.config.schema import GenerateConfig
from brainsynth.covariates.constraints import Constraint
from brainsynth.covariates.described import draw_cohort, own_quantiles, parse_constraint
from brainsynth.covariates.distribution import CovariateDistribution, fit_distribution
from brainsynth.covariates.sweep import held_values, parse_sweep, sweep_rows
from brainsynth.errors import UserError
from brainsynth.planning import plan_generation
from brainsynth.report import case_figures
from brainsynth.storage.commit import read_plan, read_samples
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.finalise import SUBJECTS_KEY
from brainsynth.storage.verify import verify_dataset
from tests.commands import brainsynth, tree
from tests.conftest import SCHEMA
from tests.line import Line, as_config, write_yaml

REPO = Path(__file__).parents[2]
HELD = {"age": 50.0, "sex": "F", "ventricular_volume": 20.0}


@pytest.fixture(scope="module")
def distribution() -> CovariateDistribution:
    """Of 400 made-up people: ventricles grow with age."""
    rng = np.random.default_rng(0)
    age = rng.uniform(20, 90, 400)
    volume = np.exp(2.0 + age / 60 + rng.normal(0, 0.3, 400)).clip(4, 140)
    table = pd.DataFrame({"age": age, "sex": rng.choice(["F", "M"], 400), "ventricular_volume": volume})
    return fit_distribution(table, SCHEMA, "made-up people")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("age=45:85", (45.0, 55.0, 65.0, 75.0, 85.0)),
        ("age=45:85:3", (45.0, 65.0, 85.0)),
        ("age=80:40:2", (80.0, 40.0)),
        ("age=70,30", (70.0, 30.0)),
        ("ventricular_volume=10:40:3", (10.0, 20.0, 40.0)),  # even on its log scale
        ("ventricular_volume=x0.5:x2", (10.0, 14.142135624, 20.0, 28.284271247, 40.0)),
        ("age=x0.5:x2:3", (25.0, 50.0, 100.0)),
        ("sex=M,F", ("M", "F")),
    ],
)
def test_a_sweep_is_what_was_written(text: str, values: tuple[Any, ...]) -> None:
    assert parse_sweep(text, SCHEMA, HELD).values == values


@pytest.mark.parametrize(
    "text",
    [
        "age",
        "age=",
        "agee=1:2",
        "age=1",
        "age=1,1",
        "age=5:5",
        "age=1:2:1",
        "age=1:2:3.5",
        "age=1:2:3:4",
        "age=1:nan",
        "age=1_0:20",
        "age=x1:2",
        "ventricular_volume=0:10",
        "sex=F",
        "sex=F,F",
        "sex=X,F",
        "sex=F:M",
        "age=1:99:61",
    ],
)
def test_what_is_no_sweep_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        parse_sweep(text, SCHEMA, HELD)


def test_what_does_not_move_is_held(distribution: CovariateDistribution) -> None:
    held = held_values(SCHEMA, distribution, ["sex=M", "age=33"])
    assert held["sex"] == "M"
    assert held["age"] == 33.0
    assert held["ventricular_volume"] == round(distribution.quantile("ventricular_volume", 0.5), 3)
    with pytest.raises(UserError, match="give age, ventricular_volume"):
        held_values(SCHEMA, None, [])
    for hold in (["sex=F,M"], ["age=1", "age=2"], ["weight=3"], ["age=old"]):
        with pytest.raises(UserError):
            held_values(SCHEMA, distribution, hold)


def test_rows_of_two_sweeps_are_a_grid_of_one_noise() -> None:
    sweeps = [parse_sweep(text, SCHEMA, HELD) for text in ("age=40:60:3", "sex=F,M")]
    rows = sweep_rows(sweeps, HELD, 7)
    assert list(rows["age"]) == [40, 40, 50, 50, 60, 60]
    assert list(rows["sex"]) == ["F", "M"] * 3
    assert set(rows["noise_seed"]) == {7}
    assert set(rows["ventricular_volume"]) == {20.0}
    assert list(rows["sample_id"][:2]) == ["point00x00", "point00x01"]
    for wrong in ([], sweeps * 2, [sweeps[0], sweeps[0]], [parse_sweep("age=20:90:13", SCHEMA, HELD), sweeps[1]]):
        with pytest.raises(UserError):
            sweep_rows(wrong, HELD, 7)
    with pytest.raises(UserError, match="--seed"):
        sweep_rows(sweeps, HELD, -1)


@pytest.fixture(scope="module")
def varied(line: Line, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Three ages by two ventricular volumes, one of them far outside; the folder and the arguments that made it."""
    root = tmp_path_factory.mktemp("cases")
    config = write_yaml(line.generate("/nowhere", covariates={"draw": 1}), root)
    arguments = [
        "vary",
        "--config",
        str(config),
        "--output",
        str(root / "case"),
        "--allow-extrapolation",
        "--seed",
        "3",
    ]
    arguments += ["--sweep", "age=45:85:3", "--sweep", "ventricular_volume=20,170", "--hold", "sex=M"]
    with pytest.MonkeyPatch.context() as patch:
        assert brainsynth(patch, *arguments) == 0
    return root / "case", arguments


def test_vary_makes_an_ordinary_dataset_of_one_noise(varied: tuple[Path, list[str]]) -> None:
    root = varied[0] / "dataset"
    store = open_store(str(root))
    assert verify_dataset(store).ok
    samples = read_samples(store, read_plan(store))
    assert samples["seed"].nunique() == 1
    assert list(samples["age"]) == [45, 45, 65, 65, 85, 85]
    assert list(samples["ventricular_volume"]) == [20, 170] * 3
    subjects = pd.read_parquet(io.BytesIO(store.read(SUBJECTS_KEY)))
    assert set(subjects["extrapolated"][1::2]) == {True}  # 170 ml are beyond the model's 150
    images = open_dataset(str(root)).volumes()
    assert len({image.tobytes() for image in images}) == 6


def test_the_series_and_its_pictures_tell_the_same(varied: tuple[Path, list[str]]) -> None:
    folder = varied[0]
    series = pd.read_csv(folder / "series.tsv", sep="\t")
    subjects = pd.read_parquet(folder / "dataset" / SUBJECTS_KEY)
    assert list(series["sample_id"]) == list(subjects["sample_id"])
    assert list(series["extrapolated"]) == list(subjects["extrapolated"])
    images = open_dataset(str(folder / "dataset")).volumes()
    expected = np.abs(images - images[0]).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(series["mean_absolute_difference"], expected, rtol=1e-4)
    assert series["mean_absolute_difference"][0] == 0
    for name in ("grid.png", "differences.png"):
        with Image.open(folder / name) as picture:
            assert "AI-generated" in picture.text["Description"]
            assert np.asarray(picture.convert("L")).std() > 5
    with Image.open(folder / "montage.gif") as film:
        assert film.n_frames == 4  # three ages, and back
        assert b"AI-generated" in film.info["comment"]
        frames = []
        for number in range(film.n_frames):
            film.seek(number)
            frames.append(np.asarray(film.convert("L")))
        assert (frames[0] != frames[1]).any()
        np.testing.assert_array_equal(frames[1], frames[3])


def test_vary_again_changes_nothing(varied: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, arguments = varied
    before = tree(folder)
    assert brainsynth(monkeypatch, *arguments) == 0
    assert tree(folder) == before


def test_another_case_in_the_same_folder_is_refused(
    varied: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, arguments = varied
    before = tree(folder)
    assert brainsynth(monkeypatch, *arguments, "--hold", "brain_volume=1200") == 2
    assert "holds another plan" in capsys.readouterr().err
    assert tree(folder) == before


def test_extrapolation_wants_its_flag(
    varied: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [a for a in varied[1] if a != "--allow-extrapolation"]
    arguments[arguments.index("--output") + 1] = str(tmp_path / "case")
    assert brainsynth(monkeypatch, *arguments) == 2
    told = capsys.readouterr().err
    assert "outside the training support" in told
    assert "ventricular_volume 170" in told
    assert "--allow-extrapolation" in told
    assert not (tmp_path / "case").exists()


def test_the_commands_of_the_page_run(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (REPO / "docs/cases.md").read_text().replace("\\\n", " ")
    commands = [shlex.split(text) for text in re.findall("^brainsynth (.*)$", page, re.MULTILINE)]
    assert [command[0] for command in commands] == ["vary", "vary", "cohort", "generate"]
    (tmp_path / "configs").symlink_to(REPO / "configs")
    (tmp_path / "demo-train-output").symlink_to(line.root)
    monkeypatch.chdir(tmp_path)
    for command in commands:
        dry = (
            ["--dry-run", "--set", "runtime.workers=0", "--set", "runtime.micro_batch=1", "--set", "sampler.steps=2"]
            if command[0] in ("vary", "generate")
            else []
        )
        assert brainsynth(monkeypatch, *command, *dry) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert "9 points of age, 0 extrapolated" in told
    assert "15 points of age and ventricular_volume" in told
    assert len(pd.read_csv("women.csv")) == 200
    assert not any((line.root / name).exists() for name in ("ageing", "age-and-ventricles"))


def test_a_point_that_was_not_made_leaves_its_place_empty() -> None:
    rng = np.random.default_rng(0)
    volumes = [rng.random((8, 9, 10), dtype=np.float32), None, rng.random((8, 9, 10), dtype=np.float32)]
    assert [c is None for c in case_figures.change(volumes, 0)] == [False, True, False]
    assert [c is None for c in case_figures.change(volumes, 1)] == [True] * 3
    for reference in (0, 1):
        data = case_figures.differences(volumes, ["a", "b", "c"], [False, False, True], 3, reference)
        assert Image.open(io.BytesIO(data)).format == "PNG"
    assert Image.open(io.BytesIO(case_figures.grid(volumes, ["a", "b", "c"], [False] * 3, 2))).format == "PNG"


def test_a_described_cohort_is_as_described(distribution: CovariateDistribution) -> None:
    asked = ["sex=F", "age=70:80", "ventricular_volume=q0.9:"]
    rows, about = draw_cohort(distribution, 200, 0, asked)
    assert len(rows) == 200
    assert set(rows["sex"]) == {"F"}
    assert rows["age"].between(70, 80).all()
    assert (rows["ventricular_volume"] >= distribution.quantile("ventricular_volume", 0.9)).all()
    assert about["only"][2] == {"name": "ventricular_volume", "low_quantile": 0.9}
    assert 0 < about["share_of_distribution"] < 0.2
    again, _ = draw_cohort(distribution, 50, 0, asked)
    pd.testing.assert_frame_equal(again, rows.head(50))


def test_the_upper_decile_of_those_who_are_chosen(distribution: CovariateDistribution) -> None:
    old = [parse_constraint("age=75:", SCHEMA)]
    (_, own) = own_quantiles(distribution, [*old, Constraint(name="ventricular_volume", low_quantile=0.9)])
    assert own.low_quantile is None
    people = distribution.draw(4000, 5, old)["ventricular_volume"]
    assert (people >= own.low).mean() == pytest.approx(0.1, abs=0.02)
    assert own.low > distribution.quantile("ventricular_volume", 0.9)


def test_spread_values_are_even_and_independent(distribution: CovariateDistribution) -> None:
    rows, _ = draw_cohort(distribution, 3000, 0, ["sex=M"], ["age=30:80", "ventricular_volume=10:100"])
    bins = np.histogram(rows["age"], 5, (30, 80))[0] / 3000
    assert np.abs(bins - 0.2).max() < 0.03
    logs = np.log(rows["ventricular_volume"])
    assert np.abs(np.histogram(logs, 5, (np.log(10), np.log(100)))[0] / 3000 - 0.2).max() < 0.03
    assert abs(np.corrcoef(rows["age"], logs)[0, 1]) < 0.06


@pytest.mark.parametrize(
    ("only", "spread"),
    [
        (["age=70"], []),
        (["age=:"], []),
        (["age=a:b"], []),
        (["weight=1:2"], []),
        (["sex=X"], []),
        (["age=200:300"], []),
        (["age=q2:"], []),
        (["age=1:20", "age=30:40"], []),
        (["age=30:40"], ["age=30:40"]),
        ([], ["sex=F:M"]),
        ([], ["age=50:40"]),
        ([], ["ventricular_volume=0:40"]),
    ],
)
def test_what_describes_nobody_is_refused(
    only: list[str], spread: list[str], distribution: CovariateDistribution
) -> None:
    with pytest.raises(UserError):
        draw_cohort(distribution, 5, 0, only, spread)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_generate_takes_a_drawn_cohort(
    suffix: str, line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / f"men{suffix}"
    bundle = line.root / "bundle"
    command = ["cohort", "--bundle", bundle, "--rows", 3, "--output", table, "--only", "sex=M"]
    assert brainsynth(monkeypatch, *command, "--spread", "age=96:99", "--quantiles-of", "chosen") == 2
    assert not table.exists()
    assert brainsynth(monkeypatch, *command, "--spread", "age=96:99", "--allow-extrapolation") == 0
    about = json.loads(table.with_suffix(".json").read_text())
    assert (about["rows"], about["extrapolated"], about["spread"]) == (3, 3, {"age": [96.0, 99.0]})
    made = tree(tmp_path)
    assert brainsynth(monkeypatch, *command) == 2
    told = capsys.readouterr().err
    assert f"{table} is there already and holds something else" in told
    assert f"give a new name, or remove {table.name} and men.json" in told
    table.with_suffix(".json").unlink()  # as if it had been killed in between
    for already in ("", ", as it is there already"):
        assert brainsynth(monkeypatch, *command, "--spread", "age=96:99", "--allow-extrapolation") == 0
        assert capsys.readouterr().out.strip().endswith(f"extrapolated: {table}{already}")
        assert tree(tmp_path) == made
    source = {"table": str(table), "allow_extrapolation": True}
    config = line.generate(tmp_path / "made", covariates=source)
    work = plan_generation(as_config(config, GenerateConfig, tmp_path))
    assert list(work.samples["extrapolated"]) == [True] * 3
    assert set(work.samples["sex"]) == {"M"}
    assert work.samples["age"].between(96, 99).all()
