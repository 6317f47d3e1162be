"""Few-step distillation: trained, exported, used, and refused where something does not fit."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from brainsynth import open_dataset
from brainsynth.bundle.files import read_bundle
from brainsynth.bundle.spec import DIFFUSION_FILE, BundleSpec
from brainsynth.config.distillation import DistillConfig, StepDistillConfig
from brainsynth.config.schema import ExportConfig, GenerateConfig
from brainsynth.config.training import DiffusionTrainConfig
from brainsynth.errors import UserError
from brainsynth.models.loading import load_models
from brainsynth.models.sampling import sample_rows
from brainsynth.models.schedule import NoiseSchedule
from brainsynth.records import from_dict, seal, to_dict
from brainsynth.stages import distill_decoder, distill_steps, export_bundle, generate, train_diffusion
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import open_store
from brainsynth.training.generated_latents import drawn_context, row_seeds
from brainsynth.training.preemption import Left, Request
from brainsynth.training.runner import fit
from brainsynth.training.runs import HELD_OUT_FILE, StepDistillRun, read_run
from brainsynth.training.step_distillation import TRAINING
from tests.integration.test_regenerate import brainsynth
from tests.line import Line, as_config

CPU = torch.device("cpu")
ONE_THREAD = {"workers": 0, "threads_per_worker": 1, "trackers": []}
STUDENT = {"method": "euler", "steps": 2}


class Made(NamedTuple):
    """A finished distillation and its teacher."""

    config: dict[str, Any]
    run: StepDistillRun
    teacher: BundleSpec
    bundle: Path
    spec: BundleSpec


def taught(line: Line, folder: Path, prediction: str, kind: str, **optimisation: Any) -> Path:
    """A teacher's bundle."""
    config = line.diffusion(str(folder / "diffusion"), prediction, kind, **optimisation)
    train_diffusion.run(as_config(config | {"runtime": ONE_THREAD}, DiffusionTrainConfig, folder))
    bundle = line.bundle(str(folder / "diffusion"), str(folder / "teacher"))
    export_bundle.run(as_config(bundle, ExportConfig, folder))
    return folder / "teacher"


