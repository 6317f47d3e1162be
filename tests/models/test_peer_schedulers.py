"""Trajectories that diffusers made (diffusers_trajectories.py beside this file) and MONAI makes, against ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.networks.schedulers import DDIMScheduler

from brainsynth.config.training import ScheduleConfig
from brainsynth.models.schedule import NoiseSchedule, flow_times, log_snr_timesteps, timesteps
from brainsynth.models.solvers import ddim, dpmpp_2m, flow
from tests.models.analytic import network

KEPT = np.load(Path(__file__).with_name("diffusers_trajectories.npz"))
START = torch.from_numpy(KEPT["start"])
CLOSE = {"rtol": 1e-3, "atol": 1e-3}
"""diffusers keeps its schedule and state in float32, and x_0 from epsilon is amplified a hundredfold at the start."""


def kept(name: str) -> torch.Tensor:
    return torch.from_numpy(KEPT[name])


def schedule_of(prediction: str, **options: bool) -> NoiseSchedule:
    return NoiseSchedule(ScheduleConfig(prediction=prediction, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_ddim_and_dpm_solver_are_those_of_diffusers(prediction: str) -> None:
    schedule = schedule_of(prediction)
    for steps in (10, 50):
        found = ddim(network(schedule), START, schedule, timesteps(1000, steps))
        torch.testing.assert_close(found, kept(f"ddim {prediction} {steps} trailing"), **CLOSE)
    found = dpmpp_2m(network(schedule), START, schedule, KEPT["grid"].tolist())
    torch.testing.assert_close(found, kept(f"dpmpp_2m {prediction}"), **CLOSE)
    # Its UniPC has another corrector; both lead to the same place.
    found = dpmpp_2m(network(schedule), START, schedule, log_snr_timesteps(schedule, 200, 10.0), corrected=True)
    torch.testing.assert_close(found, kept(f"unipc {prediction} 200"), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_stochastic_steps_are_those_of_diffusers(eta: float) -> None:
    schedule, noises = schedule_of("epsilon"), kept("noises")
    found = ddim(network(schedule), START, schedule, timesteps(1000, 10), eta, lambda step: noises[step - 1])
    torch.testing.assert_close(found, kept(f"ddim eta {eta}"), **CLOSE)
    if eta == 1:  # ancestral sampling, as DDPM's own scheduler does it
        torch.testing.assert_close(found, kept("ddpm"), **CLOSE)


def test_zero_terminal_snr_is_that_of_diffusers() -> None:
    schedule = schedule_of("v", zero_terminal_snr=True)
    assert schedule.a[-1] == 0
    np.testing.assert_allclose(schedule.a**2, KEPT["zero terminal alphas_cumprod"], rtol=1e-3, atol=1e-6)
    found = ddim(network(schedule), START, schedule, timesteps(1000, 10))
    torch.testing.assert_close(found, kept("ddim v 10 zero terminal"), **CLOSE)


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_flow_euler_is_that_of_diffusers(shift: float) -> None:
    schedule = schedule_of("flow")
    found = flow(network(schedule), START, schedule, flow_times(10, shift), second_order=False)
    torch.testing.assert_close(found, kept(f"euler shift {shift}"), **CLOSE)


def test_settings_that_are_wrong_elsewhere_are_not_ours() -> None:
    """`linspace` steps over another length than it evaluates (diffusers, and MONAI since 1.6); `leading` starts late."""
    schedule, steps = schedule_of("epsilon"), 10
    monai = DDIMScheduler(1000, "scaled_linear_beta", beta_start=0.0015, beta_end=0.0205, clip_sample=False)
    monai.set_timesteps(steps)
    evaluated = monai.timesteps.tolist()
    reached = [t - 1000 // steps for t in evaluated]
    assert sum(a != b for a, b in zip(reached, evaluated[1:], strict=False)) == steps - 1

    def run(times: list[int]) -> torch.Tensor:
        x = START
        for t in times:
            x, _ = monai.step(network(schedule)(x, t), t, x)
        return x

    torch.testing.assert_close(run(evaluated), kept("ddim epsilon 10 linspace"), **CLOSE)  # the same defect there
    right = timesteps(1000, steps)
    assert [t - 1000 // steps for t in right[:-1]] == right[1:]
    # Where its steps and its timesteps agree, MONAI's DDIM is ours.
    torch.testing.assert_close(run(right), ddim(network(schedule), START, schedule, right), **CLOSE)
    for spacing in ("linspace", "leading"):
        assert (kept(f"ddim epsilon 10 {spacing}") - kept("ddim epsilon 10 trailing")).abs().max() > 20 * CLOSE["atol"]
