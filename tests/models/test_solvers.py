"""Solvers against closed forms: order of convergence, mean and covariance of what comes out, and pure noise at the start."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from brainsynth.config.schema import SamplerConfig
from brainsynth.config.training import ScheduleConfig
from brainsynth.models.sampling import draw_noise, sample_latents
from brainsynth.models.schedule import NoiseSchedule, flow_times, log_snr_timesteps, timesteps
from brainsynth.models.solvers import ddim, dpmpp_2m, flow, heun
from tests.models.analytic import CENTRES, MEAN, SPREADS, WEIGHTS, gaussian_end, gaussian_x0, mixture_x0, network

PUBLISHED = ScheduleConfig(prediction="epsilon")
unipc = functools.partial(dpmpp_2m, corrected=True)


def fine(prediction: str, zero_terminal_snr: bool = False) -> NoiseSchedule:
    """The published schedule on 100,000 timesteps, so that rounding to timesteps does not hide a solver's order."""
    return NoiseSchedule(
        ScheduleConfig(
            prediction=prediction,  # type: ignore[arg-type]
            num_train_timesteps=100_000,
            beta_start=0.0015 / 100,
            beta_end=0.0205 / 100,
            zero_terminal_snr=zero_terminal_snr,
        )
    )


SPREAD = torch.tensor([0.1, 0.3, 0.5, 1.0, 2.0], dtype=torch.float64).view(-1, 1)
"""Of the data, row by row: for one spread alone an error may cross zero at some number of steps."""
of_all_spreads = functools.partial(gaussian_x0, std=SPREAD)


def starts() -> torch.Tensor:
    """(5, 41) float64 states to start from."""
    return torch.linspace(-2.5, 2.5, 41, dtype=torch.float64).expand(len(SPREAD), -1)


