"""Exponential moving average of weights, kept in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Ema:
    """shadow ← d shadow + (1 - d) weight, with d = min(decay, (1 + n) / (10 + n)) so that a short run is averaged too."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.shadow = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Follow the module by one step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = [(self.shadow[name], tensor) for name, tensor in module.state_dict().items()]
        moving = [(mine, tensor.to(mine.dtype)) for mine, tensor in pairs if tensor.dtype.is_floating_point]
        # On a GPU a few launches, not one a tensor.
        torch._foreach_lerp_([mine for mine, _ in moving], [tensor for _, tensor in moving], 1 - decay)
        for mine, tensor in pairs:
            if not tensor.dtype.is_floating_point:
                mine.copy_(tensor)

    def state(self) -> dict[str, Tensor]:
        """The averaged weights, by name."""
        return self.shadow

    def load(self, state: dict[str, Tensor], updates: int) -> None:
        """Resume from a checkpoint."""
        if set(state) != set(self.shadow):
            raise ValueError("the averaged weights do not fit the network")
        for name, tensor in state.items():
            self.shadow[name].copy_(tensor)
        self.updates = updates
