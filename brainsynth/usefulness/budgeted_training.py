"""One training of a small network with a fixed budget of steps, and its predictions; the same for every training set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from monai.losses.dice import DiceCELoss
from torch import Tensor, nn
from torch.nn import functional

from brainsynth.errors import UserError
from brainsynth.models.device import layout
from brainsynth.models.small_networks import VolumeRegressor, VolumeSegmenter
from brainsynth.training.losses import label_losses
from brainsynth.usefulness.structures import Structures

F32 = npt.NDArray[np.float32]
Batch = tuple[F32, npt.NDArray[Any]]
"""(B, X, Y, Z) standardised volumes, and their labels."""
_SHIFT = 1  # voxels, along each axis, either way
_SETTLING = 20  # batches


class VolumeRows(Protocol):
    """(N, X, Y, Z) volumes: an array, a memory map, or whatever reads rows when they are asked for."""

    shape: tuple[int, ...]
    ndim: int

    def __len__(self) -> int: ...

    def __getitem__(self, place: Any) -> npt.NDArray[Any]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Volumes to learn from or to test on, with their labels."""

    volumes: VolumeRows
    """(N, X, Y, Z) intensities on any scale; rows are read when needed."""
    labels: F32 | VolumeRows
    """(N,) or (N, X, Y, Z); of several structures the class of each voxel, uint8."""
    rows: npt.NDArray[np.intp] | None = None
    """Which of them; all if None."""

    def __len__(self) -> int:
        return len(self.volumes) if self.rows is None else len(self.rows)

    def subset(self, rows: npt.NDArray[np.intp]) -> Source:
        """Only these rows (of all volumes)."""
        return Source(self.volumes, self.labels, rows)

    def draw(self, rng: np.random.Generator, count: int) -> Batch:
        """(count, X, Y, Z) standardised volumes, each once if there are enough, and their labels."""
        rows = np.arange(len(self.volumes)) if self.rows is None else self.rows
        taken = rng.choice(rows, count, replace=len(rows) < count)
        return standardised(np.stack([self.volumes[row] for row in taken])), np.stack(
            [self.labels[row] for row in taken]
        )


@dataclass(frozen=True, slots=True)
class TrainingBudget:
    """What one training may cost."""

    steps: int
    batch_size: int
    learning_rate: float
    """The peak of a one-cycle schedule (Smith & Topin 2019)."""
    weight_decay: float
    box_xyz: tuple[int, int, int] | None = None
    """Voxels of a random box that is seen of a volume with voxel labels; all by default."""


def standardised(volumes: npt.NDArray[Any]) -> F32:
    """(B, X, Y, Z) volumes with mean 0 and standard deviation 1 each, so that intensity scales do not matter.

    Raises UserError on NaN or Inf and on a blank volume.
    """
    x = np.asarray(volumes, np.float32)
    mean, spread = x.mean((1, 2, 3), keepdims=True), x.std((1, 2, 3), keepdims=True)
    if not np.isfinite(mean).all() or not np.isfinite(spread).all() or float(spread.min()) <= 1e-6:
        raise UserError("a volume is blank or has NaN or infinite voxels; leave it out and report how many were")
    out: F32 = (x - mean) / spread
    return out


