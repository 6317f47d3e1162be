"""The jobs: what each reads and what it is for. The command line, `jobs/`, the documentation and the tests read this table.

The stage of the job `train-diffusion` is `brainsynth/stages/train_diffusion.py`: `run(config)` does it, `describe(config)`
says what it would do. Where a job's verdict decides what comes next, `exit_code(result)` gives it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from brainsynth.errors import UserError
from brainsynth.progress import importing


@dataclasses.dataclass(frozen=True)
class Job:
    """One job."""

    record: str
    """`module.Name` in `config/` of the record that its YAML file is read into."""
    summary: str
    """What it does, in a line."""

    @property
    def config(self) -> type[Any]:
        """That record; a command imports its own alone."""
        module, _, name = self.record.partition(".")
        config: type[Any] = getattr(importlib.import_module(f"brainsynth.config.{module}"), name)
        return config


JOBS = {
    "make-phantoms": Job("schema.PhantomConfig", "procedural brains with known volumes, as a BIDS folder"),
    "prepare-cohort": Job(
        "schema.PrepareConfig", "scans → one grid, RAS+, [0, 1], split by subject; broken scans → rejects.tsv"
    ),
    "train-autoencoder": Job("training.AutoencoderTrainConfig", "prepared cohort → autoencoder"),
    "encode-latents": Job("schema.EncodeConfig", "prepared cohort + autoencoder → latents, their shift and scale"),
    "train-diffusion": Job("training.DiffusionTrainConfig", "latents → conditional denoiser"),
    "train-labeller": Job(
        "labelling.LabellerTrainConfig",
        "prepared cohort with label maps → labeller, which names the structures of a volume",
    ),
    "train-renderer": Job(
        "labelling.RendererTrainConfig", "prepared cohort with label maps → renderer, which makes images of label maps"
    ),
    "export-bundle": Job("schema.ExportConfig", "trained runs → bundle: all that generation needs"),
    "generate": Job("schema.GenerateConfig", "bundle + covariates → dataset of synthetic brains, and its report"),
    "evaluate": Job(
        "evaluation.EvaluateConfig", "dataset against real scans: does it look like them and obey its labels?"
    ),
    "audit": Job(
        "audit.AuditConfig", "does the dataset copy or disclose its training people? exit code 0: PASS, 1: FAIL"
    ),
    "release": Job("release.ReleaseConfig", "verified and audited dataset → folder to publish: data, cards, checksums"),
    "distill-decoder": Job("distillation.DistillConfig", "bundle → the same bundle with a light decoder"),
    "distill-steps": Job(
        "distillation.StepDistillConfig", "bundle → bundle whose denoiser needs one, two or four evaluations"
    ),
}


GENERATE = ("torch", "monai", "ray", "scipy", "matplotlib", "safetensors", "einops")
EXTRAS = {"generate": GENERATE, "train": (*GENERATE, "tensorboardX")}
"""The libraries of the extras that commands need, as pyproject.toml has them."""


def stage(verb: str) -> ModuleType:
    """The module of a verb; importing it may take seconds, so its words and its config are checked first.

    Raises:
        UserError: a library is not installed; names the extra that has it.
    """
    with named_extra(verb), importing():
        return importlib.import_module(f"brainsynth.stages.{verb.replace('-', '_')}")


@contextlib.contextmanager
def named_extra(verb: str) -> Iterator[None]:
    """A library of an extra that is not installed becomes a UserError that names the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in EXTRAS["train"]:
            raise
        raise _not_installed(verb, library) from None


def check_extra(verb: str) -> None:
    """Raises UserError, before anything is written, when a library that a job needs is not installed."""
    for library in EXTRAS[_extra(verb)]:
        try:
            there = importlib.util.find_spec(library) is not None
        except ModuleNotFoundError:
            there = False
        if not there:
            raise _not_installed(verb, library)


def _extra(verb: str) -> str:
    return "train" if verb.startswith(("train", "distill")) else "generate"


def _not_installed(verb: str, library: str) -> UserError:
    install = f"pip install 'brainsynth[{_extra(verb)}]'"
    return UserError(f"brainsynth {verb} needs {library}, which is not installed: {install}")


def run_job(name: str, config: Any, dry_run: bool = False) -> int:
    """Run a job with its config, or print what it would do. Returns the exit code."""
    runtime = getattr(config, "runtime", None)
    if runtime is not None:
        from brainsynth.executors.preflight import check_layout

        check_layout(runtime)  # a layout that cannot run must not wait for torch
    module = stage(name)
    if dry_run:
        with named_extra(name):
            print(module.describe(config))
        return 0
    check_extra(name)
    result = module.run(config)
    return int(module.exit_code(result)) if hasattr(module, "exit_code") else 0
