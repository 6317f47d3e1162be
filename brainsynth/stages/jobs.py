"""The jobs: what each reads and what it is for. The command line, `jobs/`, the documentation and the tests read this table.

The stage of the job `train-diffusion` is `brainsynth/stages/train_diffusion.py`: `run(config)` does it, `describe(config)`
says what it would do. Where a job's verdict decides what comes next, `exit_code(result)` gives it.
"""

from __future__ import annotations

import dataclasses
import importlib
from types import ModuleType
from typing import Any

from brainsynth.config.audit import AuditConfig
from brainsynth.config.distillation import DistillConfig, StepDistillConfig
from brainsynth.config.evaluation import EvaluateConfig
from brainsynth.config.release import ReleaseConfig
from brainsynth.config.schema import EncodeConfig, ExportConfig, GenerateConfig, PhantomConfig, PrepareConfig
from brainsynth.config.training import AutoencoderTrainConfig, DiffusionTrainConfig
from brainsynth.errors import UserError


@dataclasses.dataclass(frozen=True)
class Job:
    """One job."""

    config: type[Any]
    """The record that its YAML file is read into."""
    summary: str
    """What it does, in a line."""


JOBS = {
    "make-phantoms": Job(PhantomConfig, "procedural brains with known volumes, as a BIDS folder"),
    "prepare-cohort": Job(
        PrepareConfig, "scans → one grid, RAS+, [0, 1], split by subject; broken scans → rejects.tsv"
    ),
    "train-autoencoder": Job(AutoencoderTrainConfig, "prepared cohort → autoencoder"),
    "encode-latents": Job(EncodeConfig, "prepared cohort + autoencoder → latents, their shift and scale"),
    "train-diffusion": Job(DiffusionTrainConfig, "latents → conditional denoiser"),
    "export-bundle": Job(ExportConfig, "trained runs → bundle: all that generation needs"),
    "generate": Job(GenerateConfig, "bundle + covariates → dataset of synthetic brains, and its report"),
    "evaluate": Job(EvaluateConfig, "dataset against real scans: does it look like them and obey its labels?"),
    "audit": Job(AuditConfig, "does the dataset copy or disclose its training people? exit code 0: PASS, 1: FAIL"),
    "release": Job(ReleaseConfig, "verified and audited dataset → folder to publish: data, cards, checksums"),
    "distill-decoder": Job(DistillConfig, "bundle → the same bundle with a light decoder"),
    "distill-steps": Job(StepDistillConfig, "bundle → bundle whose denoiser needs one, two or four evaluations"),
}


EXTRAS = {
    **dict.fromkeys(("torch", "monai", "ray", "scipy", "matplotlib", "safetensors", "einops"), "generate"),
    "tensorboardX": "train",
}
"""Library → the extra of pyproject.toml that installs it."""


def stage(verb: str) -> ModuleType:
    """The module of a verb; importing it may take seconds, so its words and its config are checked first.

    Raises:
        UserError: a library is not installed; names the extra that has it.
    """
    try:
        return importlib.import_module(f"brainsynth.stages.{verb.replace('-', '_')}")
    except ModuleNotFoundError as error:
        raise missing_extra(error, f"brainsynth {verb}") from None


def missing_extra(error: ModuleNotFoundError, what: str) -> Exception:
    """What to raise for a library that is not there."""
    library = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(library)
    if extra is None:
        return error
    if what.startswith(("brainsynth train", "brainsynth distill")):
        extra = "train"
    return UserError(f"{what} needs {library}, which is not installed: pip install 'brainsynth[{extra}]'")


def run_job(name: str, config: Any, dry_run: bool = False) -> int:
    """Run a job with its config, or print what it would do. Returns the exit code."""
    runtime = getattr(config, "runtime", None)
    if runtime is not None:
        from brainsynth.executors.preflight import check_layout

        check_layout(runtime)  # a layout that cannot run must not wait for torch
    module = stage(name)
    if dry_run:
        print(module.describe(config))
        return 0
    result = module.run(config)
    return int(module.exit_code(result)) if hasattr(module, "exit_code") else 0