@pytest.fixture(scope="module")
def made(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("few-steps")
    # The Gaussian teacher has curved trajectories, and obeys its covariates, before it is trained.
    teacher = taught(line, folder, "flow", "gaussian", steps=2, validate_every=2)
    options = {"steps": 30, "batch_size": 16, "learning_rate": 2e-3, "validate_every": 10, "checkpoint_every": 30}
    config = line.step_distillation(str(folder / "run"), **options) | {"bundle": str(teacher)}
    config["trajectories"]["count"] = 48
    config["trajectories"]["sampler"]["guidance_scale"] = 4.0
    distill_steps.run(as_config(config, StepDistillConfig, folder))
    run, bundle = read_run(folder / "run", StepDistillRun, ""), folder / "run-bundle"
    return Made(config, run, read_bundle(teacher), bundle, read_bundle(bundle))


def test_the_student_is_nearer_than_its_teacher_in_as_few_steps(made: Made) -> None:
    measured = made.spec.few_steps
    assert measured is not None
    assert measured.student.latent_error.value < measured.teacher_in_as_few.latent_error.value
    rows = [json.loads(text) for text in (Path(made.config["output"]) / "metrics.jsonl").read_text().splitlines()]
    errors = [row["validation/student_error"] for row in rows if "validation/student_error" in row]
    assert len(errors) == 3
    assert errors[-1] < errors[0]
    assert errors[-1] == pytest.approx(measured.student.latent_error.value, rel=1e-3)


def test_the_bundles_denoiser_makes_the_latents_that_were_measured(made: Made) -> None:
    """From the bundle alone, with rows, noises and sampler as its record and the config name them."""
    _, student = load_models(made.bundle, made.spec, CPU)
    seed, few_steps = 0, made.spec.few_steps
    assert few_steps is not None
    assert as_config(made.config, StepDistillConfig, made.bundle.parent).optimisation.seed == seed
    context = drawn_context(made.spec, "validation", few_steps.count, seed)
    seeds, shape = row_seeds("validation", range(few_steps.count), seed), made.spec.latents.shape_cxyz
    with torch.no_grad():
        z = sample_rows(student, context, seeds, shape, NoiseSchedule(made.spec.schedule), few_steps.sampler)
    kept = load_file(Path(made.config["output"]) / HELD_OUT_FILE)
    torch.testing.assert_close(z, kept["student"], rtol=0, atol=2e-5)
    assert (kept["student"] - kept["teacher"]).abs().max() > 5e-4


def test_the_bundle_records_its_teacher_and_is_written_once(made: Made) -> None:
    old, new, few_steps = made.teacher, made.spec, made.spec.few_steps
    assert few_steps is not None
    assert (few_steps.distilled_from, few_steps.count) == (old.digest, 18)
    assert (to_dict(few_steps.sampler)["steps"], few_steps.teacher_sampler.guidance_scale) == (2, 4.0)
    assert few_steps.reference_sampler.steps == 12
    assert new.weights == old.weights | {DIFFUSION_FILE: made.run.weights[DIFFUSION_FILE]}
    assert new.weights[DIFFUSION_FILE] != old.weights[DIFFUSION_FILE]
    assert "few_steps" not in to_dict(old)  # a bundle without one keeps its digest
    before = {path.name: path.stat().st_mtime_ns for path in made.bundle.iterdir()}
    distill_steps.run(as_config(made.config, StepDistillConfig, made.bundle.parent))
    assert {path.name: path.stat().st_mtime_ns for path in made.bundle.iterdir()} == before


@pytest.mark.parametrize("gone", ["student", "teacher", "teacher_in_as_few", "sampler", "count"])
def test_a_bundle_without_the_measured_loss_is_refused(made: Made, gone: str) -> None:
    plain = to_dict(made.spec)
    del plain["few_steps"][gone]
    with pytest.raises(UserError, match=f"few_steps.{gone}: "):
        from_dict(BundleSpec, plain, "the bundle")


def test_a_record_that_says_too_little_is_refused(made: Made) -> None:
    assert made.spec.few_steps is not None
    with pytest.raises(ValueError, match="needs its record under few_steps"):
        dataclasses.replace(made.spec, few_steps=None)
    with pytest.raises(ValueError, match="at least 17 rows"):
        dataclasses.replace(made.spec.few_steps, count=16)
    guided = dataclasses.replace(made.spec.few_steps.sampler, guidance_scale=2.0)
    with pytest.raises(ValueError, match="guidance folded in"):
        dataclasses.replace(made.spec.few_steps, sampler=guided)
    figure = made.spec.few_steps.student.frechet
    with pytest.raises(ValueError, match="low <= high"):
        dataclasses.replace(figure, low=figure.high + 1)


def test_generation_with_it_is_another_dataset_and_can_be_made_again(line: Line, made: Made, tmp_path: Path) -> None:
    config = line.generate(tmp_path / "student", bundle=str(made.bundle), sampler=STUDENT, covariates={"draw": 3})
    generate.run(as_config(config, GenerateConfig, tmp_path))
    plan = read_plan(open_store(str(tmp_path / "student")))
    assert plan.identity["bundle"] == made.spec.digest != made.teacher.digest
    assert plan.identity["sampler"] == {"guidance_scale": 1.0, **STUDENT}
    done = brainsynth("regenerate", tmp_path / "student", "--bundle", made.bundle, "--random", "3")
    assert "3 of 3 rows have the voxels that their records name" in done.stdout, done.stdout + done.stderr
    teachers = {"method": "ab2", "steps": 4, "guidance_scale": 4.0}
    other = config | {"bundle": made.config["bundle"], "sampler": teachers}
    with pytest.raises(UserError, match="identity.bundle: the folder has"):
        generate.run(as_config(other, GenerateConfig, tmp_path))


@pytest.mark.parametrize(
    "sampler",
    [
        {"method": "euler", "steps": 1},
        {"method": "euler", "steps": 2, "guidance_scale": 1.5},
        {"method": "ab2", "steps": 8},
        {"method": "euler", "steps": 2, "time_shift": 2.0},
    ],
)
def test_it_runs_with_its_own_sampler_only(line: Line, made: Made, tmp_path: Path, sampler: dict[str, Any]) -> None:
    told = (
        "sampler: the denoiser of the bundle tiny was distilled for 2 evaluations, with guidance 4 folded in; "
        "give {method: euler, steps: 2} and nothing else"
    )
    config = line.generate(tmp_path / "data", bundle=str(made.bundle), sampler=sampler)
    with pytest.raises(UserError, match=re.escape(told)):
        generate.run(as_config(config, GenerateConfig, tmp_path))
    assert not (tmp_path / "data").exists()
    decoder = line.distillation(str(tmp_path / "run")) | {"bundle": str(made.bundle)}
    decoder["generated"]["sampler"] = sampler
    with pytest.raises(UserError, match=re.escape(told)):
        distill_decoder.run(as_config(decoder, DistillConfig, tmp_path))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"bundle": "/nowhere"}, "is not a bundle"),
        ({"bundle": "TRAINING"}, "is not a bundle"),
        ({"latents": "/nowhere"}, "is not a brainsynth dataset"),
        ({"latents": "COHORT"}, "are not latents of scans with the covariates of the bundle"),
        ({"evaluations": 3}, "evaluations: "),
        (
            {"trajectories": {"sampler": {"method": "ddim", "steps": 8}, "count": 2}},
            "trajectories.sampler.method 'ddim'",
        ),
        (
            {"trajectories": {"sampler": {"method": "ab2", "steps": 5}, "count": 2}},
            "trajectories.sampler.steps 5 must be",
        ),
        (
            {"trajectories": {"sampler": {"method": "ab2", "steps": 2}, "count": 2}},
            "trajectories.sampler.steps 2 is too",
        ),
        (
            {"trajectories": {"sampler": {"method": "ab2", "steps": 4}, "count": 2, "reference_steps": 1001}},
            "trajectories.reference_steps 1001 is more than the 1000",
        ),
        (
            {"trajectories": {"sampler": {"method": "ab2", "steps": 4}, "count": 2, "reference_steps": 7}},
            "reference_steps must be at least twice sampler.steps",
        ),
        (
            {"trajectories": {"sampler": {"method": "ab2", "steps": 4}, "count": 2, "validation_count": 16}},
            "validation_count of at least 17",
        ),
        ({"bundle_output": "BUNDLE"}, "is also bundle or output"),
        ({"bundle_output": "COHORT"}, "is not empty and is not a bundle"),
        ({"bundle_output": "ANOTHER"}, "holds another bundle"),
    ],
)
def test_mistakes_are_told_before_it_starts(
    line: Line, made: Made, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    places = {name.upper(): str(line.root / name) for name in ("bundle", "cohort")}
    places |= {"TRAINING": str(line.root / "diffusion"), "ANOTHER": str(made.bundle)}
    config = line.step_distillation(str(tmp_path / "run"))
    config |= {key: places.get(value, value) if isinstance(value, str) else value for key, value in change.items()}
    with pytest.raises(UserError, match=re.escape(told)):
        distill_steps.run(as_config(config, StepDistillConfig, tmp_path))
    assert not (tmp_path / "run").exists()


def test_a_student_that_was_not_worth_it_is_told(line: Line, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = line.step_distillation(str(tmp_path / "run"), steps=1)
    config["trajectories"]["sampler"]["guidance_scale"] = 4.0
    distill_steps.run(as_config(config, StepDistillConfig, tmp_path))
    assert "the student is not nearer in both than its teacher in as few steps" in caplog.text


def test_a_student_is_no_teacher(line: Line, made: Made, tmp_path: Path) -> None:
    config = line.step_distillation(str(tmp_path / "run")) | {"bundle": str(made.bundle)}
    with pytest.raises(UserError, match=f"is itself distilled, for 2 evaluations.*{made.teacher.digest[:12]}"):
        distill_steps.run(as_config(config, StepDistillConfig, tmp_path))
    taken = made.config | {"output": str(tmp_path / "run"), "optimisation": made.config["optimisation"] | {"steps": 1}}
    with pytest.raises(UserError, match="holds another distilled denoiser"):
        distill_steps.run(as_config(taken, StepDistillConfig, tmp_path))


def test_without_a_distribution_it_needs_latents_of_scans(line: Line, made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.config["bundle"], tmp_path / "bundle")
    spec = dataclasses.replace(read_bundle(tmp_path / "bundle"), distribution=None)
    (tmp_path / "bundle" / "bundle.json").write_bytes(seal(spec))
    config = line.step_distillation(str(tmp_path / "run"), steps=1) | {"bundle": str(tmp_path / "bundle")}
    with pytest.raises(UserError, match="no covariate distribution from which to draw rows; name latents of scans"):
        distill_steps.run(as_config(config, StepDistillConfig, tmp_path))
    config |= {"latents": str(line.root / "latents")}
    distill_steps.run(as_config(config, StepDistillConfig, tmp_path))
    assert read_bundle(tmp_path / "run-bundle").few_steps is not None


@pytest.mark.parametrize(
    ("prediction", "kind", "sampler"),
    [
        ("epsilon", "unet", {"method": "unipc", "steps": 6}),
        pytest.param("v", "transformer", {"method": "ddim", "steps": 4}, marks=pytest.mark.slow),
        pytest.param("flow", "unet", {"method": "heun", "steps": 4, "time_shift": 2.0}, marks=pytest.mark.slow),
    ],
)
def test_every_prediction_teaches(
    line: Line, tmp_path: Path, prediction: str, kind: str, sampler: dict[str, Any]
) -> None:
    teacher = taught(line, tmp_path, prediction, kind, steps=2, checkpoint_every=2)
    config = line.step_distillation(str(tmp_path / "run"), steps=2) | {"bundle": str(teacher)}
    config["trajectories"]["sampler"] = sampler
    distill_steps.run(as_config(config, StepDistillConfig, tmp_path))
    spec = read_bundle(tmp_path / "run-bundle")
    student = STUDENT | {"time_shift": 2.0} if prediction == "flow" else {"method": "ddim", "steps": 2}
    assert spec.schedule.prediction == ("v" if prediction == "epsilon" else prediction)
    config = line.generate(tmp_path / "data", bundle=str(tmp_path / "run-bundle"), sampler=student)
    generate.run(as_config(config | {"covariates": {"draw": 3}}, GenerateConfig, tmp_path))
    assert open_dataset(str(tmp_path / "data")).volumes().std() > 0


def test_asked_to_leave_it_leaves_and_goes_on_to_the_same_student(line: Line, made: Made, tmp_path: Path) -> None:
    students = []
    for leaves in (False, True):
        folder = tmp_path / f"run-{leaves}"
        wanted = line.step_distillation(str(folder), steps=3) | {"bundle": made.config["bundle"]}
        config = as_config(wanted, StepDistillConfig, tmp_path)
        if leaves:
            between_files = iter([Request.NOTHING, Request.LEAVE])
            with pytest.raises(Left):
                fit(TRAINING, config, preempted=lambda: next(between_files))  # noqa: B023
            assert [file.name for file in folder.glob("trajectories-*/*")] == ["train-000000.safetensors"]
            # Five files' worth of asking, then one step.
            between_steps = iter([Request.NOTHING] * 6 + [Request.LEAVE])
            with pytest.raises(Left, match="after step 1"):
                fit(TRAINING, config, preempted=lambda: next(between_steps))  # noqa: B023
        fit(TRAINING, config)
        students.append(load_file(folder / DIFFUSION_FILE))
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])
