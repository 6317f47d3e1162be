"""The autoencoder, with the latent whitening inside, so that decode cannot forget it: MONAI's `AutoencoderKL`, the linear
one of patches with a residual decoder (patch_autoencoder.py), or averages and a pyramid of generators (pyramid.py).

Three spaces: images x in [0, 1], raw latents (mu, sigma) of the network, and latents z = (raw - shift) * scale, which the
denoiser sees. Shapes: B batch, C latent channels, XYZ voxels in RAS+ order. Raw latents run along the network's own axes,
which may be flipped against RAS+.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from monai.networks.nets.autoencoderkl import AutoencoderKL
from torch import Tensor, nn

from brainsynth.bundle.spec import LatentSpec
from brainsynth.config.architectures import (
    AnyAutoencoderArchitecture,
    PatchAutoencoderArchitecture,
    PyramidArchitecture,
)
from brainsynth.models.device import in_float32
from brainsynth.models.patch_autoencoder import PatchAutoencoder
from brainsynth.models.pieces import in_pieces, numbers_per_cell
from brainsynth.models.pyramid import PyramidAutoencoder

if TYPE_CHECKING:
    from brainsynth.models.distilled_decoder import DistilledDecoder

Network = AutoencoderKL | PatchAutoencoder | PyramidAutoencoder


def build_autoencoder(architecture: AnyAutoencoderArchitecture, context_size: int = 0) -> Network:
    """The network with fresh weights: `encode` gives mean and sigma, `decode` images.

    `context_size`: numbers that the covariates become; a pyramid's decoder sees them, the others do not.
    """
    if isinstance(architecture, PyramidArchitecture):
        return PyramidAutoencoder(architecture, context_size)
    if isinstance(architecture, PatchAutoencoderArchitecture):
        return PatchAutoencoder(architecture)
    levels = len(architecture.channels)
    return AutoencoderKL(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        channels=architecture.channels,
        latent_channels=architecture.latent_channels,
        num_res_blocks=architecture.num_res_blocks,
        norm_num_groups=architecture.norm_groups,
        attention_levels=(False,) * levels,
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    )


class Autoencoder(nn.Module):
    """The trained network together with its latent shift and scale, and its axes that run against RAS+."""

    def __init__(self, network: Network, latents: LatentSpec, flipped_axes: Sequence[int] = ()) -> None:
        super().__init__()
        self.network = network
        self._numbers = numbers_per_cell(network)
        self.flipped = [2 + axis for axis in flipped_axes]
        self.distilled: DistilledDecoder | None = None
        """Decodes in place of the network's own decoder where it is set."""
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.tensor(latents.shift).view(1, -1, 1, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(latents.scale).view(1, -1, 1, 1, 1), persistent=False)

    @property
    def rounds(self) -> bool:
        """Whether the network's own decoder computes in bfloat16 where that is asked for."""
        return not isinstance(self.network, PatchAutoencoder | PyramidAutoencoder)

    def encode(self, x_B1XYZ: Tensor) -> Tensor:  # noqa: N803
        """Mean latents z_BCXYZ of images in [0, 1]."""
        mu: Tensor = self.network.encode(x_B1XYZ.flip(self.flipped))[0]
        return (mu - self.shift) * self.scale

    def decode(
        self,
        z_BCXYZ: Tensor,  # noqa: N803
        context_BK: Tensor | None = None,  # noqa: N803
        seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """Images x_B1XYZ, float32, clipped to [0, 1]. NaN stays NaN, so that it is noticed downstream.

        Autoencoders of patches and pyramids decode in float32 always: black background is a sum of terms that cancel, and
        in bfloat16 what is left of it shows. Only a pyramid draws noise and looks at covariates.

        Args:
            context_BK: the encoded covariates, which a pyramid must have.
            seeds: of each row's noise; None for reconstructions, which all have the same.
        """
        decoded: Tensor
        cells = math.prod(z_BCXYZ.shape[2:])
        if self.distilled is not None:
            decoded = in_pieces(self.distilled, z_BCXYZ, cells * self.distilled.numbers_per_cell)
        else:
            with contextlib.nullcontext() if self.rounds else in_float32(z_BCXYZ.device):
                raw = z_BCXYZ / self.scale + self.shift
                if isinstance(self.network, PyramidAutoencoder):
                    if context_BK is None:
                        raise ValueError("a pyramid decodes with the covariates of each row")
                    decoded = self.network.decode(raw, context_BK, [0] * len(raw) if seeds is None else seeds)
                else:
                    decoded = in_pieces(self.network.decode, raw, cells * self._numbers)
        return decoded.float().clamp(0.0, 1.0).flip(self.flipped)
