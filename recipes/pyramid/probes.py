"""The local networks of the probes as their checkpoints store them, and their weights as a pyramid of the product.

The mid stage of the probes is a flow that is used for one step from time 0.999. There its time is a constant, its inputs
and outputs are scaled by constants, and the share of the noise that is left over is below 1e-6: it is the same network as
the fine stage but for those constants, which the conversion folds into the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from brainsynth.config.architectures import PyramidArchitecture, UpsamplerArchitecture
from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.models.patch_autoencoder import depth_to_space
from brainsynth.models.pyramid import unit_power

MID, FINE = UpsamplerArchitecture(width=96, noise=8), UpsamplerArchitecture(width=64, noise=4)
INTENSITY_SCALE = 1.15
"""White matter is 1 in the probes and, on average over both cohorts, 0.87 after prepare-cohort."""
ARCHITECTURE = PyramidArchitecture(kind="pyramid", stages=(MID, FINE), intensity_scale=INTENSITY_SCALE)
LAST_TIME, DETAIL, MID_GAIN = 0.999, 0.12, (64 / 96) ** 0.5
NORM = math.hypot(LAST_TIME, 1 - LAST_TIME)
COHORT, SEX, AGE, VENTRICLES, BRAIN, KNOWN = range(6)
"""Columns of the probes' context; three columns of KNOWN follow for the three numbers before it."""
State = Mapping[str, Tensor]


def waves(time: float) -> Tensor:
    """Sines and cosines of the log odds of the time, 32 numbers."""
    angles = math.log(time / (1 - time)) * torch.exp(torch.linspace(math.log(0.2), math.log(4.0), 16))
    return torch.cat([angles.sin(), angles.cos()])


class LocalBlock(nn.Module):
    """One 3×3×3 convolution and two 1×1×1, modulated by the context."""

    def __init__(self, width: int):
        super().__init__()
        self.c, self.film = nn.Conv3d(width, width, 3, padding=1), nn.Linear(width, 2 * width)
        self.a, self.b = nn.Conv3d(width, 2 * width, 1), nn.Conv3d(2 * width, width, 1)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """A residual."""
        scale, shift = self.film(code)[:, :, None, None, None].chunk(2, 1)
        return x + self.b(functional.silu(self.a(functional.silu(self.c(unit_power(x)) * (1 + scale) + shift))))


class LocalNetwork(nn.Module):
    """Either stage; `flow` makes it the mid one. The arguments are those of the product's `Upsampler`."""

    def __init__(self, stage: UpsamplerArchitecture, flow: bool):
        super().__init__()
        width, self.flow = stage.width, flow
        numbers = 8 + 1 + (32 if flow else 0)
        self.embed = nn.Sequential(nn.Linear(numbers, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.first = nn.Conv3d(stage.noise + 1 + 4, width, 3, padding=1)
        self.blocks = nn.ModuleList(LocalBlock(width) for _ in range(stage.blocks))
        self.last = nn.Conv3d(width, 8, 3, padding=1)

    def forward(self, coarse: Tensor, level: Tensor, place: Tensor, context: Tensor, noise: Tensor) -> Tensor:
        """Volumes of twice the grid, not below zero."""
        level = level[:, None] * 10
        if not self.flow:
            h = self._hidden(torch.cat([coarse * 2 - 1, noise, place], 1), torch.cat([context, level], 1))
            details = self.last(functional.silu(unit_power(h)))
        else:
            code = torch.cat([waves(LAST_TIME).expand(len(level), -1), level, context], 1)
            h = self._hidden(torch.cat([noise / NORM, coarse * 2 - 1, place], 1), code)
            velocity = (
                noise * (2 * LAST_TIME - 1) / NORM**2 + self.last(functional.silu(unit_power(h) * MID_GAIN)) / NORM
            )
            details = (noise - velocity) * DETAIL
        return functional.relu(functional.interpolate(coarse, scale_factor=2) + depth_to_space(details, 2))

    def _hidden(self, seen: Tensor, code: Tensor) -> Tensor:
        h, code = self.first(seen), self.embed(code)
        for block in self.blocks:
            h = block(h, code)
        return cast(Tensor, h)


def columns(schema: CovariateSchema) -> Tensor:
    """(8, K) M: the probes' context is M times the product's, with brain volume in place of its logarithm near 1250 ml.

    A value that is not known is zero in both, and the last columns of the product say which are known.
    """
    matrix = torch.zeros(8, schema.context_size)
    for place, covariate in enumerate(schema.covariates):
        known = len(schema.covariates) + place
        column, slope, offset = _probed(covariate)
        matrix[column, place], matrix[column, known] = slope, offset
        if column in (AGE, VENTRICLES, BRAIN):
            matrix[KNOWN + column - AGE, known] = 1
    return matrix


def _probed(covariate: Covariate) -> tuple[int, float, float]:
    """Column, slope and offset of a covariate that lies between 0 and 1."""
    if covariate.name == "cohort":
        return COHORT, -2.0, 1.0
    if covariate.name == "sex":
        return SEX, 2.0, -1.0
    assert covariate.low is not None
    assert covariate.high is not None
    low, span = covariate.low, covariate.high - covariate.low
    if covariate.name == "age":
        return AGE, span / 25, (low - 50) / 25
    if covariate.name == "brain_volume":
        return BRAIN, span / 1250 / 0.12, (math.log(1250) + low / 1250 - 1 - 7.1) / 0.12
    if covariate.name == "ventricular_volume":
        return VENTRICLES, math.log(covariate.high / low) / 0.7, (math.log(low) - 3.2) / 0.7
    raise ValueError(f"the probes did not know {covariate.name}")


def converted(old: State, stage: UpsamplerArchitecture, flow: bool, context: Tensor) -> dict[str, Tensor]:
    """Weights of the product's `Upsampler`; `context` is the matrix of `columns`."""
    n, embed = stage.noise, old["embed.0.weight"]
    times, levels, numbers = (
        (embed[:, :32], embed[:, 32:33], embed[:, 33:]) if flow else (None, embed[:, 8:], embed[:, :8])
    )
    bias = old["embed.0.bias"] if times is None else old["embed.0.bias"] + times @ waves(LAST_TIME)
    first = old["first.weight"]
    if flow:
        first = torch.cat([first[:, n : n + 1], first[:, :n] / NORM, first[:, n + 1 :]], 1)
    scale = -DETAIL / NORM if flow else 1.0
    new = {
        "embed.0.weight": torch.cat([numbers @ context, levels], 1),
        "embed.0.bias": bias,
        "embed.2.weight": old["embed.2.weight"],
        "embed.2.bias": old["embed.2.bias"],
        "first.weight": first,
        "first.bias": old["first.bias"],
        "gain": torch.full((stage.width,), MID_GAIN if flow else 1.0),
        "last.weight": old["last.weight"] * scale,
        "last.bias": old["last.bias"] * scale,
    }
    names = {"c": "spread", "film": "modulation", "a": "widen", "b": "narrow"}
    for key, value in old.items():
        if key.startswith("blocks."):
            _, number, part, kind = key.split(".")
            new[f"blocks.{number}.{names[part]}.{kind}"] = value
    return new
