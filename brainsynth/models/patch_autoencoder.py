"""An autoencoder that starts as the best linear one: principal components of patches, and what is not linear learned on top.

A patch of f³ voxels becomes one latent cell. The encoder is linear: one convolution over the patches and their neighbours,
which begins as the projection on the patches' first principal components. So the latents are coefficients of image patches,
in order of their variance. The decoder is the transposed map plus a residual network at the latent grid, which begins at
zero and learns what neighbouring patches say about this one; depth to space makes the voxels. No convolution runs at full
resolution.

Shapes: B batch, C latent channels, XYZ latent cells, P = f³ voxels of a patch.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import silu

from brainsynth.config.architectures import PatchAutoencoderArchitecture

FOREGROUND = 0.02
"""A patch whose brightest voxel is below this is background, and has no say in the principal components."""


class PatchAutoencoder(nn.Module):
    """Images (B, 1, fX, fY, fZ) ⇄ latents (B, C, X, Y, Z). Its latents have no spread: sigma is zero."""

    def __init__(self, architecture: PatchAutoencoderArchitecture) -> None:
        super().__init__()
        self.patch, channels = architecture.patch, architecture.latent_channels
        voxels, width, groups = architecture.patch**3, architecture.width, architecture.norm_groups
        self.analysis = nn.Conv3d(voxels, channels, 3, padding=1, bias=False)
        self.synthesis = nn.Conv3d(channels, voxels, 3, padding=1, bias=False)
        self.residual = nn.Sequential(
            nn.Conv3d(channels, width, 3, padding=1),
            *(_Block(width, groups) for _ in range(architecture.blocks)),
            nn.GroupNorm(groups, width),
            nn.SiLU(),
            nn.Conv3d(width, voxels, 3, padding=1),
        )
        for parameter in self.residual[-1].parameters():
            nn.init.zeros_(parameter)

    def start_from(self, components_PC: Tensor) -> None:  # noqa: N803
        """Make it the linear autoencoder of orthonormal patch components (P, C)."""
        with torch.no_grad():
            for weight in (self.analysis.weight, self.synthesis.weight):
                weight.zero_()
            self.analysis.weight[:, :, 1, 1, 1] = components_PC.T
            self.synthesis.weight[:, :, 1, 1, 1] = components_PC

    def encode(self, x_B1XYZ: Tensor) -> tuple[Tensor, Tensor]:  # noqa: N803
        """Latents and their spread, which is zero."""
        mu: Tensor = self.analysis(space_to_depth(x_B1XYZ, self.patch))
        return mu, torch.zeros_like(mu)

    def decode(self, z_BCXYZ: Tensor) -> Tensor:  # noqa: N803
        """Images, not yet clipped."""
        return depth_to_space(self.synthesis(z_BCXYZ) + self.residual(z_BCXYZ), self.patch)

    def forward(self, x_B1XYZ: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: N803
        """Decoded images, latents, and their spread."""
        mu, sigma = self.encode(x_B1XYZ)
        return self.decode(mu), mu, sigma


class _Block(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), the identity at first."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(norm_groups, channels), nn.GroupNorm(norm_groups, channels)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))
        return out


def space_to_depth(x_BCXYZ: Tensor, patch: int) -> Tensor:  # noqa: N803
    """(B, P * C, X, Y, Z): the voxels of each patch as channels, X slowest, and within a voxel its channels."""
    batch, channels = x_BCXYZ.shape[:2]
    x, y, z = (size // patch for size in x_BCXYZ.shape[2:])
    split = x_BCXYZ.reshape(batch, channels, x, patch, y, patch, z, patch)
    return split.permute(0, 3, 5, 7, 1, 2, 4, 6).reshape(batch, patch**3 * channels, x, y, z)


def depth_to_space(p_BPXYZ: Tensor, patch: int) -> Tensor:  # noqa: N803
    """The inverse of `space_to_depth`."""
    batch, numbers, x, y, z = p_BPXYZ.shape
    split = p_BPXYZ.reshape(batch, patch, patch, patch, numbers // patch**3, x, y, z)
    return split.permute(0, 4, 5, 1, 6, 2, 7, 3).reshape(batch, numbers // patch**3, x * patch, y * patch, z * patch)


def principal_components(images_B1XYZ: Iterable[Tensor], patch: int, count: int) -> Tensor:  # noqa: N803
    """(P, count) orthonormal: the directions along which patches of foreground are largest, about zero, largest first.

    Each direction's sign is such that its numbers add up to more than zero, or the first of them is positive: the same
    images give the same directions.

    Raises:
        ValueError: the images have fewer patches of foreground than that.
    """
    products, number = torch.zeros(patch**3, patch**3, dtype=torch.float64), 0
    for image in images_B1XYZ:
        patches = space_to_depth(image, patch).flatten(2).movedim(1, 2).flatten(0, 1)
        foreground = patches[patches.amax(1) > FOREGROUND].double()
        products += foreground.T @ foreground
        number += len(foreground)
    if number < count:
        raise ValueError(f"{number} patches of foreground are too few for {count} principal components")
    components = torch.linalg.eigh(products)[1].flip(1)[:, :count]
    totals = components.sum(0)
    signs = torch.where(totals.abs() > 1e-6, totals.sign(), components[0].sign())
    directions: Tensor = (components * signs).float()
    return directions


def of_cells(conv: nn.Module, x_BXYZC: Tensor) -> Tensor:  # noqa: N803
    """A 1 × 1 × 1 convolution of (B, X, Y, Z, C): torch would copy channels-last tensors for it, twice."""
    assert isinstance(conv, nn.Conv3d)
    return functional.linear(x_BXYZC, conv.weight.flatten(1), conv.bias)