def points(count: int, step: int) -> torch.Tensor:
    """(count, 2) noise of a step, in few streams for speed."""
    return draw_noise(range(4), (count // 4, 2), step).view(count, 2)


def order(errors: Sequence[float], steps: Sequence[int]) -> float:
    """Slope of log error against log steps."""
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


@pytest.mark.parametrize(("solver", "expected"), [(ddim, 1), (dpmpp_2m, 2), (unipc, 2)])
@pytest.mark.parametrize(("prediction", "zero"), [("epsilon", False), ("v", False), ("v", True)])
def test_the_error_falls_with_the_expected_order(solver: Callable, expected: int, prediction: str, zero: bool) -> None:
    schedule = fine(prediction, zero)
    steps, errors = (40, 80, 160, 320), []
    for count in steps:
        grid = log_snr_timesteps(schedule, count)
        found = solver(network(schedule, of_all_spreads), starts(), schedule, grid)
        errors.append(float((found - gaussian_end(schedule, starts(), grid[-1], std=SPREAD)).pow(2).mean().sqrt()))
    assert order(errors, steps) == pytest.approx(expected, abs=0.25), errors


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("name", "expected"), [("euler", 1), ("ab2", 2), ("heun", 2)])
def test_flow_solvers_have_the_expected_order(name: str, expected: int, shift: float) -> None:
    schedule = NoiseSchedule(ScheduleConfig(prediction="flow"))
    predict, steps, errors = network(schedule, of_all_spreads), (40, 80, 160, 320), []
    for count in steps:
        times = flow_times(count, shift)
        if name == "heun":
            found = heun(predict, starts(), schedule, times)
        else:
            found = flow(predict, starts(), schedule, times, second_order=name == "ab2")
        errors.append(float((found - (MEAN + SPREAD * starts())).pow(2).mean().sqrt()))
    assert order(errors, steps) == pytest.approx(expected, abs=0.25), errors


def test_solvers_agree_with_each_other_where_all_have_converged() -> None:
    schedule = NoiseSchedule(PUBLISHED)
    x = points(64, 0).double()
    predict = network(schedule, mixture_x0)
    truth = ddim(predict, x, schedule, timesteps(1000, 1000))
    for solver, tolerance in ((dpmpp_2m, 0.02), (unipc, 0.02)):
        found = solver(predict, x, schedule, log_snr_timesteps(schedule, 300, 10.0))
        assert float((found - truth).pow(2).mean().sqrt()) < tolerance


@pytest.mark.parametrize(
    ("prediction", "method", "steps", "options"),
    [
        ("epsilon", "ddim", 250, {}),
        ("epsilon", "ddim", 250, {"eta": 0.5}),
        ("epsilon", "ddpm", 500, {}),
        ("epsilon", "dpmpp_2m", 40, {"last_log_snr": 3.2}),
        ("v", "unipc", 40, {"last_log_snr": 3.2}),
        ("v zero", "unipc", 40, {"last_log_snr": 3.2}),
        ("v zero", "ddpm", 500, {}),
        ("flow", "euler", 250, {}),
        ("flow", "heun", 40, {"time_shift": 0.5}),
        ("flow", "ab2", 40, {}),
    ],
)
def test_a_mixture_comes_out_as_it_is(prediction: str, method: str, steps: int, options: dict[str, float]) -> None:
    name, *zero = prediction.split()
    schedule = NoiseSchedule(ScheduleConfig(prediction=name, zero_terminal_snr=bool(zero)))
    count = 4000
    draw = functools.partial(points, count)
    sampler = SamplerConfig(method=method, steps=steps, **options)
    stochastic = method == "ddpm" or "eta" in options
    step_noise = draw if stochastic else lambda step: pytest.fail("a deterministic sampler asked for noise")
    found = sample_latents(network(schedule, mixture_x0), draw(0), schedule, sampler, step_noise).double()
    mean = WEIGHTS @ CENTRES
    off = CENTRES - mean
    covariance = (WEIGHTS[:, None, None] * (SPREADS + off[:, :, None] * off[:, None, :])).sum(0)
    # Four standard errors of 4000 draws, and 2 % that the discretisation may cost.
    assert torch.allclose(found.mean(0), mean, atol=4 * float(covariance.max() / count) ** 0.5 + 0.02)
    assert torch.allclose(torch.cov(found.T), covariance, atol=0.02 + 0.07 * float(covariance.max()))
    nearest = torch.cdist(found, CENTRES).argmin(1)
    truth = [0.5, 0.3, 0.2]
    assert [float((nearest == k).double().mean()) for k in range(3)] == pytest.approx(truth, abs=0.04)


def test_few_steps_shrink_ddpm_as_measured_elsewhere_and_many_do_not() -> None:
    """Ancestral sampling with the smaller variance loses spread: 0.92-0.93 of it at 50 steps, for data of unit variance."""
    schedule = NoiseSchedule(PUBLISHED)
    predict = network(schedule, functools.partial(gaussian_x0, mean=0.0, std=1.0))
    draw = functools.partial(points, 8000)
    spread = {}
    for steps in (50, 1000):
        sampler = SamplerConfig(method="ddpm", steps=steps)
        found = sample_latents(predict, draw(0), schedule, sampler, draw)
        spread[steps] = float(found.std())
    assert spread[50] == pytest.approx(0.929, abs=0.02)
    assert spread[1000] == pytest.approx(0.994, abs=0.02)


def test_noise_of_steps_is_per_sample_and_differs_between_steps() -> None:
    schedule = NoiseSchedule(PUBLISHED)
    sampler = SamplerConfig(method="ddpm", steps=7)

    def run(seeds: list[int]) -> torch.Tensor:
        draw = functools.partial(draw_noise, seeds, (3, 4, 4, 4))
        return sample_latents(network(schedule), draw(), schedule, sampler, lambda step: draw(step=step))

    together = run([5, 6, 7])
    assert torch.equal(together[1], run([6])[0])
    streams = torch.stack([draw_noise([5], (4000,), step)[0] for step in range(4)] + [draw_noise([6], (4000,), 1)[0]])
    assert (torch.corrcoef(streams) - torch.eye(5)).abs().max() < 0.06
    with pytest.raises(ValueError, match="needs step_noise"):
        sample_latents(network(schedule), draw_noise([5], (3, 4, 4, 4)), schedule, sampler)


def test_zero_terminal_snr_reaches_a_mean_far_from_zero() -> None:
    """What the paper is about: started from pure noise, the usual schedule cannot reach it (2305.08891, section 3.1)."""
    data = functools.partial(gaussian_x0, mean=6.0, std=0.5)
    off = {}
    for zero in (False, True):
        schedule = NoiseSchedule(ScheduleConfig(prediction="v", zero_terminal_snr=zero))
        for method in ("ddim", "dpmpp_2m", "unipc"):
            noise = draw_noise(range(500), (8,))
            sampler = SamplerConfig(method=method, steps=100)
            found = sample_latents(network(schedule, data), noise, schedule, sampler)
            assert torch.isfinite(found).all()
            off[zero, method] = abs(float(found.mean()) - 6.0)
    for method in ("ddim", "dpmpp_2m", "unipc"):
        assert off[True, method] < 0.012
        assert off[False, method] > 0.02


@pytest.mark.parametrize(("prediction", "zero"), [("epsilon", False), ("v", True)])
def test_grids_are_as_long_as_asked_and_fall_strictly(prediction: str, zero: bool) -> None:
    schedule = NoiseSchedule(ScheduleConfig(prediction=prediction, zero_terminal_snr=zero))
    for steps in (1, 2, 3, 5, 8, 50, 200, 500, 999, 1000):
        for grid in (
            timesteps(1000, steps),
            log_snr_timesteps(schedule, steps),
            log_snr_timesteps(schedule, steps, 10.0),
        ):
            assert len(grid) == steps
            assert grid[0] == 999
            assert grid[-1] >= 0
            assert (np.diff(grid) < 0).all()
    few = log_snr_timesteps(schedule, 6)
    assert schedule.log_snr()[few[-1]] == pytest.approx(2.0, abs=0.05)
    assert np.ptp(np.diff(schedule.log_snr()[few[1:]])) < 0.05
    assert log_snr_timesteps(schedule, 6, 10.0)[-1] == 0
    later = log_snr_timesteps(schedule, 6, first=980)
    assert (later[0], later[-1]) == (980, few[-1])
    assert np.ptp(np.diff(schedule.log_snr()[later[1:]])) < 0.05


def test_the_schedule_is_double_and_the_state_single() -> None:
    for prediction, method in (("v", "unipc"), ("v", "ddpm"), ("flow", "ab2"), ("flow", "heun")):
        schedule = NoiseSchedule(ScheduleConfig(prediction=prediction))
        assert schedule.a.dtype == schedule.s.dtype == schedule.log_snr().dtype == np.float64
        seen = []

        def predict(x: torch.Tensor, t: float) -> torch.Tensor:
            seen.append(x.dtype)  # noqa: B023
            return 0.1 * x

        noise = draw_noise([1], (1, 2, 2, 2))
        sampler = SamplerConfig(method=method, steps=4)
        found = sample_latents(predict, noise, schedule, sampler, lambda step: draw_noise([1], (1, 2, 2, 2), step))
        assert {found.dtype, *seen} == {torch.float32}
        assert len(seen) == (7 if method == "heun" else 4)
