"""A batch in pieces whose tensors all hold at most 2^30 numbers. Beyond 2^31 kernels of GPU libraries are wrong or missing,
some from 1.8e9 on (pytorch#163539); and a large volume keeps a GPU busy alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from monai.networks.nets.autoencoderkl import AutoencoderKL
from torch import Tensor, nn

MOST_NUMBERS = 2**30


def in_pieces(run: Callable[[Tensor], Tensor], x: Tensor, numbers: int) -> Tensor:
    """`run(x)`, on a GPU as many rows at a time as keep its tensors small enough; on a CPU size does no harm.

    Args:
        numbers: in the largest tensor of one row.
    """
    rows = len(x) if x.device.type == "cpu" else max(1, MOST_NUMBERS // numbers)
    return run(x) if rows >= len(x) else torch.cat([run(part) for part in torch.split(x, rows)])


def numbers_per_cell(network: nn.Module) -> int:
    """No tensor of an autoencoder holds more numbers for each latent cell: its widest layer, on the image's grid."""
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv3d | nn.ConvTranspose3d)]
    width = max((max(m.in_channels, m.out_channels) for m in convolutions), default=1)
    if not isinstance(network, AutoencoderKL):
        return width
    return width * math.prod(n for m in network.encoder.modules() if isinstance(m, nn.Conv3d) for n in m.stride)
