"""A light decoder that was trained to make a bundle's decoder's images from the same latents.

The bundle's own decoder spends most of its operations at full resolution; this one works on the latent grid, and a coarse
level or two above it, with more channels; depth to space (3D pixel shuffle, 1609.05158) makes the voxels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from monai.networks.blocks.upsample import SubpixelUpsample
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from brainsynth.config.architectures import AnyAutoencoderArchitecture, DecoderArchitecture


class _Block(nn.Module):
    """x + conv(silu(conv(silu(norm(x)))))."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(nn.functional.silu(self.norm(x)))
        out: Tensor = x + self.conv2(nn.functional.silu(inner))
        return out


class DistilledDecoder(nn.Module):
    """(B, C, X, Y, Z) latents z, whitened as the denoiser has them → (B, 1, fX, fY, fZ) images, not yet clipped.

    Raises:
        ValueError: the architecture's levels do not fit the autoencoder's factor f.
    """

    def __init__(self, architecture: DecoderArchitecture, autoencoder: AnyAutoencoderArchitecture) -> None:
        super().__init__()
        last = architecture.last_factor(autoencoder.factor)
        stages: list[nn.Module] = []
        width = autoencoder.latent_channels
        for level, (channels, blocks) in enumerate(zip(architecture.channels, architecture.blocks, strict=True)):
            if level:
                stages.append(SubpixelUpsample(3, width, channels, 2, apply_pad_pool=False))
            else:
                stages.append(nn.Conv3d(width, channels, 3, padding=1))
            stages += [_Block(channels, architecture.norm_groups) for _ in range(blocks)]
            width = channels
        stages += [nn.SiLU(), SubpixelUpsample(3, width, 1, last, apply_pad_pool=False)]
        self.stages = nn.Sequential(*stages)
        self.numbers_per_cell = max(
            max(channels * 8**level for level, channels in enumerate(architecture.channels)),
            (last * 2 ** (len(architecture.channels) - 1)) ** 3,
        )
        """In its largest tensor."""

    def forward(self, z_BCXYZ: Tensor) -> Tensor:  # noqa: N803
        """Images of latents."""
        images: Tensor = self.stages(z_BCXYZ)
        return images


def decode_flops(build: Callable[[], Callable[[Tensor], Tensor]], shape_cxyz: tuple[int, ...]) -> int:
    """Floating-point operations (2 per multiply-add) of one decode by what `build` makes; nothing is computed."""
    with torch.device("meta"):
        decode, z = build(), torch.empty((1, *shape_cxyz))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            decode(z)
    return int(counter.get_total_flops())