def train_and_predict(
    task: str,
    sources: list[Source],
    test: VolumeRows,
    budget: TrainingBudget,
    seed: int,
    device: torch.device,
    structures: Structures | None = None,
) -> npt.NDArray[Any]:
    """Train from scratch on equal shares of the sources in every batch, then predict.

    Args:
        task: `continuous`, `binary`, `segmentation` or `structures`.
        test: (M, X, Y, Z) volumes.
        seed: of the first weights, the order of volumes, the augmentation. The caller's torch generator is left alone.
        structures: what the classes are, of the task `structures`.

    Returns:
        (M,) values in the labels' unit, (M,) log odds, (M, X, Y, Z) log odds, or (M, X, Y, Z) classes.
    """
    mean, spread = 0.0, 1.0
    if task == "continuous":
        known = np.concatenate([s.labels[slice(None) if s.rows is None else s.rows] for s in sources])
        mean, spread = float(known.mean()), max(float(known.std()), 1e-6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(task, structures).to(device).train()
        rng = np.random.default_rng([seed, 2])

        def draw(augment: bool) -> Batch:
            batch = _batch(sources, budget, rng)
            return _boxes(_augmented(batch, rng, structures) if augment else batch, budget.box_xyz, rng)

        _train(network, _loss(task, mean, spread), draw, budget, device)
        _settle_batch_norm(network, draw, device)
    network.eval()
    at_once = 1 if structures else budget.batch_size
    outputs = []
    with torch.inference_mode():
        for start in range(0, len(test), at_once):
            batch = torch.from_numpy(standardised(test[start : start + at_once]))[:, None]
            out = network(batch.to(device))
            if structures:
                out = out.argmax(1).byte()
            elif task == "segmentation":
                out = out[:, 0]
            outputs.append(out.cpu().numpy())
    predicted = np.concatenate(outputs)
    return predicted if structures else predicted * np.float32(spread) + np.float32(mean)


def _network(task: str, structures: Structures | None) -> nn.Module:
    if structures is not None:
        return layout(VolumeSegmenter(1 + len(structures.names)))
    return VolumeSegmenter() if task == "segmentation" else VolumeRegressor()


def _loss(task: str, mean: float, spread: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Of the network's output and the labels."""
    if task == "structures":
        return _structures_loss
    if task == "segmentation":
        dice = DiceCELoss(sigmoid=True)
        return lambda out, labels: dice(out, labels[:, None])
    if task == "binary":
        return functional.binary_cross_entropy_with_logits
    return lambda out, labels: functional.mse_loss(out, (labels - mean) / spread)


def _structures_loss(out: Tensor, classes: Tensor) -> Tensor:
    losses = label_losses(out.movedim(1, -1).flatten(0, -2), classes.flatten().long())
    return losses["cross_entropy"] + losses["dice_loss"]


def _train(
    network: nn.Module,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    draw: Callable[[bool], Batch],
    budget: TrainingBudget,
    device: torch.device,
) -> None:
    optimiser = torch.optim.AdamW(network.parameters(), lr=budget.learning_rate, weight_decay=budget.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, budget.learning_rate, total_steps=budget.steps)
    for _ in range(budget.steps):
        volumes, labels = draw(True)
        out = network(torch.from_numpy(volumes)[:, None].to(device))
        loss = loss_of(out, torch.from_numpy(labels).to(device))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()


def _settle_batch_norm(network: nn.Module, draw: Callable[[bool], Batch], device: torch.device) -> None:
    """Statistics of batch normalisation under the last weights, from whole batches (Wu & Johnson 2021).

    The running averages of so short a training lag behind its weights, and shift every prediction.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.reset_running_stats()
            module.momentum = None  # a plain average
    with torch.no_grad():
        for _ in range(_SETTLING):
            network(torch.from_numpy(draw(False)[0])[:, None].to(device))


def _batch(sources: list[Source], budget: TrainingBudget, rng: np.random.Generator) -> Batch:
    """Volumes and labels of one batch, equal shares of the sources."""
    drawn = [source.draw(rng, budget.batch_size // len(sources)) for source in sources]
    return np.concatenate([v for v, _ in drawn]), np.concatenate([labels for _, labels in drawn])


def _augmented(batch: Batch, rng: np.random.Generator, structures: Structures | None) -> Batch:
    """Half of the volumes mirrored at the midline, all shifted by up to a voxel; voxel labels go along.

    Structures change sides with the volume; where one has no other side, nothing is mirrored.
    """
    volumes, labels = batch
    flips = rng.random(len(volumes)) < 0.5
    if structures is not None:
        if structures.mirror is None:
            flips[:] = False
        else:
            labels = np.where(flips[:, None, None, None], structures.mirror[labels], labels)
    shifts = rng.integers(-_SHIFT, _SHIFT + 1, (len(volumes), 3))

    def moved(arrays: npt.NDArray[Any]) -> npt.NDArray[Any]:
        turned = [a[::-1] if flip else a for a, flip in zip(arrays, flips, strict=True)]
        return np.stack([np.roll(a, s, (0, 1, 2)) for a, s in zip(turned, shifts, strict=True)])

    return moved(volumes), moved(labels) if labels.ndim == 4 else labels


def _boxes(batch: Batch, box_xyz: tuple[int, int, int] | None, rng: np.random.Generator) -> Batch:
    """A random box of each volume and of its labels; whole volumes where a label is a number."""
    volumes, labels = batch
    if box_xyz is None or labels.ndim != 4:
        return batch
    sizes = np.minimum(box_xyz, volumes.shape[1:])
    starts = rng.integers(0, np.array(volumes.shape[1:]) - sizes + 1, (len(volumes), 3))
    boxes = [tuple(slice(s, s + n) for s, n in zip(start, sizes, strict=True)) for start in starts]
    inside, known = (np.stack([a[box] for a, box in zip(each, boxes, strict=True)]) for each in (volumes, labels))
    return inside, known
