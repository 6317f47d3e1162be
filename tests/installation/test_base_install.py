"""What the base install can do, and what it says of the rest: no library of the extras may be needed to read a dataset."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from brainsynth.stages.jobs import EXTRAS as JOB_EXTRAS

REPO = Path(__file__).parents[2]
STORED = REPO / "tests/stored/v1/dataset"
EXTRAS = [
    "torch",
    "monai",
    "ray",
    "scipy",
    "matplotlib",
    "safetensors",
    "einops",
    "tensorboardX",
    "xarray",
    "dask",
    "torchio",
]
WITHOUT = f"""
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


def without_extras(code: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Python in which the libraries of the extras are not installed."""
    command = [sys.executable, "-c", WITHOUT + code, *map(str, words)]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)


def brainsynth(*words: object) -> subprocess.CompletedProcess[str]:
    return without_extras("from brainsynth.cli import main; main()", *words)


def test_the_list_is_that_of_the_extras() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    optional = {
        line.split("[")[0].split(">")[0].split("=")[0].strip()
        for name in ("generate", "train", "readers")
        for line in project["optional-dependencies"][name]
    } - {"brainsynth"}
    assert optional == set(EXTRAS)
    assert {*JOB_EXTRAS["generate"]} == {
        line.split("[")[0].split(">")[0] for line in project["optional-dependencies"]["generate"]
    }
    assert {*JOB_EXTRAS["train"]} | {"xarray", "dask", "torchio"} == set(EXTRAS)
    base = {line.split(">")[0] for line in project["dependencies"]}
    assert not base & set(EXTRAS)


def test_a_dataset_is_read() -> None:
    code = f"""
import brainsynth
dataset = brainsynth.open_dataset({str(STORED)!r})
sample = dataset[0]
assert sample["image"].ndim == 3 and sample["affine"].shape == (4, 4)
assert len(dataset.table) == len(dataset)
assert brainsynth.verify_dataset({str(STORED)!r}).ok
print(len(dataset), "<svg" in dataset._repr_html_() or "<img" in dataset._repr_html_())
"""
    done = without_extras(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "True"


@pytest.mark.parametrize("form", ["nifti", "bids"])
def test_it_is_verified_and_exported(form: str, tmp_path: Path) -> None:
    dataset = shutil.copytree(STORED, tmp_path / "dataset")
    done = brainsynth("verify", dataset)
    assert done.returncode == 0, done.stdout + done.stderr
    done = brainsynth("export", dataset, "--to", form, "--output", tmp_path / form)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / form).rglob("*.nii.gz"))


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["generate", "--count", "2", "--output", "brains"], "generate"),
        (["generate", "--count", "2", "--output", "brains", "--dry-run"], "generate"),
        (["train-diffusion", "--config", "configs/t1w-2mm/4-diffusion.yaml"], "train"),
        (["demo"], "generate"),
        (["report", "DATASET"], "generate"),
    ],
)
def test_a_verb_names_the_extra_that_it_needs(words: list[str], extra: str) -> None:
    done = brainsynth(*words)
    assert done.returncode == 2
    assert f"pip install 'brainsynth[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (REPO / "brains").exists()


@pytest.mark.parametrize("words", [["--help"], ["generate", "--help"], ["configs"], ["--version"]])
def test_help_needs_nothing(words: list[str]) -> None:
    done = brainsynth(*words)
    assert done.returncode == 0, done.stderr


def test_a_release_is_checked_and_pushed_without_extras() -> None:
    done = without_extras("import brainsynth.stages.push, brainsynth.stages.released, brainsynth.stages.verify")
    assert done.returncode == 0, done.stderr
