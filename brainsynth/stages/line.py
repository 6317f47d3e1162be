"""The stages of the line, one function a job; each can be run again and goes on where it ended."""

from __future__ import annotations

import logging
from pathlib import Path

from brainsynth.bundle.spec import StepFidelity
from brainsynth.cohort.phantom import phantom_grid
from brainsynth.cohort.phantom_cohort import write_phantom_cohort
from brainsynth.cohort.prepare import plan_cohort
from brainsynth.config.distillation import DistillConfig, StepDistillConfig
from brainsynth.config.schema import (
    EncodeConfig,
    ExportConfig,
    GenerateConfig,
    PhantomConfig,
    PrepareConfig,
)
from brainsynth.config.training import AutoencoderTrainConfig, DiffusionTrainConfig
from brainsynth.evaluation.dataset_report import check_ruler, report_dataset
from brainsynth.evaluation.step_fidelity import measure_steps
from brainsynth.executors.dataset import dry_run, make_dataset
from brainsynth.executors.ray_train import train
from brainsynth.gate.fit import reference_rows, write_gate
from brainsynth.generate import estimate_s, plan_generation, write_model_record
from brainsynth.stages.bundle import export_bundle, export_distilled, export_steps, plan_bundle
from brainsynth.storage.filesystem import local_folder
from brainsynth.training import autoencoder, diffusion, distillation, step_distillation
from brainsynth.training.latents import measure_latents, plan_latents
from brainsynth.training.runs import MEASURED

log = logging.getLogger(__name__)


def make_phantoms(config: PhantomConfig) -> None:
    """Procedural scans and their covariates, as a BIDS folder."""
    volume = phantom_grid(config.spacing_mm, config.shape_xyz)
    folder = local_folder(config.output, "output")

    def progress(done: int, total: int) -> None:
        if done % max(1, total // 4) == 0 or done == total:
            log.info("%d/%d phantoms", done, total)

    write_phantom_cohort(folder, config.num_subjects, config.seed, volume, progress, config.workers)
    log.info("phantom cohort: %s", folder)


def describe_phantoms(config: PhantomConfig) -> str:
    """What make_phantoms would write."""
    return f"{config.num_subjects} phantoms of {config.shape_xyz} at {config.spacing_mm} mm → {config.output}"


def prepare_cohort(config: PrepareConfig) -> None:
    """Scans → prepared cohort."""
    manifest = make_dataset(plan_cohort(config), config.runtime)
    if manifest.num_rejected:
        log.info("rejected scans, each with its reason: %s/rejects.tsv", config.output)


def describe_prepare(config: PrepareConfig) -> str:
    """What prepare_cohort would make."""
    return dry_run(plan_cohort(config), config.runtime)


def train_autoencoder(config: AutoencoderTrainConfig) -> None:
    """Prepared cohort → autoencoder."""
    train("autoencoder", config)


def describe_autoencoder(config: AutoencoderTrainConfig) -> str:
    """What train_autoencoder would do."""
    autoencoder.check(config)
    return _describe_training(config)


def encode_latents(config: EncodeConfig) -> None:
    """Prepared cohort + autoencoder → latents, their shift and scale."""
    work = plan_latents(config)
    make_dataset(work, config.runtime)
    spec = measure_latents(work.root, config.whitening)
    log.info("latents %s: shift %s, scale %s", spec.shape_cxyz, _numbers(spec.shift), _numbers(spec.scale))


def describe_encode(config: EncodeConfig) -> str:
    """What encode_latents would make."""
    return dry_run(plan_latents(config), config.runtime)


def train_diffusion(config: DiffusionTrainConfig) -> None:
    """Latents → denoiser."""
    train("diffusion", config)


def describe_diffusion(config: DiffusionTrainConfig) -> str:
    """What train_diffusion would do."""
    diffusion.check(config)
    return _describe_training(config)


def distill_decoder(config: DistillConfig) -> None:
    """Bundle → the same bundle with a distilled decoder beside its own."""
    train("decoder", config)
    spec = export_distilled(config)
    assert spec.distilled is not None
    for name, found in (("generated", spec.distilled.on_generated), ("encoded", spec.distilled.on_encoded)):
        if found is not None:
            log.info(
                "to the own decoder's images of %d %s latents: PSNR %.2f dB, SSIM %.4f, L1 %.4f, sharpness %.3f",
                *(found.count, name, found.psnr_db, found.ssim, found.l1, found.sharpness_ratio),
            )
    log.info("bundle with a distilled decoder: %s (digest %s)", config.bundle_output, spec.digest[:12])


def describe_distillation(config: DistillConfig) -> str:
    """What distill_decoder would do."""
    bundle = distillation.check(config)
    return f"{distillation.describe_cost(config, bundle)}\n{_describe_training(config)} → {config.bundle_output}"


def distill_steps(config: StepDistillConfig) -> None:
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


def describe_step_distillation(config: StepDistillConfig) -> str:
    """What distill_steps would do."""
    step_distillation.check(config)
    return f"{step_distillation.describe_cost(config)}\n{_describe_training(config)} → {config.bundle_output}"


def _describe_training(
    config: AutoencoderTrainConfig | DiffusionTrainConfig | DistillConfig | StepDistillConfig,
) -> str:
    options, runtime = config.optimisation, config.runtime
    return (
        f"{options.steps} steps of batch {options.batch_size} in {options.precision} on {runtime.workers} workers"
        f"{' with a GPU each' if runtime.use_gpu else ''} → {config.output}"
    )


def make_bundle(config: ExportConfig) -> None:
    """Trained runs → bundle."""
    describe_bundle(config)  # everything that can be refused
    spec = export_bundle(config, write_gate)
    log.info("bundle %s: %s (digest %s)", spec.name, config.output, spec.digest[:12])


def describe_bundle(config: ExportConfig) -> str:
    """What make_bundle would write."""
    _, folder, spec = plan_bundle(config)
    gate = ""
    if config.gate is not None:
        gate = f" and a quality gate fitted on {len(reference_rows(config.gate, spec)[1])} people's {config.gate.reference}"
    return f"bundle {spec.name} (digest {spec.digest[:12]}), {len(spec.weights)} weight files{gate} → {folder}"


def generate(config: GenerateConfig) -> Path | None:
    """Bundle + covariates → dataset and its report: what `jobs/generate.py` does. The same call again resumes.

    With `runtime.workers: 0` it runs in this process, else on Ray: in the session that is there, on the cluster that
    RAY_ADDRESS names, or in a private session.

    Returns:
        The path of report.html (None on an object store); the dataset is at `config.output`.

    Raises:
        UserError: a mistake in the config or its inputs, another plan at `config.output`, or a layout that cannot run.
    """
    work = plan_generation(config)
    check_ruler(config.ruler, work.plan)
    make_dataset(work, config.runtime)
    write_model_record(work, config.bundle)
    return report_dataset(work.root, config.ruler, config.bundle)


def describe_generate(config: GenerateConfig) -> str:
    """What generate would make, and about how long it takes."""
    work = plan_generation(config)
    check_ruler(config.ruler, work.plan)
    seconds = estimate_s(work, config.runtime.workers)
    return f"{dry_run(work, config.runtime)}\nabout {seconds / 60:.1f} min of generation, by one micro-batch timed here"


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:.3g}" for value in values) + ")"
