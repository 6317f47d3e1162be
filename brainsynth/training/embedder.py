"""Trains the embedder on real scans without labels, so that it cannot distinguish the scans it saw from those it did not.

A network that learns to distinguish the training scans treats them unlike new ones, and an audit calibrated on new scans is
then wrong about them. So the persons here are invented: every step warps and blends random scans so strongly that the
result is nobody, and takes two slightly changed pictures of it (moved, turned, mirrored, warped a little, blurred, noisy,
another gamma). The two must be near, all other invented persons of the step far: the contrastive loss of SimCLR (Chen et
al. 2020, equation 1). No scan appears as itself.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from brainsynth.errors import UserError
from brainsynth.models.embedder import Embedder
from brainsynth.progress import in_minutes
from brainsynth.records import record
from brainsynth.training.warping import blur

log = logging.getLogger(__name__)

_TEMPERATURE = 0.1
_CONTROL_MM = 24.0  # between the control points of a warp
_IDENTITY_WARP_MM, _VIEW_WARP_MM = 16.0, 4.0
_SHIFT_MM, _TURN_DEGREES = 8.0, 8.0
_BLUR_FWHM_MM, _NOISE, _GAMMA = 6.0, 0.05, (0.7, 1.4)
_WARMUP = 10
PROGRESS_EVERY_S = 15.0


@record
class EmbedderTraining:
    """How the embedder is trained."""

    steps: int = 300
    identities: int = 24
    """Invented persons a step, two pictures of each."""
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.identities < 2 or self.learning_rate <= 0:
            raise ValueError("an embedder needs steps >= 1, identities >= 2 and a learning_rate above 0")


def train_embedder(
    scans: npt.NDArray[np.floating],
    spacing_mm: tuple[float, float, float],
    config: EmbedderTraining,
    device: torch.device,
    report: Callable[[int, float], None] | None = None,
) -> Embedder:
    """Train on (n, X, Y, Z) scans on the working grid, intensities in [0, 1]; minutes on two cores.

    The same scans, config and device give the same weights. `report` takes the step and its loss.

    Raises:
        UserError: fewer than two scans, values that are not finite, or a loss that is not.
    """
    if scans.ndim != 4 or len(scans) < 2 or not np.isfinite(scans).all():
        raise UserError(f"an embedder needs (n >= 2, X, Y, Z) finite scans to train on, not shape {scans.shape}")
    torch.manual_seed(config.seed)
    rng = torch.Generator().manual_seed(config.seed)
    embedder = Embedder().to(device).train()
    optimizer = torch.optim.AdamW(embedder.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    began = shown = time.monotonic()
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config.steps)
        chosen = torch.randint(len(scans), (2 * config.identities,), generator=rng).numpy()
        drawn = torch.from_numpy(scans[chosen].astype(np.float32)).to(device)
        one, other = drawn.chunk(2)
        persons = invent(one, other, spacing_mm, rng)
        first, second = picture(persons, spacing_mm, rng), picture(persons, spacing_mm, rng)
        loss = contrastive_loss(*embedder(torch.cat([first, second])).chunk(2))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        value = loss.item()
        if not math.isfinite(value):
            raise UserError(f"the loss of the embedder is not finite at step {step}: lower its learning_rate")
        if report:
            report(step, value)
        now = time.monotonic()
        if now - shown >= PROGRESS_EVERY_S:
            shown, rate = now, (step + 1) / (now - began)
            left_s = (config.steps - step - 1) / rate
            log.info(
                "embedder: step %d/%d  %.2f steps/s  ETA %s  loss %.3f",
                step + 1,
                config.steps,
                rate,
                in_minutes(left_s),
                value,
            )
    log.info("embedder trained: %d steps, last loss %.3f", config.steps, value)
    return embedder.requires_grad_(False).eval()


def contrastive_loss(first: Tensor, second: Tensor, temperature: float = _TEMPERATURE) -> Tensor:
    """NT-Xent of (B, d) unit vectors, row i of either being two pictures of one person (Chen et al. 2020, equation 1)."""
    both = torch.cat([first, second])
    likeness = both @ both.T / temperature
    likeness = likeness.masked_fill(torch.eye(len(both), dtype=torch.bool, device=both.device), -torch.inf)
    partner = torch.arange(len(both), device=both.device).roll(len(first))
    return functional.cross_entropy(likeness, partner)


def invent(first: Tensor, second: Tensor, spacing_mm: tuple[float, ...], rng: torch.Generator) -> Tensor:
    """(B, X, Y, Z) persons who do not exist: two scans, each strongly warped, blended with 0 to 50 % of the second."""
    share = 0.5 * torch.rand(len(first), 1, 1, 1, generator=rng).to(first.device)
    still = torch.zeros(len(first), 3)
    bent = [_move(scan, still, still, _IDENTITY_WARP_MM, spacing_mm, rng) for scan in (first, second)]
    return (1 - share) * bent[0] + share * bent[1]


def picture(persons: Tensor, spacing_mm: tuple[float, ...], rng: torch.Generator) -> Tensor:
    """(B, X, Y, Z) the same persons imaged again: pose, small warp, mirror, blur, gamma and noise drawn for each."""
    count = len(persons)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=rng)

    device = persons.device
    turn = uniform(-_TURN_DEGREES, _TURN_DEGREES, 3) * math.pi / 180
    images = _move(persons, turn, uniform(-_SHIFT_MM, _SHIFT_MM, 3), _VIEW_WARP_MM, spacing_mm, rng)
    images = torch.where((uniform(0, 1, 1, 1, 1) < 0.5).to(device), images.flip(1), images)
    blurred = blur(images, _BLUR_FWHM_MM / 2.3548, spacing_mm)
    images = torch.lerp(images, blurred, uniform(0, 1, 1, 1, 1).to(device))
    gamma = torch.exp(uniform(math.log(_GAMMA[0]), math.log(_GAMMA[1]), 1, 1, 1)).to(device)
    noise = torch.randn(images.shape, generator=rng).to(device) * uniform(0, _NOISE, 1, 1, 1).to(device)
    return (images.clamp_min(0) ** gamma + noise).clamp(0, 1)


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to 0."""
    return min(1.0, (step + 1) / _WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _move(
    images: Tensor,
    turn: Tensor,
    shift_mm: Tensor,
    warp_mm: float,
    spacing_mm: tuple[float, ...],
    rng: torch.Generator,
) -> Tensor:
    """Turn (B, 3) rad and shift (B, 3) about the centre, and a smooth random warp that moves no voxel beyond warp_mm."""
    count, *shape = images.shape
    size = torch.tensor(shape) * torch.tensor(spacing_mm)
    x, y, z = turn.T
    zero = torch.zeros_like(x)
    turned = torch.linalg.matrix_exp(torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], 1).view(-1, 3, 3))
    half = size / 2
    # grid_sample's axes run backwards, from -1 to 1 between the outer faces.
    theta = torch.cat([(turned * half / half[:, None]).flip((1, 2)), (shift_mm / half).flip(1)[:, :, None]], 2)
    grid = functional.affine_grid(theta, [count, 1, *shape], align_corners=False)
    control = torch.randn(count, 3, *(max(2, round(float(s) / _CONTROL_MM)) for s in size), generator=rng)
    field = functional.interpolate(control, size=tuple(shape), mode="trilinear", align_corners=False)
    reach = field.square().sum(1).amax((1, 2, 3)).sqrt()  # norm() takes twenty times as long
    amplitude = warp_mm * torch.rand(count, generator=rng) / reach.clamp_min(1e-6)
    field = (field * amplitude[:, None, None, None, None]).movedim(1, -1) / half
    grid = (grid + field.flip(-1)).to(images.device)
    return functional.grid_sample(images[:, None], grid, align_corners=False)[:, 0]
