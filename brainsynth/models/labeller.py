"""A small 3D network that names the structures of a volume: a U-Net on cells of voxels.

A cell's voxels enter as channels and its labels leave as channels (space to depth and back), so that no convolution runs
at full resolution. Norms are over the channels of a cell: sums over space would depend on the number of threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from brainsynth.config.architectures import LabellerArchitecture
from brainsynth.labels import BACKGROUND
from brainsynth.models.device import in_float32, one_thread
from brainsynth.models.patch_autoencoder import depth_to_space, of_cells, space_to_depth

_ONEDNN_CHANNELS = 16
_WAVES = (1, 2, 4)
"""Half periods of the places, from one face of the grid to the other."""


class _Block(nn.Module):
    """x + mix(silu(conv(norm(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.conv = nn.Conv3d(channels, channels, 3, padding=1)
        self.mix = nn.Conv3d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)
        inner = functional.silu(self.conv(normed), inplace=True)
        return of_cells(self.mix, inner.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3).add_(x)


def _first(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """A 3 × 3 × 3 convolution of few channels. With zeros for more of them torch gives it to oneDNN: a third of the time."""
    more = (0, 0, 0, 0, 0, 0, 0, max(0, _ONEDNN_CHANNELS - x.shape[1]))
    x = functional.pad(x, more).contiguous(memory_format=torch.channels_last_3d)
    return functional.conv3d(x, functional.pad(conv.weight, more), conv.bias, padding=1)


class Labeller(nn.Module):
    """(B, 1, X, Y, Z) images in [0, 1] → class scores of every voxel, cell by cell."""

    def __init__(self, architecture: LabellerArchitecture, classes: int) -> None:
        super().__init__()
        self.cell, self.classes = architecture.cell, classes
        widths, blocks, voxels = architecture.channels, architecture.blocks, architecture.cell**3
        self.coarsest = architecture.cell << (len(widths) - 1)
        self.stem = nn.Conv3d(voxels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(_blocks(width, n) for width, n in zip(widths[:-1], blocks[:-1], strict=True))
        self.coarser = nn.ModuleList(nn.Conv3d(a, b, 2, stride=2) for a, b in itertools.pairwise(widths))
        self.place = nn.Conv3d(6 * len(_WAVES), widths[-1], 1)
        self.bottom = _blocks(widths[-1], blocks[-1])
        self.finer = nn.ModuleList(nn.ConvTranspose3d(b, a, 2, stride=2) for a, b in itertools.pairwise(widths))
        self.up = nn.ModuleList(_blocks(width, n) for width, n in zip(widths[:-1], blocks[:-1], strict=True))
        self.norm = nn.LayerNorm(widths[0])
        self.head = nn.ModuleList(
            [nn.Conv3d(widths[0], 2 * widths[0], 1), nn.Conv3d(2 * widths[0], voxels * classes, 1)]
        )

    def forward(self, image: Tensor, places: Tensor | None = None) -> Tensor:
        """(B, X / cell, …, cell³, classes) class scores of (B, 1, X, Y, Z) images whose axes are multiples of `coarsest`.

        The voxels of a cell are in the order of `space_to_depth`.

        Args:
            places: of the coarsest level, where the image is a box of a larger grid (see `places`).
        """
        x = _first(self.stem, space_to_depth(image, self.cell))
        skips = []
        for blocks, coarser in zip(self.down, self.coarser, strict=True):
            x = blocks(x)
            skips.append(x)
            x = coarser(x)
        x = x + self.place(grid_places(x.shape[2:]).to(x) if places is None else places)
        x = self.bottom(x)
        for blocks, finer, skip in zip(reversed(self.up), reversed(self.finer), reversed(skips), strict=True):
            x = blocks(finer(x) + skip)
        first, last = self.head
        hidden = functional.silu(of_cells(first, self.norm(x.permute(0, 2, 3, 4, 1))), inplace=True)
        scores = of_cells(last, hidden)
        return scores.view(*scores.shape[:-1], -1, self.classes)


class VolumeLabeller:
    """Label maps of volumes. On a CPU a map follows from its volume alone: not from others that are asked for with it, nor
    from the number of threads. Always float32: rounded scores would tie."""

    def __init__(self, network: Labeller, indices: Sequence[int], device: torch.device) -> None:
        if len(indices) + 1 != network.classes:
            raise ValueError(f"a network of {network.classes} classes for background and {len(indices)} structures")
        self.network, self.device = network, device
        self.indices = torch.tensor([BACKGROUND, *indices], dtype=torch.uint8, device=device)
        """The stored integer of each class."""

    def __call__(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """(B, X, Y, Z) label maps of (B, X, Y, Z) intensities in [0, 1]."""
        return np.stack([self._label(image) for image in images])

    @torch.no_grad()
    def _label(self, image: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        x, y, z = image.shape
        volume = padded(torch.from_numpy(np.ascontiguousarray(image))[None, None], self.network.coarsest)
        with one_thread(), in_float32(self.device), torch.backends.cudnn.flags(allow_tf32=False):
            scores = self.network(volume.to(self.device))
        labels = depth_to_space(self.indices[scores.max(-1).indices].movedim(-1, 1), self.network.cell)[
            0, 0, :x, :y, :z
        ]
        return labels.cpu().contiguous().numpy()


def _blocks(channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(_Block(channels) for _ in range(count)))


def padded(image: Tensor, multiple: int) -> Tensor:
    """(B, C, X, Y, Z) with zeros behind each axis up to a multiple."""
    x, y, z = image.shape[2:]
    return functional.pad(image, (0, -z % multiple, 0, -y % multiple, 0, -x % multiple))


def grid_places(cells_xyz: Sequence[int]) -> Tensor:
    """(1, 18, X, Y, Z) where each cell of a grid is: waves of one half to two periods along each axis.

    Brains of a cohort lie in one space, so the place says much about the structure.
    """
    axes = [(torch.arange(n) + 0.5) / n for n in cells_xyz]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    angles = torch.cat([places * (wave * torch.pi) for wave in _WAVES])
    return torch.cat([angles.sin(), angles.cos()])[None]
