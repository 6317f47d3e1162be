"""A renderer: from a label map to an image in one step, by a local generator as a stage of the pyramid is one.

It sees the labels of each cell of 2 × 2 × 2 voxels as channels, noise, the cell's place and the covariates, and makes the
eight intensities. Everything global is in the label map, or in the averages of an image that may be given as well.

Shapes: B batch, K context width, XYZ voxels. A class is background, 0, or the k-th structure of the label table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from brainsynth.config.architectures import RendererArchitecture
from brainsynth.config.training import Precision
from brainsynth.labels import LabelTable
from brainsynth.models.critic import LocalCritic
from brainsynth.models.device import autocast, in_float32, one_thread
from brainsynth.models.labeller import padded
from brainsynth.models.patch_autoencoder import space_to_depth
from brainsynth.models.pyramid import DECODER_NOISE, LocalGenerator, place_of
from brainsynth.models.sampling import draw_noise

LabelMaps = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.uint8]]
"""(B, X, Y, Z) intensities → label maps; a `VolumeLabeller` is one."""
CELL = 2
"""Voxels of a cell along each axis."""


def cells_of(classes_BXYZ: Tensor, count: int) -> Tensor:  # noqa: N803
    """(B, 8 * count, X/2, Y/2, Z/2): which class each voxel of a cell has, as 0 and 1."""
    cells = space_to_depth(classes_BXYZ[:, None], CELL).long()
    chosen = torch.zeros(*cells.shape[:2], count, *cells.shape[2:], device=cells.device)
    return chosen.scatter_(2, cells[:, :, None], 1.0).flatten(1, 2)


def seen_by(
    architecture: RendererArchitecture,
    classes_BXYZ: Tensor,  # noqa: N803
    count: int,
    coarse: Tensor | None = None,
    shown: Tensor | None = None,
) -> Tensor:
    """What networks are given of each cell: its labels, and where they take an image, its averages there, or zeros.

    Args:
        count: classes, background included.
        coarse: (B, 1, …) averages of images over `architecture.coarse` voxels.
        shown: (B,) 1 where they may be seen, else 0.
    """
    labels = cells_of(classes_BXYZ, count)
    if not architecture.coarse:
        return labels
    if coarse is None or shown is None:
        return torch.cat([labels, torch.zeros_like(labels[:, :2])], dim=1)
    there = shown.view(-1, 1, 1, 1, 1).expand(-1, 1, *labels.shape[2:])
    finer = functional.interpolate(coarse, size=labels.shape[2:], mode="trilinear", align_corners=False)
    return torch.cat([labels, (finer * 2 - 1) * there, there], dim=1)


def _channels(architecture: RendererArchitecture, count: int) -> int:
    return CELL**3 * count + (2 if architecture.coarse else 0)


class Renderer(LocalGenerator):
    """Images (B, 1, X, Y, Z), not yet clipped, in the network's units of intensity. Axes are multiples of `multiple`."""

    def __init__(self, architecture: RendererArchitecture, classes: int, context_size: int) -> None:
        super().__init__(architecture, _channels(architecture, classes), context_size)
        self.architecture, self.classes = architecture, classes
        self.multiple = max(CELL, architecture.coarse)

    def image(
        self,
        classes: Tensor,
        place: Tensor,
        context: Tensor,
        noise: Tensor,
        coarse: Tensor | None = None,
        shown: Tensor | None = None,
    ) -> Tensor:
        """Of classes (B, X, Y, Z), and what `seen_by` takes as well; places and noise are of cells. May be negative."""
        return self.finer(seen_by(self.architecture, classes, self.classes, coarse, shown), place, context, noise)

    def forward(self, conditions: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
        """Images of crops, from fresh noise, for training."""
        made = []
        for classes, place, context, *averages in conditions:
            noise = torch.randn(len(place), self.noise, *place.shape[2:]).to(place)
            made.append(self.image(classes, place, context, noise, *averages))
        return made


class RendererCritic(LocalCritic):
    """`forward(volume_B1XYZ, classes_BXYZ, places, context[, coarse, shown])` → logits, features."""

    def __init__(self, width: int, architecture: RendererArchitecture, classes: int, context_size: int) -> None:
        super().__init__(width, _channels(architecture, classes), context_size)
        self.architecture, self.classes = architecture, classes

    def forward(
        self, volume: Tensor, classes: Tensor, place: Tensor, context: Tensor, *averages: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As the class says."""
        return self.judged(volume, seen_by(self.architecture, classes, self.classes, *averages), place, context)


class MapRenderer:
    """Images of whole label maps. On a CPU an image follows from map, covariates and seed alone, not from the number of
    threads."""

    def __init__(
        self, network: Renderer, table: LabelTable, device: torch.device, precision: Precision = "float32"
    ) -> None:
        if len(table.labels) + 1 != network.classes:
            raise ValueError(
                f"a network of {network.classes} classes for background and {len(table.labels)} structures"
            )
        self.network, self.class_of, self.device, self.precision = network, table.class_of, device, precision

    def __call__(
        self,
        labels: npt.NDArray[np.uint8],
        context: npt.NDArray[np.float32],
        seed: int,
        image: npt.NDArray[np.float32] | None = None,
    ) -> npt.NDArray[np.float32]:
        """(X, Y, Z) intensities in [0, 1] of an (X, Y, Z) label map and the covariates (K,).

        Args:
            image: (X, Y, Z) intensities in [0, 1] of which contrast and bias field are taken.
        """
        return self._stripped(self._drawn(labels, context, seed, image), labels)

    def _stripped(self, image: npt.NDArray[np.float32], labels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """In place: without what is too dark for tissue around the brain, and without specks that this leaves."""
        edge, structure = self.network.architecture.edge, labels > 0
        if edge:
            image[~structure & (image < edge)] = 0
            image[~ndimage.binary_propagation(structure, mask=structure | (image > 0))] = 0
        return image

    @torch.no_grad()
    def _drawn(
        self,
        labels: npt.NDArray[np.uint8],
        context: npt.NDArray[np.float32],
        seed: int,
        image: npt.NDArray[np.float32] | None,
    ) -> npt.NDArray[np.float32]:
        network, (x, y, z) = self.network, labels.shape
        scale, coarse = network.architecture.intensity_scale, network.architecture.coarse
        classes = padded(torch.from_numpy(self.class_of[labels])[None, None], network.multiple)[:, 0].to(self.device)
        grid = [size // CELL for size in classes.shape[1:]]
        place = place_of(grid, (0.0, 0.0, 0.0), grid)[None].to(self.device)
        noise = draw_noise([seed], (network.noise, *grid), DECODER_NOISE).to(self.device)
        code = torch.from_numpy(context)[None].to(self.device)
        averages: list[Tensor] = []
        if image is not None and coarse:
            whole = padded(torch.from_numpy(image)[None, None], network.multiple).to(self.device)
            averages = [functional.avg_pool3d(whole * scale, coarse), torch.ones(1, device=self.device)]
        exactly = torch.backends.cudnn.flags(allow_tf32=False)
        with one_thread(), in_float32(self.device), autocast(self.device, self.precision), exactly:
            made = network.image(classes, place, code, noise, *averages)
        return (made / scale).clamp(0, 1)[0, 0, :x, :y, :z].cpu().contiguous().numpy()

    def remade(
        self, image: npt.NDArray[np.float32], label: LabelMaps, context: npt.NDArray[np.float32], seed: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
        """A decoded volume made again from the label map that `label` finds in it, with the share of the volume that the
        architecture keeps; and that map."""
        labels = label(image[None])[0]
        kept = np.float32(self.network.architecture.kept)
        made = kept * image + (1 - kept) * self._drawn(labels, context, seed, image)
        return self._stripped(made, labels), labels
