"""Noise schedules and samplers: pure functions; randomness enters as an argument. Solver state is float32.

Time t runs from 0 (data) to 1 (noise). Variance-preserving schedules have x_t = a(t) x_0 + s(t) e with a² + s² = 1 on the
training grid; rectified flow (2209.03003) has x_t = (1 - t) x_0 + t e. Predictions: epsilon (2006.11239), v = a e - s x_0
(2202.00512), flow u = e - x_0. All timesteps come from one list, so the step that is taken is the step that was evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from brainsynth.config.schema import SamplerConfig
from brainsynth.config.training import ScheduleConfig
from brainsynth.errors import UserError
from brainsynth.models.schedule import NoiseSchedule, log_snr_timesteps, timesteps

Predict = Callable[[Tensor, float], Tensor]
"""(x, network time in [0, 1000)) → prediction."""


def draw_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """(B, *shape) standard normal float32 noise, one CPU stream per sample: no batch mate or device changes it.

    Philox4x64 (Salmon et al. 2011) keyed by the whole seed, and Box-Muller in float64. torch's own CPU generator looks at
    the lower 32 bits of a seed only: of 100,000 subjects one or two pairs would share their noise.
    """
    return torch.stack([_normal(int(seed), math.prod(shape)).view(shape) for seed in seeds])


def _normal(seed: int, count: int) -> Tensor:
    half = (count + 1) // 2
    # Raw words are the same in every version of NumPy; its normal variates may change.
    words = np.asarray(np.random.Philox(key=seed).random_raw(2 * half)) >> np.uint64(11)
    uniform = (words.astype(np.float64) + 1.0) * 2.0**-53  # in (0, 1]
    radius, angle = np.sqrt(-2.0 * np.log(uniform[:half])), 2.0 * np.pi * uniform[half:]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    return torch.from_numpy(normal.astype(np.float32))


def sample_latents(predict: Predict, noise: Tensor, schedule: NoiseSchedule, sampler: SamplerConfig) -> Tensor:
    """Run a sampler from noise to latents, both (B, C, X, Y, Z) float32.

    Raises:
        UserError: when the method does not fit what the network predicts.
    """
    check_sampler(schedule.config, sampler)
    return _METHODS[sampler.method](predict, noise, schedule, sampler.steps)


def check_sampler(schedule: ScheduleConfig, sampler: SamplerConfig) -> None:
    """Raises UserError when the method does not fit what the network predicts, or has more steps than were trained."""
    fitting = ("euler", "ab2") if schedule.prediction == "flow" else ("ddim", "dpmpp_2m")
    if sampler.method not in fitting:
        raise UserError(
            f"sampler.method {sampler.method!r} does not fit a network that predicts {schedule.prediction!r}; "
            f"use {' or '.join(fitting)}"
        )
    if sampler.steps > schedule.num_train_timesteps:
        raise UserError(
            f"sampler.steps {sampler.steps} is more than the {schedule.num_train_timesteps} trained timesteps"
        )


def _ddim(predict: Predict, x: Tensor, schedule: NoiseSchedule, steps: int) -> Tensor:
    """DDIM, eta = 0 (2010.02502, eq. 12)."""
    grid = timesteps(schedule.config.num_train_timesteps, steps)
    for index, t in enumerate(grid):
        x0, noise = schedule.denoised(predict(x, float(t)), x, t)
        if index + 1 == len(grid):
            return x0
        x = float(schedule.a[grid[index + 1]]) * x0 + float(schedule.s[grid[index + 1]]) * noise
    return x


def _dpmpp_2m(predict: Predict, x: Tensor, schedule: NoiseSchedule, steps: int) -> Tensor:
    """DPM-Solver++(2M) (2211.01095, algorithm 2) on a grid that is uniform in log-SNR."""
    grid = log_snr_timesteps(schedule, steps)
    lam: npt.NDArray[np.float64] = np.log(schedule.a / schedule.s)
    previous: Tensor | None = None
    for index, t in enumerate(grid):
        x0, _ = schedule.denoised(predict(x, float(t)), x, t)
        if index + 1 == len(grid):
            return x0
        following = grid[index + 1]
        h = float(lam[following] - lam[t])
        direction = x0
        if previous is not None:
            r = float(lam[t] - lam[grid[index - 1]]) / h
            direction = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous
        ratio = float(schedule.s[following] / schedule.s[t])
        x = ratio * x - float(schedule.a[following]) * float(np.expm1(-h)) * direction
        previous = x0
    return x


def _flow(predict: Predict, x: Tensor, schedule: NoiseSchedule, steps: int, second_order: bool) -> Tensor:
    """dx/dt = u from t = 1 to 0 in even steps: Euler, or Adams-Bashforth of order 2 at the same cost."""
    count = schedule.config.num_train_timesteps
    grid = np.linspace(1.0, 0.0, steps + 1)
    previous: Tensor | None = None
    for index in range(steps):
        # Training timestep k stands for t = (k + 1) / T.
        u = predict(x, float(grid[index] * count - 1))
        h = float(grid[index] - grid[index + 1])
        slope = u if previous is None or not second_order else 1.5 * u - 0.5 * previous
        x = x - h * slope
        previous = u
    return x


def _euler(predict: Predict, x: Tensor, schedule: NoiseSchedule, steps: int) -> Tensor:
    return _flow(predict, x, schedule, steps, second_order=False)


def _ab2(predict: Predict, x: Tensor, schedule: NoiseSchedule, steps: int) -> Tensor:
    return _flow(predict, x, schedule, steps, second_order=True)


_METHODS: dict[str, Callable[[Predict, Tensor, NoiseSchedule, int], Tensor]] = {
    "ddim": _ddim,
    "dpmpp_2m": _dpmpp_2m,
    "euler": _euler,
    "ab2": _ab2,
}


def guided(predict_context: Callable[[Tensor, Tensor, Tensor], Tensor], context: Tensor, scale: float) -> Predict:
    """A `Predict` with the context bound and classifier-free guidance (2207.12598): null + scale * (known - null)."""

    def predict(x: Tensor, t: float) -> Tensor:
        times = torch.full((x.shape[0],), t, device=x.device, dtype=torch.float32)
        known = predict_context(x, times, context)
        if scale == 1.0:
            return known
        null = predict_context(x, times, torch.zeros_like(context))
        return null + scale * (known - null)

    return predict
