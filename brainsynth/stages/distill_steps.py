"""Bundle → bundle whose denoiser needs few evaluations."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from safetensors.torch import load_file

from brainsynth.bundle.files import bundle_folder, read_bundle
from brainsynth.bundle.spec import DIFFUSION_FILE, BundleSpec, FewStepsSpec, StepFidelity
from brainsynth.config.distillation import StepDistillConfig
from brainsynth.evaluation.step_fidelity import measure_steps
from brainsynth.executors.ray_train import describe_training, train
from brainsynth.models.few_steps import reference_sampler, student_sampler, student_schedule
from brainsynth.stages.export_bundle import bundle_output, write_distilled
from brainsynth.storage.filesystem import local_folder
from brainsynth.training.runs import HELD_OUT_FILE, MEASURED, StepDistillRun, read_run
from brainsynth.training.step_distillation import TRAINING, describe_cost

log = logging.getLogger(__name__)


def run(config: StepDistillConfig) -> None:
    """Bundle → bundle whose denoiser needs few evaluations; harmless to repeat."""
    _output(config)
    train(TRAINING, config)
    spec = _export(config)
    assert spec.few_steps is not None
    student, hurried = spec.few_steps.student, spec.few_steps.teacher_in_as_few
    for name in MEASURED:
        fidelity: StepFidelity = getattr(spec.few_steps, name)
        error, distance = fidelity.latent_error, fidelity.frechet
        log.info(
            "%s, %d rows against the reference: latent error %.4f (%.4f to %.4f), Fréchet distance %.4f (%.4f to %.4f)",
            name.replace("_", " "),
            spec.few_steps.count,
            error.value,
            error.low,
            error.high,
            distance.value,
            distance.low,
            distance.high,
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
    """What distill-steps would do."""
    _output(config)
    TRAINING.check(config)
    return f"{describe_cost(config)}\n{describe_training(config)} → {config.bundle_output}"


def _output(config: StepDistillConfig) -> Path:
    """The folder of the new bundle. Raises UserError when it cannot go there."""
    teacher = read_bundle(bundle_folder(config.bundle)).digest
    return bundle_output(
        config, lambda there: there.few_steps is not None and there.few_steps.distilled_from == teacher
    )


def _export(config: StepDistillConfig) -> BundleSpec:
    """The bundle with the finished training's denoiser in place of its own."""
    source, trained = bundle_folder(config.bundle), local_folder(config.output, "output")
    old, run = read_bundle(source), read_run(trained, StepDistillRun, "distill-steps")
    wanted, held_out = config.trajectories, load_file(trained / HELD_OUT_FILE)
    few_steps = FewStepsSpec(
        distilled_from=run.bundle_digest,
        sampler=student_sampler(wanted.sampler, config.evaluations),
        teacher_sampler=wanted.sampler,
        reference_sampler=reference_sampler(wanted.sampler, wanted.reference_steps),
        count=len(held_out["reference"]),
        **{name: measure_steps(held_out[name], held_out["reference"]) for name in MEASURED},
    )
    spec = dataclasses.replace(
        old,
        schedule=student_schedule(old.schedule),
        few_steps=few_steps,
        weights={**old.weights, DIFFUSION_FILE: run.weights[DIFFUSION_FILE]},
        provenance={
            **old.provenance,
            "steps_distilled_from": run.bundle_digest,
            "steps_distilled_config": run.config_digest,
        },
    )
    return write_distilled(_output(config), spec, source, trained, DIFFUSION_FILE)
