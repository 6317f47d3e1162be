"""What a few-step student learns: the algebra of its targets, against exact networks and the samplers themselves."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from brainsynth.config.architectures import GaussianArchitecture
from brainsynth.config.schema import SamplerConfig
from brainsynth.config.training import ScheduleConfig
from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.errors import UserError
from brainsynth.models.diffusion import Denoiser
from brainsynth.models.few_steps import (
    check_teacher,
    fold_guidance,
    network_times,
    reference_sampler,
    step_targets,
    student_sampler,
    student_schedule,
    teacher_states,
)
from brainsynth.models.sampler_rules import check_sampler
from brainsynth.models.sampling import sample_latents, sample_rows
from brainsynth.models.schedule import NoiseSchedule
from tests.models.analytic import network

SEEDS, SHAPE, CONTEXT = [1, 2, 3], (2, 4, 4, 4), torch.ones(3, 2)
TEACHERS = [
    ("flow", "ab2", 12, 1.0),
    ("flow", "heun", 8, 1.0),
    ("flow", "euler", 8, 2.0),
    ("v", "unipc", 12, 1.0),
    ("v", "ddim", 40, 1.0),
    ("epsilon", "dpmpp_2m", 12, 1.0),
]


def teacher(prediction: str, method: str, steps: int, shift: float, **more: float):
    config = ScheduleConfig(prediction=prediction)
    exact = network(NoiseSchedule(config))

    def denoiser(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return exact(x, float(t[0])) + 0.05 * context.sum(1).view(-1, 1, 1, 1, 1)

    return NoiseSchedule(config), denoiser, SamplerConfig(method=method, steps=steps, time_shift=shift, **more)


@pytest.mark.parametrize("evaluations", [1, 2, 4])
@pytest.mark.parametrize(("prediction", "method", "steps", "shift"), TEACHERS)
def test_a_student_that_predicts_its_targets_walks_the_teachers_trajectory(
    prediction: str, method: str, steps: int, shift: float, evaluations: int
) -> None:
    schedule, denoiser, sampler = teacher(prediction, method, steps, shift)
    check_teacher(schedule.config, sampler, evaluations, guidable=True)
    states = teacher_states(denoiser, CONTEXT, SEEDS, SHAPE, schedule, sampler, evaluations)
    end = sample_rows(denoiser, CONTEXT, SEEDS, SHAPE, schedule, sampler)
    # Solvers on the log-SNR grid have a timestep or two moved to where the student needs one.
    torch.testing.assert_close(states[:, -1], end, rtol=0, atol=0.02 if method in ("unipc", "dpmpp_2m") else 1e-5)
    config, light = student_schedule(schedule.config), student_sampler(sampler, evaluations)
    check_sampler(config, light)
    assert (light.steps, light.guidance_scale) == (evaluations, 1.0)
    times, seen = network_times(NoiseSchedule(config), light), []

    def student(x: Tensor, t: float) -> Tensor:
        step = int((torch.tensor(times) - t).abs().argmin())
        assert times[step] == pytest.approx(t, abs=1e-6)
        at, target, _ = step_targets(states, torch.full((3,), step), config, light)
        torch.testing.assert_close(x, at, rtol=1e-5, atol=1e-5)
        seen.append(step)
        return target

    made = sample_latents(student, states[:, 0], NoiseSchedule(config), light)
    assert seen == list(range(evaluations))
    torch.testing.assert_close(made, states[:, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("prediction", "method", "steps", "shift"), TEACHERS)
def test_an_error_of_the_prediction_is_its_length_times_an_error_of_the_state(
    prediction: str, method: str, steps: int, shift: float
) -> None:
    schedule, denoiser, sampler = teacher(prediction, method, steps, shift)
    states = teacher_states(denoiser, CONTEXT, SEEDS, SHAPE, schedule, sampler, 2)
    config, light = student_schedule(schedule.config), student_sampler(sampler, 2)
    _, first, length = step_targets(states, torch.zeros(3, dtype=torch.long), config, light)
    moved, calls = [], []

    def student(x: Tensor, t: float) -> Tensor:
        calls.append(x)
        return first + (0.1 if moved else 0.0)

    for _ in range(2):
        calls.clear()
        sample_latents(student, states[:, 0], NoiseSchedule(config), light)
        moved.append(calls[1])
    expected = -0.1 * length.view(-1, 1, 1, 1, 1).expand_as(moved[0])
    torch.testing.assert_close(moved[1] - moved[0], expected, rtol=1e-3, atol=1e-5)


def test_guidance_is_in_the_trajectory() -> None:
    schedule, denoiser, plain = teacher("flow", "ab2", 8, 1.0)
    _, _, guided = teacher("flow", "ab2", 8, 1.0, guidance_scale=3.0)
    ends = [teacher_states(denoiser, CONTEXT, SEEDS, SHAPE, schedule, sampler, 2)[:, -1] for sampler in (plain, guided)]
    torch.testing.assert_close(ends[1], sample_rows(denoiser, CONTEXT, SEEDS, SHAPE, schedule, guided))
    assert (ends[1] - ends[0]).abs().max() > 0.05


@pytest.mark.parametrize("crossed", ["", "sex"])
def test_guidance_of_a_gaussian_denoiser_is_folded_in_without_training(crossed: str) -> None:
    torch.manual_seed(0)
    architecture = GaussianArchitecture(
        kind="gaussian", rank=3, rank_channels=1, channels=(4,), embedding=8, norm_groups=2, crossed=crossed
    )
    sex = Covariate(name="sex", kind="binary", categories=("F", "M"))
    age = Covariate(name="age", kind="continuous", low=0.0, high=1.0)
    schema = CovariateSchema(covariates=(sex, age), missing="refuse")
    denoiser = Denoiser(architecture, SHAPE[0], 2, SHAPE[1:], schema)
    for buffer in denoiser.gaussian.latents.buffers():
        buffer.copy_(0.2 + torch.rand(buffer.shape))
    x, t, context = torch.randn(3, *SHAPE), torch.tensor([999.0, 400.0, 10.0]), torch.rand(3, 2)
    with torch.no_grad():
        known, null = denoiser(x, t, context), denoiser(x, t, torch.zeros(3, 2))
        fold_guidance(denoiser, 3.0)
        torch.testing.assert_close(denoiser(x, t, context), null + 3.0 * (known - null), rtol=1e-4, atol=1e-3)
    assert (known - null).abs().max() > 0.1


def test_a_student_of_an_epsilon_teacher_predicts_v() -> None:
    assert student_schedule(ScheduleConfig(prediction="epsilon")) == ScheduleConfig(prediction="v")
    for prediction in ("v", "flow"):
        assert student_schedule(ScheduleConfig(prediction=prediction)) == ScheduleConfig(prediction=prediction)


def test_the_reference_goes_further_than_the_teacher() -> None:
    found = reference_sampler(SamplerConfig(method="unipc", steps=8, guidance_scale=2.0), 100)
    assert found == SamplerConfig(method="unipc", steps=100, guidance_scale=2.0, last_log_snr=10.0)
    assert reference_sampler(SamplerConfig(method="ab2", steps=8), 50) == SamplerConfig(method="ab2", steps=50)


@pytest.mark.parametrize(
    ("prediction", "sampler", "evaluations", "told"),
    [
        ("v", {"method": "ddpm", "steps": 50}, 2, "'ddpm' adds noise: a student needs a deterministic teacher"),
        ("v", {"method": "ddim", "steps": 50, "eta": 0.5}, 2, "adds noise"),
        ("flow", {"method": "ab2", "steps": 4}, 4, "steps 4 is too few for a student of 4 evaluations"),
        ("flow", {"method": "ab2", "steps": 9}, 2, "steps 9 must be a multiple of the student's 2 evaluations"),
        ("flow", {"method": "unipc", "steps": 8}, 2, "does not fit a network that predicts 'flow'"),
        ("flow", {"method": "ab2", "steps": 8, "guidance_scale": 2.0}, 2, "guidance_scale must be 1"),
        ("v", {"method": "unipc", "steps": 8, "first_timestep": 980}, 2, "first_timestep must be left out"),
        ("v", {"method": "unipc", "steps": 8, "last_log_snr": -2.0}, 4, "leave no room for the student's timesteps"),
    ],
)
def test_teachers_that_cannot_teach_are_refused(
    prediction: str, sampler: dict[str, float], evaluations: int, told: str
) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        check_teacher(ScheduleConfig(prediction=prediction), SamplerConfig(**sampler), evaluations, guidable=False)
