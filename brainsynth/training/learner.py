"""A network in training, with its averaged weights and its optimizer."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from monai.networks.nets.autoencoderkl import AutoencoderKL
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from brainsynth.config.training import OptimisationConfig
from brainsynth.training.ema import Ema
from brainsynth.training.loop import Worker
from brainsynth.training.state import TrainingState

N = TypeVar("N", bound=nn.Module)
LossOf = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""Parts of a batch → their mean loss, and what else is logged, by name."""


class Learner(Generic[N]):
    """The network that a training is about, on one worker."""

    def __init__(self, network: N, worker: Worker, options: OptimisationConfig, weight_decay: float = 0.0) -> None:
        self.network, self.gradient_clip, self.micro_batch = network, options.gradient_clip, worker.micro_batch
        self.parallel = worker.parallel(network)
        """The network whose gradients are averaged over workers."""
        self.average = Ema(network, options.ema_decay)
        self.optimizer = adamw(network, options.learning_rate, weight_decay)
        self.optimizer.param_groups[0]["lr_factor"] = 1.0

    def update(self, loss: Tensor) -> Tensor:
        """One step down the loss; returns the norm of the gradient before it was clipped."""
        norm = descend(loss, self.network, self.optimizer, self.gradient_clip)
        self.average.update(self.network)
        return norm

    def update_in_parts(self, batch: Sequence[Tensor], loss_of: LossOf) -> dict[str, Tensor]:
        """One step down the mean loss over a batch, of which a micro-batch is in memory at a time.

        Returns the loss, what `loss_of` names, and the norm of the gradient before it was clipped.
        """
        values = descend_in_parts(self.parallel, self.optimizer, self.gradient_clip, self.split(*batch), loss_of)
        self.average.update(self.network)
        return values

    def split(self, *batch: Tensor) -> list[tuple[Tensor, ...]]:
        """The micro-batches of a batch."""
        rows = self.micro_batch or len(batch[0])
        return list(zip(*(torch.split(tensor, rows) for tensor in batch), strict=True))

    def averaged(self) -> N:
        """A copy of the network with averaged weights, in evaluation mode."""
        network = copy.deepcopy(self.network)
        network.load_state_dict(self.average.state())
        return network.requires_grad_(False).eval()

    def state(self, name: str) -> TrainingState:
        """All that a step changes, where this network is the only one."""
        return TrainingState({name: self.network}, {name: self.average}, {name: self.optimizer})


def adamw(
    network: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.AdamW:
    """The optimizer; on a GPU one kernel for all weights."""
    parameters = list(network.parameters())
    fused = parameters[0].device.type != "cpu"
    return torch.optim.AdamW(parameters, learning_rate, betas, weight_decay=weight_decay, fused=fused or None)


def descend(loss: Tensor, network: nn.Module, optimizer: torch.optim.Optimizer, gradient_clip: float) -> Tensor:
    """One step of the optimizer; returns the norm of the gradient before it was clipped."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(network.parameters(), gradient_clip)
    optimizer.step()
    return norm


def descend_in_parts(
    parallel: nn.Module,
    optimizer: torch.optim.Optimizer,
    gradient_clip: float,
    parts: Sequence[tuple[Tensor, ...]],
    loss_of: LossOf,
) -> dict[str, Tensor]:
    """One step of the optimizer down the mean loss over parts of a batch; workers exchange gradients at the last part."""
    optimizer.zero_grad(set_to_none=True)
    total = sum(len(part[0]) for part in parts)
    sums: dict[str, Tensor] = {}
    for number, part in enumerate(parts, start=1):
        silent = number < len(parts) and isinstance(parallel, DistributedDataParallel)
        with parallel.no_sync() if silent else contextlib.nullcontext():  # type: ignore[operator]
            values = _gradients(loss_of, part, len(part[0]) / total)
        sums = {name: sums.get(name, 0.0) + value for name, value in values.items()}
    sums["gradient_norm"] = nn.utils.clip_grad_norm_(parallel.parameters(), gradient_clip)
    optimizer.step()
    return sums


def _gradients(loss_of: LossOf, part: tuple[Tensor, ...], share: float) -> dict[str, Tensor]:
    """Add those of a part; returns its share of each value, and keeps nothing of its graph."""
    loss, named = loss_of(*part)
    (loss * share).backward()  # type: ignore[no-untyped-call]
    return {name: share * value.detach() for name, value in {"loss": loss, **named}.items()}


def recompute(network: nn.Module) -> None:
    """Keep of each block of an autoencoder its input alone; the backward pass computes the rest again, block by block."""
    if isinstance(network, AutoencoderKL):
        coders: list[Any] = [network.encoder, network.decoder]
        for block in [block for coder in coders for block in coder.blocks]:
            block.forward = functools.partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Any], *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)  # no block draws numbers
