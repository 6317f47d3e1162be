"""The feature network of the field's published 3D Fréchet distances: MedicalNet's ResNet-50 (Chen, Ma & Zheng 2019).

The weights (`resnet_50_23dataset.pth` of the authors, MIT licence) are not part of this package; the user names the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from monai.networks.nets.resnet import ResNet, ResNetBottleneck
from torch import Tensor, nn

from brainsynth.errors import UserError
from brainsynth.models.weights import read_tensors

FEATURES = 2048
_LAYERS, _PLANES = [3, 4, 6, 3], [64, 128, 256, 512]
_PREFIX = "module."
"""Before every key of the authors' file, which holds a data-parallel network."""


class MedicalNet(nn.Module):
    """(B, X, Y, Z) volumes → (B, 2048) means of the last maps, as the authors' segmentation encoder computes them.

    Voxels of each volume are standardised first (mean 0, standard deviation 1), as for training. MONAI's network has the
    same weights but other strides: the authors' halves three times only, and dilates in the last two stages instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = ResNet(
            ResNetBottleneck, _LAYERS, _PLANES, n_input_channels=1, conv1_t_stride=2, feed_forward=False,
            bias_downsample=False,
        )  # fmt: skip
        stages: tuple[tuple[Any, int], ...] = ((self.network.layer3, 2), (self.network.layer4, 4))
        for stage, dilation in stages:
            for block in stage:
                block.conv2.stride = (1,) * 3
                block.conv2.dilation = block.conv2.padding = (dilation,) * 3
            stage[0].downsample[0].stride = (1,) * 3

    def forward(self, volumes: Tensor) -> Tensor:
        """Intensities on any scale; axes in any one order, the same for all that is compared."""
        mean, spread = volumes.mean((1, 2, 3), keepdim=True), volumes.std((1, 2, 3), keepdim=True)
        out: Tensor = self.network(((volumes - mean) / (spread + 1e-6))[:, None])
        return out


def load_medicalnet(path: Path, device: torch.device) -> MedicalNet:
    """The network with the weights of the authors' .pth file, or of a safetensors file of the same keys.

    Nothing in the file is executed (tensors only), and every key and shape must be the network's.

    Raises:
        UserError: the file is missing or damaged, holds more than tensors, or is of another network.
    """
    state = {key.removeprefix(_PREFIX): value for key, value in read_tensors(path).items()}
    network = MedicalNet()
    try:
        network.network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        problems = str(error).split("\n\t")[1:] or [str(error)]
        raise UserError(
            f"{path} does not hold the weights of MedicalNet's ResNet-50 ({'; '.join(problems)[:400]}); its authors call "
            "the file resnet_50_23dataset.pth"
        ) from None
    network.requires_grad_(False).eval().to(device)
    return network
