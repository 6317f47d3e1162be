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

Predict = Callable[[Tensor, float], Tensor]
"""(x, network time in [0, 1000)) → prediction."""


class NoiseSchedule:
    """a(t) and s(t) at the training timesteps 0 … T-1, in float64."""

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        count = config.num_train_timesteps
        if config.prediction == "flow":
            t = (np.arange(count) + 1.0) / count
            self.a, self.s = 1.0 - t, t
        else:
            betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, count) ** 2
            alphas_cumprod = np.cumprod(1.0 - betas)
            self.a, self.s = np.sqrt(alphas_cumprod), np.sqrt(1.0 - alphas_cumprod)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t for integer timesteps t (B,)."""
        a, s = self._coefficients(t, x0)
        return a * x0 + s * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is trained to predict."""
        if self.config.prediction == "epsilon":
            return noise
        if self.config.prediction == "flow":
            return noise - x0
        a, s = self._coefficients(t, x0)
        return a * noise - s * x0

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        index = t.cpu().numpy()
        shape = (-1, *(1,) * (like.ndim - 1))
        a = torch.from_numpy(self.a[index]).to(like).view(shape)
        s = torch.from_numpy(self.s[index]).to(like).view(shape)
        return a, s

    def denoised(self, prediction: Tensor, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """(x_0, e) that a prediction at integer timestep t means."""
        a, s = float(self.a[t]), float(self.s[t])
        if self.config.prediction == "epsilon":
            return (x - s * prediction) / a, prediction
        if self.config.prediction == "v":
            return a * x - s * prediction, s * x + a * prediction
        return x - s * prediction, x + a * prediction


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


def timesteps(count: int, steps: int) -> list[int]:
    """`steps` integer timesteps from T-1 downwards, evenly spaced ("trailing"): the first sees pure noise."""
    return [round(count - i * count / steps) - 1 for i in range(steps)]


def log_snr_timesteps(schedule: NoiseSchedule, steps: int, last_log_snr: float = 2.0) -> list[int]:
    """`steps` timesteps evenly spaced in log(a/s), from pure noise to `last_log_snr`."""
    log_snr = np.log(schedule.a / schedule.s)
    wanted = np.linspace(log_snr[-1], min(last_log_snr, log_snr[0]), steps)
    found = [int(np.abs(log_snr - value).argmin()) for value in wanted]
    return list(dict.fromkeys(found))


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
