"""A flow in voxels, as WaveDiT and the pipelines of diffusers have: noise in, Heun steps of a callable, a volume out.

`velocity` names the function that builds the callable, `module:function`; it is called with `weights`, and gives a
`torch.nn.Module` that is called as `network(x, t, conditions)`: x (1, 1, X, Y, Z), t (1,) from 1 (noise) to 0, and one
number in [0, 1] a covariate, (1, n).
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from brainsynth import Covariate, CovariateSchema, GeneratorSpec, VolumeSpec


class HeunFlow:
    """Conditioned on age; change `describe` for other covariates, another grid and its terms."""

    def __init__(self, velocity: str, weights: str, steps: int = 10, size: int = 64, spacing_mm: float = 3.0) -> None:
        self.module, _, self.function = velocity.partition(":")
        self.weights, self.steps, self.size, self.spacing_mm = Path(weights), steps, size, spacing_mm

    def describe(self) -> GeneratorSpec:
        """A cube around the origin; its digest covers weights, code and the number of steps."""
        edge = -self.spacing_mm * (self.size - 1) / 2
        code = Path(str(importlib.import_module(self.module).__file__)).read_bytes()
        content = hashlib.sha256(self.weights.read_bytes() + code).hexdigest()
        age = Covariate(name="age", kind="continuous", unit="years", low=18.0, high=90.0)
        return GeneratorSpec(
            name="heun-flow",
            volume=VolumeSpec(
                shape_xyz=(self.size,) * 3, spacing_mm=(self.spacing_mm,) * 3, origin_mm=(edge, edge, edge)
            ),
            covariates=CovariateSchema(covariates=(age,)),
            licence="the licence of the weights",
            training_data="what they were trained on",
            content=f"{content}, {self.steps} steps",
        )

    def load(self, device: str) -> None:
        """Build the network once in every process."""
        self.device = torch.device(device)
        self.network = getattr(importlib.import_module(self.module), self.function)(self.weights).eval().to(device)

    @torch.no_grad()
    def sample(self, rows: pd.DataFrame, seeds: list[int]) -> npt.NDArray[np.float32]:
        """Each row by itself, from the noise of its seed."""
        conditions = torch.from_numpy(self.describe().covariates.encode(rows)).to(self.device)
        return np.stack([self._one(conditions[[row]], seed) for row, seed in enumerate(seeds)])

    def _one(self, conditions: torch.Tensor, seed: int) -> npt.NDArray[np.float32]:
        x = torch.randn((1, 1, *(self.size,) * 3), generator=torch.Generator().manual_seed(seed)).to(self.device)
        times = torch.linspace(1, 0, self.steps + 1, device=self.device)
        for now, after in itertools.pairwise(times):
            slope = self.network(x, now[None], conditions)
            there = x + (after - now) * slope
            x = x + (after - now) * (slope + self.network(there, after[None], conditions)) / 2
        return x[0, 0].clip(0, 1).float().cpu().numpy()
