"""The solvers: pure functions of (predict, x, schedule, timesteps). The schedule is float64, the state float32. No torch.

The variance-preserving ones visit integer timesteps from a list and return the network's x_0 at the last of them, one
evaluation a timestep. The flow ones integrate dx/dt = u over a list of times from 1 to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from brainsynth.models.schedule import Float64s, NoiseSchedule

if TYPE_CHECKING:
    from torch import Tensor

Predict: TypeAlias = "Callable[[Tensor, float], Tensor]"
"""(x, network time in [0, 1000)) → prediction."""
StepNoise: TypeAlias = "Callable[[int], Tensor]"
"""Number of a step, from 1 → standard normal noise of the state's shape."""


def ddim(
    predict: Predict,
    x: Tensor,
    schedule: NoiseSchedule,
    grid: Sequence[int],
    eta: float = 0.0,
    step_noise: StepNoise | None = None,
) -> Tensor:
    """DDIM (2010.02502, eq. 12 and 16). eta 0 is deterministic; 1 is ancestral sampling, DDPM (2006.11239) on this grid."""
    for index, t in enumerate(grid):
        x0, noise = schedule.denoised(predict(x, float(t)), x, t)
        if index + 1 == len(grid):
            return x0
        following = grid[index + 1]
        a, s = float(schedule.a[following]), float(schedule.s[following])
        sigma = 0.0
        if eta > 0:
            kept = float(schedule.a[t]) / a  # of the signal, over this step
            sigma = eta * s / float(schedule.s[t]) * np.sqrt(1.0 - kept**2)
        x = a * x0 + float(np.sqrt(s**2 - sigma**2)) * noise
        if step_noise is not None and sigma > 0:
            x = x + float(sigma) * step_noise(index + 1).to(x, non_blocking=True)
    return x


def dpmpp_2m(
    predict: Predict, x: Tensor, schedule: NoiseSchedule, grid: Sequence[int], corrected: bool = False
) -> Tensor:
    """DPM-Solver++(2M) (2211.01095, algorithm 2); `corrected`: each evaluation first corrects the step that led to it.

    The corrector is UniC-1 with B(h) = exp(h) - 1 (2302.04867, section 3), a trapezoid at no further evaluation. With
    it the solver is UniPC: predictor UniP-2, which is DPM-Solver++(2M), and a corrector that keeps the second order.
    """
    lam = schedule.log_snr()
    previous: Tensor | None = None
    carried, gain = x, 0.0  # of the step that led here
    for index, t in enumerate(grid):
        x0, _ = schedule.denoised(predict(x, float(t)), x, t)
        if index + 1 == len(grid):
            return x0
        if corrected and previous is not None:
            x = carried + gain * (x0 + previous) / 2
        following = grid[index + 1]
        h = float(lam[following] - lam[t])  # infinite when t is pure noise; then x0 is all that counts
        direction = x0
        if previous is not None:
            r = float(lam[t] - lam[grid[index - 1]]) / h
            direction = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous
        carried = float(schedule.s[following] / schedule.s[t]) * x
        gain = -float(schedule.a[following]) * float(np.expm1(-h))
        x = carried + gain * direction
        previous = x0
    return x


def flow(predict: Predict, x: Tensor, schedule: NoiseSchedule, times: Float64s, second_order: bool) -> Tensor:
    """dx/dt = u by Euler steps, or by Adams-Bashforth of order 2 (uneven steps) at the same cost."""
    previous: Tensor | None = None
    for index in range(len(times) - 1):
        u = predict(x, _network_time(schedule, times[index]))
        h = float(times[index] - times[index + 1])
        slope = u
        if second_order and previous is not None:
            r = h / float(times[index - 1] - times[index])
            slope = (1 + r / 2) * u - r / 2 * previous
        x = x - h * slope
        previous = u
    return x


def heun(predict: Predict, x: Tensor, schedule: NoiseSchedule, times: Float64s) -> Tensor:
    """dx/dt = u by Heun's method: two evaluations a step, one in the last (no network was trained at t = 0)."""
    for index in range(len(times) - 1):
        h = float(times[index] - times[index + 1])
        u = predict(x, _network_time(schedule, times[index]))
        ahead = x - h * u
        if index + 2 == len(times):
            return ahead
        x = x - h / 2 * (u + predict(ahead, _network_time(schedule, times[index + 1])))
    return x


def _network_time(schedule: NoiseSchedule, t: float) -> float:
    """Training timestep k stands for t = (k + 1) / T."""
    return float(t * schedule.config.num_train_timesteps - 1)
