"""A folder that looks like the repository to documented commands, with configs of the same names made small.

A config keeps its paths and its kind of network. Sizes, steps and counts shrink, scans become phantoms, and the work is
done in this process.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from brainsynth import cli
from tests.docs.pages import REPO, Command
from tests.line import COVARIATES, DENOISERS, GRID, LOCAL, Line

TRAINING = {"workers": 0, "threads_per_worker": 1, "trackers": []}
VOLUME = {
    "shape_xyz": list(GRID.shape_xyz),
    "spacing_mm": list(GRID.spacing_mm),
    "origin_mm": list(GRID.origin_mm),
}
PEOPLE, ROWS = 40, 24
SMALLER = {
    "--count 64": "--count 2 --workers 0",
    "--count 1000": "--count 1 --workers 0",
    "count=4, output": "count=1, output",
    "--table older-women.csv": "--table older-women.csv --workers 0",
    "covariates.draw=1000": "covariates.draw=2",
    "--rows 200": "--rows 2",
    "features.steps=40": "features.steps=2",
}
"""What pages ask for in numbers, and what is made here."""


class Sandbox:
    """Where the commands of pages run, one after the other."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder, self.environment = root, root, {}
        for path in REPO.glob("configs/*/*.yaml"):
            copy = root / path.relative_to(REPO)
            copy.parent.mkdir(parents=True, exist_ok=True)
            small = shrunk(path, yaml.safe_load(path.read_text()))
            copy.write_text(yaml.safe_dump(small, sort_keys=False))
        self.places = {"/data/": f"{root}/data/"}
        (root / "data").mkdir()

    def run(self, command: Command) -> None:
        """Raises AssertionError with all it said when a command fails."""
        text = command.text
        for big, small in {**SMALLER, **self.places}.items():
            text = text.replace(big, small)
        words = shlex.split(text, comments=True)
        if words[0] == "cd":
            self.folder = self.root / words[1]
        elif words[0] == "export":
            self.environment |= dict(word.split("=", 1) for word in words[1:])
        else:
            code, said = self._run(words)
            assert code == 0, f"{command}\nas {text}\nended with {code} and said:\n{said[-4000:]}"

    def run_python(self, code: str, where: str) -> None:
        """A block of Python as a file of its own."""
        for big, small in {**SMALLER, **self.places}.items():
            code = code.replace(big, small)
        script = self.root / "example.py"
        script.write_text(code)
        with self._inside() as said:
            try:
                runpy.run_path(str(script), run_name="__main__")
            except Exception:
                raise AssertionError(f"{where}\n{traceback.format_exc()}\n{said.getvalue()}") from None

    @contextlib.contextmanager
    def _inside(self) -> Any:
        said = io.StringIO()
        before = Path.cwd()
        os.chdir(self.folder)
        try:
            with (
                mock.patch.dict(os.environ, self.environment),
                contextlib.redirect_stdout(said),
                contextlib.redirect_stderr(said),
            ):
                yield said
        finally:
            os.chdir(before)

    def _run(self, words: list[str]) -> tuple[int, str]:
        """In this process where it can be: most of what a small command costs is to import torch."""
        if words[0] == "make":
            words = made_by(words[1])
        if words[0] != "brainsynth":
            done = subprocess.run(words, cwd=self.folder, capture_output=True, text=True, timeout=600)
            return done.returncode, done.stdout + done.stderr
        with self._inside() as said:
            try:
                cli.main(words[1:])
            except SystemExit as left:
                return int(left.code or 0), said.getvalue()
            except Exception:
                return 1, said.getvalue() + traceback.format_exc()
        return 0, said.getvalue()


def made_by(target: str) -> list[str]:
    """The last command of a target of the Makefile, without its folder; the suite itself may run under make."""
    printed = subprocess.run(
        ["make", "--no-print-directory", "-n", "-o", ".venv/.ready", target],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    return shlex.split(re.sub(r"^\S*/bin/", "", printed.stdout.strip().splitlines()[-1]))


def shrunk(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A config of the repository, made small."""
    line, kind = Line(Path()), re.sub(r"^\d+-", "", path.stem)
    small: dict[str, Any] = {}
    if kind == "phantoms":
        small = {
            "num_subjects": PEOPLE,
            "spacing_mm": GRID.spacing_mm[0],
            "shape_xyz": VOLUME["shape_xyz"],
            "workers": 1,
        }
    elif kind == "cohort":
        demo = path.parent.name == "demo-train"
        small = line.prepare() | {"source": config["source"] if demo else {"path": "phantoms"}}
        small = {k: v for k, v in small.items() if k != "output"} | {"validation_fraction": 0.3}
        small |= {"covariates": COVARIATES, "volume": VOLUME}
    elif kind == "autoencoder":
        make = line.pyramid if config["architecture"].get("kind") == "pyramid" else line.autoencoder
        small = make(steps=2, validate_every=2) | {"runtime": TRAINING}
    elif kind == "latents":
        small = {"runtime": LOCAL}
    elif kind.startswith("diffusion"):
        network = config["architecture"].get("kind", "unet")
        small = line.diffusion() | {
            "architecture": DENOISERS[network],
            "schedule": config["schedule"],
            "runtime": TRAINING,
        }
    elif kind == "generate":
        shipped = "bundle" not in config
        small = {"covariates": {"draw": 2 if shipped else ROWS}, "samples_per_shard": 6, "runtime": LOCAL, "gate": None}
        method = "ab2" if path.parent.name == "paper" else config["sampler"]["method"]  # no published weights: a flow
        small["sampler"] = config["sampler"] | {"method": method, "steps": 2}
    elif kind == "evaluate":
        small = {
            "pairs": 10,
            "features": None if path.parent.name == "demo-train" else {"steps": 2},
            "publish": True,
            "runtime": LOCAL,
        }
        config = {
            k: v
            for k, v in config.items()
            if k not in ("segmentation", "structures", "usefulness", "trajectories", "by")
        }
    elif kind == "audit":
        small = {"false_alarm_rate": 0.1, "pictures": False}
        small["runtime"] = {"workers": 0, "threads_per_worker": 1, "micro_batch": 16}
        config = {k: v for k, v in config.items() if k not in ("same_person", "embedder")}
    elif kind == "labeller":
        small = {"architecture": {"channels": [8, 8], "blocks": [1, 1]}, "runtime": TRAINING}
        small["optimisation"] = config["optimisation"] | {"steps": 2}
        config = {key: value for key, value in config.items() if key not in ("bundle", "bundle_output")}
    elif kind == "renderer":
        small = {"architecture": {"width": 8, "blocks": 1, "coarse": 4}, "runtime": TRAINING}
        small["losses"] = {"adversarial_start": 1, "discriminator_channels": 4}
        small["crops"] = {"cells": 6, "critics_alone": 0}
        small["optimisation"] = config["optimisation"] | {"steps": 2}
        config = {key: value for key, value in config.items() if key not in ("bundle", "bundle_output")}
    elif kind == "distill-decoder":
        small = line.distillation()
    elif kind == "distill-steps":
        small = line.step_distillation() | {"evaluations": config["evaluations"]}
        small["trajectories"]["sampler"]["steps"] = 2 * config["evaluations"]
        small["trajectories"]["reference_steps"] = 6 * config["evaluations"]
    paths = {key: value for key, value in config.items() if isinstance(value, str)}
    return config | small | paths
