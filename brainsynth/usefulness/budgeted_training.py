"""One training of a small network with a fixed budget of steps, and its predictions; the same for every training set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from monai.losses.dice import DiceCELoss
from torch import nn
from torch.nn import functional

from brainsynth.errors import UserError
from brainsynth.models.small_networks import VolumeRegressor, VolumeSegmenter

F32 = npt.NDArray[np.float32]
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
    labels: F32
    """(N,) or (N, X, Y, Z)."""
    rows: npt.NDArray[np.intp] | None = None
    """Which of them; all if None."""

    def __len__(self) -> int:
        return len(self.volumes) if self.rows is None else len(self.rows)

    def subset(self, rows: npt.NDArray[np.intp]) -> Source:
        """Only these rows (of all volumes)."""
        return Source(self.volumes, self.labels, rows)

    def draw(self, rng: np.random.Generator, count: int) -> tuple[F32, F32]:
        """(count, X, Y, Z) standardised volumes, each once if there are enough, and their labels."""
        rows = np.arange(len(self.volumes)) if self.rows is None else self.rows
        taken = rng.choice(rows, count, replace=len(rows) < count)
        return standardised(np.stack([self.volumes[row] for row in taken])), self.labels[taken]


@dataclass(frozen=True, slots=True)
class TrainingBudget:
    """What one training may cost."""

    steps: int
    batch_size: int
    learning_rate: float
    """The peak of a one-cycle schedule (Smith & Topin 2019)."""
    weight_decay: float


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
) -> F32:
    """Train from scratch on equal shares of the sources in every batch, then predict.

    Args:
        task: `continuous`, `binary` or `segmentation`.
        test: (M, X, Y, Z) volumes.
        seed: of the first weights, the order of volumes, the augmentation. The caller's torch generator is left alone.

    Returns:
        (M,) values in the labels' unit, (M,) log odds, or (M, X, Y, Z) log odds.
    """
    mean, spread = 0.0, 1.0
    if task == "continuous":
        known = np.concatenate([s.labels if s.rows is None else s.labels[s.rows] for s in sources])
        mean, spread = float(known.mean()), max(float(known.std()), 1e-6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: nn.Module = VolumeSegmenter() if task == "segmentation" else VolumeRegressor()
        network.to(device).train()
        rng = np.random.default_rng([seed, 2])
        _train(network, task, sources, budget, rng, (mean, spread), device)
        _settle_batch_norm(network, sources, budget, rng, device)
    network.eval()
    outputs = []
    with torch.inference_mode():
        for start in range(0, len(test), budget.batch_size):
            batch = torch.from_numpy(standardised(test[start : start + budget.batch_size]))[:, None]
            out = network(batch.to(device))
            outputs.append((out[:, 0] if task == "segmentation" else out).float().cpu().numpy())
    predicted: F32 = np.concatenate(outputs) * np.float32(spread) + np.float32(mean)
    return predicted


def _train(
    network: nn.Module,
    task: str,
    sources: list[Source],
    budget: TrainingBudget,
    rng: np.random.Generator,
    scale: tuple[float, float],
    device: torch.device,
) -> None:
    optimiser = torch.optim.AdamW(network.parameters(), lr=budget.learning_rate, weight_decay=budget.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, budget.learning_rate, total_steps=budget.steps)
    dice = DiceCELoss(sigmoid=True)
    for _ in range(budget.steps):
        volumes, labels = _augmented(*_batch(sources, budget, rng), rng)
        out = network(torch.from_numpy(volumes)[:, None].to(device))
        if task == "segmentation":
            loss = dice(out, torch.from_numpy(labels)[:, None].to(device))
        elif task == "binary":
            loss = functional.binary_cross_entropy_with_logits(out, torch.from_numpy(labels).to(device))
        else:
            target = torch.from_numpy((labels - np.float32(scale[0])) / np.float32(scale[1]))
            loss = functional.mse_loss(out, target.to(device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


def _settle_batch_norm(
    network: nn.Module, sources: list[Source], budget: TrainingBudget, rng: np.random.Generator, device: torch.device
) -> None:
    """Statistics of batch normalisation under the last weights, from whole batches (Wu & Johnson 2021).

    The running averages of so short a training lag behind its weights, and shift every prediction.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.reset_running_stats()
            module.momentum = None  # a plain average
    with torch.no_grad():
        for _ in range(_SETTLING):
            network(torch.from_numpy(_batch(sources, budget, rng)[0])[:, None].to(device))


def _batch(sources: list[Source], budget: TrainingBudget, rng: np.random.Generator) -> tuple[F32, F32]:
    """Volumes and labels of one batch, equal shares of the sources."""
    drawn = [source.draw(rng, budget.batch_size // len(sources)) for source in sources]
    return np.concatenate([v for v, _ in drawn]), np.concatenate([labels for _, labels in drawn])


def _augmented(volumes: F32, labels: F32, rng: np.random.Generator) -> tuple[F32, F32]:
    """Half of the volumes mirrored at the midline, all shifted by up to a voxel; voxel labels go along."""
    flips = rng.random(len(volumes)) < 0.5
    shifts = rng.integers(-_SHIFT, _SHIFT + 1, (len(volumes), 3))

    def moved(arrays: F32) -> F32:
        turned = [a[::-1] if flip else a for a, flip in zip(arrays, flips, strict=True)]
        return np.stack([np.roll(a, s, (0, 1, 2)) for a, s in zip(turned, shifts, strict=True)])

    return moved(volumes), moved(labels) if labels.ndim == 4 else labels
