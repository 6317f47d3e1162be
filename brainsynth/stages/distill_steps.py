"""Bundle → bundle whose denoiser needs few evaluations."""

from __future__ import annotations

import logging

from brainsynth.bundle.spec import StepFidelity
from brainsynth.config.distillation import StepDistillConfig
from brainsynth.evaluation.step_fidelity import measure_steps
from brainsynth.executors.ray_train import describe_training, train
from brainsynth.stages.bundle import export_steps
from brainsynth.training import step_distillation
from brainsynth.training.runs import MEASURED

log = logging.getLogger(__name__)


def run(config: StepDistillConfig) -> None:
    """Bundle → bundle whose denoiser needs few evaluations."""
    train("steps", config)
    spec = export_steps(config, measure_steps)
    assert spec.few_steps is not None
    student, hurried = spec.few_steps.student, spec.few_steps.teacher_in_as_few
    for name in MEASURED:
        found: StepFidelity = getattr(spec.few_steps, name)
        error, distance = found.latent_error, found.frechet
        log.info(
            "%s, %d rows against the reference: latent error %.4f (%.4f to %.4f), Fréchet distance %.4f (%.4f to %.4f)",
            *(name.replace("_", " "), spec.few_steps.count, error.value, error.low, error.high),
            *(distance.value, distance.low, distance.high),
        )
    if student.latent_error.value >= hurried.latent_error.value or student.frechet.value >= hurried.frechet.value:
        log.warning(
            "the student is not nearer in both than its teacher in as few steps: train longer, or on more trajectories"
        )
    log.info(
        "bundle with a denoiser of %d evaluations: %s (digest %s)",
        config.evaluations,
        config.bundle_output,
        spec.digest[:12],
    )


def describe(config: StepDistillConfig) -> str:
    """What distill_steps would do."""
    step_distillation.check(config)
    return f"{step_distillation.describe_cost(config)}\n{describe_training(config)} → {config.bundle_output}"
