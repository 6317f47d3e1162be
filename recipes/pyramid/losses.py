"""What both local stages share in training: the critic's and the generator's losses, averaged weights, and a guard."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from recipes.pyramid.data import Batch
from recipes.pyramid.networks import Critic, pool

Logits = list[Tensor]
NOISE, PENALTY = 0.02, 10
"""Of the gradient penalty by finite differences: the critic should answer the same after a little noise."""


def critic_loss(critic: Critic, batch: Batch, made: Tensor) -> tuple[Tensor, Tensor, Logits, Logits]:
    """Relativistic logistic loss, its penalty, and what the critic said of the real crops: logits and features."""
    count = len(batch.target)
    both = torch.cat([batch.target, made.detach()])
    condition = [torch.cat([part, part]) for part in batch.condition]
    logits, features = critic(both, *condition)
    noised, _ = critic(both + NOISE * torch.randn_like(both), *condition)
    loss = torch.stack([functional.softplus(y[count:] - y[:count]).mean() for y in logits]).sum()
    penalty = torch.stack([((x - y) ** 2).mean() for x, y in zip(logits, noised, strict=True)]).sum()
    return loss, penalty, [y[:count].detach() for y in logits], [y[:count].detach() for y in features]


def generator_loss(critic: Critic, batch: Batch, made: Tensor, real: Logits, features: Logits) -> tuple[Tensor, Tensor]:
    """The adversarial loss and the distance of features; the critic is left as it is."""
    critic.requires_grad_(False)
    logits, own = critic(made, *batch.condition)
    adversarial = torch.stack([functional.softplus(y - x).mean() for y, x in zip(real, logits, strict=True)]).sum()
    pairs = zip(own[1:], features[1:], strict=True)
    matching = torch.stack([(x - y).abs().mean() for x, y in pairs]).sum() / len(own)
    critic.requires_grad_(True)
    return adversarial, matching


def distances(batch: Batch, made: Tensor) -> tuple[Tensor, Tensor]:
    """L1 to the target, and L1 of the averages to the coarse volume."""
    return (made - batch.target).abs().mean(), (pool(made) - batch.coarse).abs().mean()


@torch.no_grad()
def average(averaged: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Move the averaged weights towards the network's, faster in the first steps."""
    rate = 1 - min(decay, (step + 1) / (step + 10))
    for mean, value in zip(averaged.parameters(), network.parameters(), strict=True):
        mean.lerp_(value, rate)


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """All or nothing."""
    part = path.with_name(path.name + ".part")
    torch.save(state, part)
    os.replace(part, path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Tensors, numbers and strings only."""
    return torch.load(path, weights_only=True)


class Guard:
    """Clips gradients and leaves out steps whose gradient is not finite or 20 times the usual one."""

    def __init__(self) -> None:
        self.usual: float | None = None
        self.left_out = 0

    def step(self, network: nn.Module, optimiser: torch.optim.Optimizer, limit: float = 1.0) -> None:
        """One step of the optimiser, or none."""
        norm = float(torch.nn.utils.clip_grad_norm_(network.parameters(), limit))
        if not math.isfinite(norm) or (self.usual and norm > 20 * self.usual):
            self.left_out += 1
            self.usual = self.usual * 1.02 if self.usual else None
        else:
            self.usual = norm if self.usual is None else 0.98 * self.usual + 0.02 * norm
            optimiser.step()
        optimiser.zero_grad()
