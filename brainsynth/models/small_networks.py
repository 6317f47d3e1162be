"""Small standard 3D networks to learn a task from a cohort with a fixed budget: a classifier/regressor and a U-Net.

They are yardsticks, no contenders: the same network and budget for every training set, so that only the data differ.
"""

from __future__ import annotations

import torch
from monai.networks.nets.unet import UNet
from torch import nn
from torch.nn import functional

_STAGES = (16, 24, 32, 48)
_CELLS = (2, 3, 2)


class VolumeRegressor(nn.Module):
    """(B, 1, X, Y, Z) volume → (B,) number: four stages of convolution and pooling, then one linear layer.

    As the SFCN (Peng et al. 2021), with batch normalisation and few layers. Unlike it, the last maps are averaged over
    2 × 3 × 2 cells, not over the whole volume: aligned brains have their parts in fixed places. About 74,000 parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        inputs = 1
        for index, channels in enumerate(_STAGES):
            # A stride in place of the first pooling: full resolution costs most of the time and shows little more.
            stages += [
                nn.Conv3d(inputs, channels, 3, stride=1 if index else 2, padding=1, bias=False),
                nn.BatchNorm3d(channels),
                nn.ReLU(inplace=True),
            ]
            if index:
                stages.append(nn.MaxPool3d(2, ceil_mode=True))
            inputs = channels
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool3d(_CELLS)
        self.head = nn.Sequential(
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(inputs * _CELLS[0] * _CELLS[1] * _CELLS[2], 1)
        )

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """One number per volume: a standardised value, or log odds."""
        out: torch.Tensor = self.head(self.pool(self.stages(volume)))
        return out[:, 0]


class VolumeSegmenter(nn.Module):
    """(B, 1, X, Y, Z) volume → (B, C, X, Y, Z) scores: MONAI's U-Net.

    Of one structure the log odds, by about 28,000 parameters. Of several, background first, one stage deeper, by about
    130,000.
    """

    def __init__(self, classes: int = 1) -> None:
        super().__init__()
        channels = (8, 16, 32) if classes == 1 else (8, 16, 32, 64)
        self.multiple = 2 ** (len(channels) - 1)
        self.network = UNet(
            spatial_dims=3,
            in_channels=1,
            out_channels=classes,
            channels=channels,
            strides=(2,) * (len(channels) - 1),
            num_res_units=0,
            norm="batch",
        )

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """Scores per voxel. Axes are padded to a multiple of 4 or 8 for the halvings, and cropped again."""
        x, y, z = volume.shape[2:]
        beyond = (0, -z % self.multiple, 0, -y % self.multiple, 0, -x % self.multiple)
        padded = functional.pad(volume, beyond, mode="replicate")
        out: torch.Tensor = self.network(padded)
        return out[:, :, :x, :y, :z]
