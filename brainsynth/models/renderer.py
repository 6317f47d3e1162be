"""A renderer: from a label map to an image in one step, by a local generator as a stage of the pyramid is one.

It sees the labels of each cell of 2 × 2 × 2 voxels as channels, noise, the cell's place and the covariates, and makes the
eight intensities. Everything global is in the label map.

Shapes: B batch, K context width, XYZ voxels. A class is background, 0, or the k-th structure of the label table.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from brainsynth.config.architectures import RendererArchitecture
from brainsynth.labels import LabelTable
from brainsynth.models.critic import LocalCritic
from brainsynth.models.device import in_float32, one_thread
from brainsynth.models.labeller import padded
from brainsynth.models.patch_autoencoder import space_to_depth
from brainsynth.models.pyramid import LocalGenerator, place_of
from brainsynth.models.sampling import draw_noise

CELL = 2
"""Voxels of a cell along each axis."""


def cells_of(classes_BXYZ: Tensor, count: int) -> Tensor:  # noqa: N803
    """(B, 8 * count, X/2, Y/2, Z/2): which class each voxel of a cell has, as 0 and 1."""
    cells = space_to_depth(classes_BXYZ[:, None], CELL).long()
    chosen = torch.zeros(*cells.shape[:2], count, *cells.shape[2:], device=cells.device)
    return chosen.scatter_(2, cells[:, :, None], 1.0).flatten(1, 2)


class Renderer(LocalGenerator):
    """Images (B, 1, X, Y, Z), not yet clipped, in the network's units of intensity. Axes are even."""

    def __init__(self, architecture: RendererArchitecture, classes: int, context_size: int) -> None:
        super().__init__(architecture, CELL**3 * classes, context_size)
        self.classes, self.intensity_scale = classes, architecture.intensity_scale

    def image(self, classes: Tensor, place: Tensor, context: Tensor, noise: Tensor) -> Tensor:
        """Of classes (B, X, Y, Z); places and noise are of cells. May be negative."""
        return self.finer(cells_of(classes, self.classes), place, context, noise)

    def forward(self, conditions: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
        """Images of crops, from fresh noise, for training."""
        made = []
        for classes, place, context in conditions:
            noise = torch.randn(len(place), self.noise, *place.shape[2:]).to(place)
            made.append(self.image(classes, place, context, noise))
        return made


class RendererCritic(LocalCritic):
    """`forward(volume_B1XYZ, classes_BXYZ, places, context)` → logits, features."""

    def __init__(self, width: int, classes: int, context_size: int) -> None:
        super().__init__(width, CELL**3 * classes, context_size)
        self.classes = classes

    def forward(
        self, volume: Tensor, classes: Tensor, place: Tensor, context: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As the class says."""
        return self.judged(volume, cells_of(classes, self.classes), place, context)


class MapRenderer:
    """Images of whole label maps. On a CPU an image follows from map, covariates and seed alone, not from the number of
    threads; always float32."""

    def __init__(self, network: Renderer, table: LabelTable, device: torch.device) -> None:
        if len(table.labels) + 1 != network.classes:
            raise ValueError(
                f"a network of {network.classes} classes for background and {len(table.labels)} structures"
            )
        self.network, self.class_of, self.device = network, table.class_of, device

    @torch.no_grad()
    def __call__(
        self, labels: npt.NDArray[np.uint8], context: npt.NDArray[np.float32], seed: int
    ) -> npt.NDArray[np.float32]:
        """(X, Y, Z) intensities in [0, 1] of an (X, Y, Z) label map and the covariates (K,)."""
        x, y, z = labels.shape
        classes = padded(torch.from_numpy(self.class_of[labels])[None, None], CELL)[:, 0].to(self.device)
        grid = [size // CELL for size in classes.shape[1:]]
        place = place_of(grid, (0.0, 0.0, 0.0), grid)[None].to(self.device)
        noise = draw_noise([seed], (self.network.noise, *grid)).to(self.device)
        code = torch.from_numpy(context)[None].to(self.device)
        with one_thread(), in_float32(self.device), torch.backends.cudnn.flags(allow_tf32=False):
            made = self.network.image(classes, place, code, noise)
        image = (made / self.network.intensity_scale).clamp(0, 1)[0, 0, :x, :y, :z]
        return image.cpu().contiguous().numpy()
