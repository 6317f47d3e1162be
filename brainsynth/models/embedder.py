"""A small 3D network that gives every T1w volume 128 numbers: near for pictures of one brain, far for different brains.

Trained on demand on the user's own real scans, without labels (`brainsynth.training.embedder`). No weights are shipped.
The same numbers serve the memorisation audit as a second space, and Fréchet distance and KID as features where no
pretrained network is given: say then that the features are this network's, since such figures depend on it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from brainsynth.models.weights import load_weights, save_weights

EMBEDDING_SIZE = 128
_CHANNELS = (16, 32, 64, 64, 128)
_STRIDES = (2, 2, 1, 2, 1)
_GROUPS = 8
_CELLS = 2
_BATCH = 16


class Embedder(nn.Module):
    """Five convolutions, then the means of eight boxes, standardised, then one linear layer. Any grid of 16³ or more.

    A volume and its mirror image have one embedding, the mean of both, so left-right flips need not be learned.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 1
        for channels, stride in zip(_CHANNELS, _STRIDES, strict=True):
            layers += [nn.Conv3d(inputs, channels, 3, stride, padding=1), nn.GroupNorm(_GROUPS, channels), nn.SiLU()]
            inputs = channels
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(_CELLS), nn.Flatten())
        width = inputs * _CELLS**3
        # Brains are so alike that raw features point all one way; centred per batch, they have something to learn from.
        self.head = nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, EMBEDDING_SIZE))

    def forward(self, volumes: Tensor) -> Tensor:
        """(B, X, Y, Z) intensities, any scale → (B, 128) vectors of unit length."""
        mean = volumes.mean((1, 2, 3), keepdim=True)
        spread = volumes.std((1, 2, 3), keepdim=True)
        images = ((volumes - mean) / (spread + 1e-6))[:, None]
        both = self.features(images) + self.features(images.flip(2))
        return functional.normalize(self.head(both / 2), dim=1)

    @torch.inference_mode()
    def embed(self, volumes: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """(B, X, Y, Z) float32 volumes on the 4 mm working grid, RAS+ → (B, 128) float32 of unit length."""
        device = next(self.parameters()).device
        parts = [
            self(torch.from_numpy(np.ascontiguousarray(volumes[start : start + _BATCH], np.float32)).to(device)).cpu()
            for start in range(0, len(volumes), _BATCH)
        ]
        return np.asarray(torch.cat(parts).numpy()) if parts else np.empty((0, EMBEDDING_SIZE), np.float32)


def save_embedder(embedder: Embedder, path: Path) -> str:
    """Write the weights as safetensors; returns the file's sha256."""
    return save_weights(embedder, path)


def load_embedder(path: Path, device: torch.device) -> Embedder:
    """The network with the weights of a safetensors file, ready to embed.

    Raises:
        UserError: the file is missing or damaged, or is of another network.
    """
    embedder = Embedder()
    load_weights(embedder, path)
    embedder.requires_grad_(False).eval().to(device)
    return embedder
