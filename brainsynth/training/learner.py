"""A network in training, with its averaged weights and its optimizer."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from brainsynth.config.training import OptimisationConfig
from brainsynth.training.ema import Ema
from brainsynth.training.loop import Worker
from brainsynth.training.state import TrainingState

N = TypeVar("N", bound=nn.Module)


class Learner(Generic[N]):
    """The network that a training is about, on one worker."""

    def __init__(self, network: N, worker: Worker, options: OptimisationConfig, weight_decay: float = 0.0) -> None:
        self.network, self.gradient_clip = network, options.gradient_clip
        self.parallel = worker.parallel(network)
        """The network whose gradients are averaged over workers."""
        self.average = Ema(network, options.ema_decay)
        self.optimizer = torch.optim.AdamW(network.parameters(), options.learning_rate, weight_decay=weight_decay)
        self.optimizer.param_groups[0]["lr_factor"] = 1.0

    def update(self, loss: Tensor) -> Tensor:
        """One step down the loss; returns the norm of the gradient before it was clipped."""
        norm = descend(loss, self.network, self.optimizer, self.gradient_clip)
        self.average.update(self.network)
        return norm

    def averaged(self) -> N:
        """A copy of the network with averaged weights, in evaluation mode."""
        network = copy.deepcopy(self.network)
        network.load_state_dict(self.average.state())
        return network.requires_grad_(False).eval()

    def state(self, name: str) -> TrainingState:
        """All that a step changes, where this network is the only one."""
        return TrainingState({name: self.network}, {name: self.average}, {name: self.optimizer})


def descend(loss: Tensor, network: nn.Module, optimizer: torch.optim.Optimizer, gradient_clip: float) -> Tensor:
    """One step of the optimizer; returns the norm of the gradient before it was clipped."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(network.parameters(), gradient_clip)
    optimizer.step()
    return norm
