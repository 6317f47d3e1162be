"""The noise schedule that training and sampling share, and the timesteps that a sampler visits. All in float64.

Time t runs from 0 (data) to 1 (noise). Variance-preserving schedules have x_t = a(t) x_0 + s(t) e with a² + s² = 1 on the
training grid; rectified flow (2209.03003) has x_t = (1 - t) x_0 + t e. Predictions: epsilon (2006.11239), v = a e - s x_0
(2202.00512), flow u = e - x_0. All timesteps come from one list, so the step that is taken is the step that was evaluated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from brainsynth.config.training import ScheduleConfig

if TYPE_CHECKING:
    from torch import Tensor

Float64s = npt.NDArray[np.float64]
LOWEST_LOG_SNR = -5.0
"""log(a/s) below which x_t is noise to any network (the published schedule ends at -4.6): no steps are spent there."""


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
            self.a = np.sqrt(np.cumprod(1.0 - betas))
            if config.zero_terminal_snr:  # 2305.08891, algorithm 1: shift a(T-1) to 0, scale so that a(0) stays
                self.a = (self.a - self.a[-1]) * self.a[0] / (self.a[0] - self.a[-1])
            self.s = np.sqrt(1.0 - self.a**2)

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
        a = like.new_tensor(self.a[index]).view(shape)
        s = like.new_tensor(self.s[index]).view(shape)
        return a, s

    def denoised(self, prediction: Tensor, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """(x_0, e) that a prediction at integer timestep t means."""
        a, s = float(self.a[t]), float(self.s[t])
        if self.config.prediction == "epsilon":
            return (x - s * prediction) / a, prediction
        if self.config.prediction == "v":
            return a * x - s * prediction, s * x + a * prediction
        return x - s * prediction, x + a * prediction

    def log_snr(self) -> Float64s:
        """log(a/s) at the training timesteps; -inf where a is 0 (half of the literature's log(a²/s²))."""
        with np.errstate(divide="ignore"):
            return np.log(self.a) - np.log(self.s)

    def noise_level(self, t: float) -> float:
        """s/a at network time t, which may lie between training timesteps; inf at pure noise."""
        if self.config.prediction == "flow":
            s = (t + 1.0) / self.config.num_train_timesteps
            return s / (1.0 - s) if s < 1 else float("inf")
        return float(np.exp(-np.interp(t, np.arange(len(self.a)), self.log_snr())))


def timesteps(count: int, steps: int) -> list[int]:
    """`steps` integer timesteps from T-1 downwards, evenly spaced ("trailing"): the first sees pure noise."""
    return [round(count - i * count / steps) - 1 for i in range(steps)]


def log_snr_timesteps(
    schedule: NoiseSchedule, steps: int, last_log_snr: float = 2.0, first: int | None = None
) -> list[int]:
    """`steps` different integer timesteps, evenly spaced in log(a/s) as far as T allows.

    From `first`, by default T-1, down to `last_log_snr`.
    """
    log_snr = schedule.log_snr()
    first = len(log_snr) - 1 if first is None else first
    wanted = np.linspace(max(log_snr[first], LOWEST_LOG_SNR), min(last_log_snr, log_snr[0]), steps)
    places = np.array([np.abs(log_snr - value).argmin() for value in wanted])
    places[0] = first
    order = np.arange(steps)
    # Where steps are finer than training timesteps, neighbours would coincide: each goes at least one down, none below 0.
    places = np.minimum.accumulate(places + order) - order
    return [int(t) for t in np.maximum(places, order[::-1])]


def flow_times(steps: int, shift: float) -> Float64s:
    """`steps` + 1 times from 1 to 0; `shift` above 1 puts more of them near noise (2403.03206, eq. 23)."""
    t = np.linspace(1.0, 0.0, steps + 1)
    return shift * t / (1.0 + (shift - 1.0) * t)
