"""Few-step distillation: trained, exported, used, and refused where something does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from brainsynth.bundle import BundleSpec
from brainsynth.config.distillation import StepDistillConfig
from brainsynth.config.schema import ExportConfig, SamplerConfig
from brainsynth.config.training import DiffusionTrainConfig
from brainsynth.executors import stages
from brainsynth.models.sampling import sample_rows
from brainsynth.models.schedule import NoiseSchedule
from brainsynth.models.weights import load_models, read_bundle
from brainsynth.training import step_distillation
from brainsynth.training.runs import HELD_OUT_FILE, StepDistillRun, read_run
from tests.line import Line, as_config

CPU = torch.device("cpu")
ONE_THREAD = {"workers": 0, "threads_per_worker": 1, "trackers": []}


class Made(NamedTuple):
    """A finished distillation and its teacher."""

    config: dict[str, Any]
    run: StepDistillRun
    teacher: Path
    bundle: Path
    spec: BundleSpec


def taught(line: Line, folder: Path, prediction: str, kind: str, **optimisation: Any) -> Path:
    """A teacher's bundle."""
    config = line.diffusion(str(folder / "diffusion"), prediction, kind, **optimisation) | {"runtime": ONE_THREAD}
    stages.train_diffusion(as_config(config, DiffusionTrainConfig, folder))
    bundle = line.bundle(str(folder / "diffusion"), str(folder / "teacher"))
    stages.make_bundle(as_config(bundle, ExportConfig, folder))
    return folder / "teacher"


@pytest.fixture(scope="module")
def made(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("few-steps")
    teacher = taught(line, folder, "flow", "unet", steps=100, learning_rate=4e-3, validate_every=100)
    config = line.step_distillation(
        str(folder / "run"), steps=100, batch_size=16, learning_rate=4e-3, validate_every=20, checkpoint_every=100
    )
    config |= {"bundle": str(teacher), "runtime": ONE_THREAD}
    config["trajectories"]["count"] = 48
    stages.distill_steps(as_config(config, StepDistillConfig, folder))
    run = read_run(folder / "run", StepDistillRun, "")
    return Made(config, run, teacher, folder / "run-bundle", read_bundle(folder / "run-bundle"))


def test_it_beats_its_teacher_at_as_many_evaluations(made: Made) -> None:
    teacher = read_bundle(made.teacher)
    _, denoiser = load_models(made.teacher, teacher, CPU)
    config = as_config(made.config, StepDistillConfig, made.teacher.parent)
    contexts = step_distillation.contexts(config, teacher, "validation", 18)
    seeds = step_distillation.row_seeds("validation", range(18), config.optimisation.seed)
    rows = (denoiser, contexts, seeds, teacher.latents.shape_cxyz, NoiseSchedule(teacher.schedule))
    with torch.no_grad():
        few = sample_rows(*rows, SamplerConfig(method="euler", steps=2, guidance_scale=1.5))
    reference = load_file(Path(made.config["output"]) / HELD_OUT_FILE)["reference"]
    error = float(((few - reference).pow(2).mean() / reference.pow(2).mean()).sqrt())
    print("teacher", error, made.spec.few_steps, made.run.metrics)
