"""Volumes at 8 mm without training: a Gaussian given the covariates.

The mean is a ridge regression by cohort; the correlation is pooled, and half of it is tapered with distance (Gaspari and
Cohn), as in ensemble Kalman filters.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from recipes.pyramid.data import Scans, context, to_8mm


class CoarseGaussian:
    """Fitted on the training scans."""

    def __init__(self, scans: Scans, length: float = 4.0, share: float = 0.5, ridge: float = 3.0):
        rows = scans.rows("train")
        volumes = np.stack([to_8mm(np.asarray(scans.volumes[row], dtype=np.float32)) for row in rows])
        numbers = context(scans.table)[rows]
        self.mask = volumes.mean(0) > 0.03
        self.maps, self.sd, residuals = dict[float, np.ndarray](), dict[float, np.ndarray](), []
        penalty = np.eye(5) * ridge
        penalty[0, 0] = 0
        for cohort in (-1.0, 1.0):
            mine = numbers[:, 0] == cohort
            design, values = _design(numbers[mine]), volumes[mine][:, self.mask]
            self.maps[cohort] = np.linalg.solve(design.T @ design + penalty, design.T @ values)
            error = values - design @ self.maps[cohort]
            self.sd[cohort] = np.maximum(error.std(0), 0.004)
            residuals.append(error / self.sd[cohort])
        pooled = np.concatenate(residuals)
        correlation = torch.from_numpy((pooled.T @ pooled / (len(pooled) - 10)).astype(np.float32))
        mixed = share * correlation + (1 - share) * correlation * taper(self.mask, length)
        mixed.diagonal().add_(1e-3)
        self.factor = torch.linalg.cholesky(mixed)

    def sample(self, context: Tensor, seed: int = 0) -> Tensor:
        """Volumes at 8 mm."""
        numbers = context.numpy()
        mean = np.concatenate([_design(row[None]) @ self.maps[float(row[0])] for row in numbers])
        sd = np.stack([self.sd[float(row[0])] for row in numbers])
        noise = torch.randn(len(numbers), len(self.factor), generator=torch.Generator().manual_seed(seed))
        inside = torch.from_numpy(mean).float() + noise @ self.factor.T * torch.from_numpy(sd).float()
        volumes = torch.zeros(len(numbers), 1, *self.mask.shape)
        volumes[:, 0, torch.from_numpy(self.mask)] = inside.clamp(0, 1.4)
        return volumes


def taper(mask: np.ndarray, length: float) -> Tensor:
    """1 at distance 0, 0 from twice the length (in cells) on."""
    cells = torch.from_numpy(np.argwhere(mask).astype(np.float32))
    r = torch.cdist(cells, cells) / length
    near = 1 - 5 / 3 * r**2 + 5 / 8 * r**3 + r**4 / 2 - r**5 / 4
    rest = 2 / (3 * r.clamp(min=0.5))
    far = 4 - 5 * r + 5 / 3 * r**2 + 5 / 8 * r**3 - r**4 / 2 + r**5 / 12 - rest
    return torch.where(r < 1, near, torch.where(r < 2, far, torch.zeros_like(r)))


def _design(numbers: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ones((len(numbers), 1)), numbers[:, 1:5]], 1)
