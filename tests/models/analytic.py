"""Networks that are perfect, because their data's score is known in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from brainsynth.models.schedule import NoiseSchedule
from brainsynth.models.solvers import Predict

MEAN, STD = 0.7, 0.5
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
CENTRES = torch.tensor([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5]], dtype=torch.float64)
SPREADS = torch.tensor(
    [[[0.2, 0.1], [0.1, 0.1]], [[0.05, 0.0], [0.0, 0.3]], [[0.3, -0.1], [-0.1, 0.1]]], dtype=torch.float64
)


def level(schedule: NoiseSchedule, t: float) -> tuple[float, float]:
    """(a, s) at a network time; the flow is defined between training timesteps too."""
    if schedule.config.prediction == "flow":
        s = (t + 1) / schedule.config.num_train_timesteps
        return 1 - s, s
    return float(schedule.a[round(t)]), float(schedule.s[round(t)])


def gaussian_x0(x: Tensor, a: float, s: float, mean: float = MEAN, std: float | Tensor = STD) -> Tensor:
    """E[x_0 | x] for data N(mean, std²)."""
    return mean + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mean)


def mixture_x0(x: Tensor, a: float, s: float) -> Tensor:
    """E[x_0 | x] for a mixture of three Gaussians in the plane; x is (B, 2)."""
    covariance = a**2 * SPREADS + s**2 * torch.eye(2)
    off = x.double()[:, None] - a * CENTRES  # (B, 3, 2)
    solved = torch.einsum("kij,bkj->bki", torch.linalg.inv(covariance), off)
    log = torch.log(WEIGHTS) - torch.logdet(covariance) / 2 - (off * solved).sum(-1) / 2
    given = CENTRES + a * torch.einsum("kij,bkj->bki", SPREADS, solved)
    return (torch.softmax(log, 1)[..., None] * given).sum(1).to(x)


def network(schedule: NoiseSchedule, x0_of=gaussian_x0) -> Predict:
    """What a perfect network predicts, whatever it is trained to."""

    def predict(x: Tensor, t: float) -> Tensor:
        a, s = level(schedule, t)
        x0 = x0_of(x, a, s)
        noise = (x - a * x0) / s
        return {"epsilon": noise, "v": a * noise - s * x0, "flow": noise - x0}[schedule.config.prediction]

    return predict


def gaussian_end(
    schedule: NoiseSchedule, x: Tensor, last: int, mean: float = MEAN, std: float | Tensor = STD
) -> Tensor:
    """Where the exact ODE leads from x at T-1, then denoised at timestep `last`."""
    a, s = float(schedule.a[-1]), float(schedule.s[-1])
    z = (x - a * mean) / ((a * std) ** 2 + s**2) ** 0.5
    a, s = float(schedule.a[last]), float(schedule.s[last])
    return gaussian_x0(a * mean + ((a * std) ** 2 + s**2) ** 0.5 * z, a, s, mean, std)
