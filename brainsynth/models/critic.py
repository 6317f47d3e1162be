"""The critics of local generators: does each place of a crop look like a scan's, given what the generator was given?"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d, leaky_relu

from brainsynth.models.patch_autoencoder import space_to_depth

_SLOPE = 0.2


class LocalCritic(nn.Module):
    """Logits of every coarse cell and of every 2³ cells of a volume.

    It looks at the children of each coarse cell as channels, so no convolution runs on the fine grid. `channels` of a cell
    are given as well, and `code_size` numbers that hold for the whole volume.
    """

    def __init__(self, width: int, channels: int, code_size: int) -> None:
        super().__init__()
        wider = width * 3 // 2
        self.shift, self.wider_shift = nn.Linear(code_size, width), nn.Linear(code_size, wider)
        self.first = nn.Conv3d(8 + channels + 4, width, 3, padding=1)
        self.second = nn.Conv3d(width, width, 3, padding=1)
        self.judge = nn.Conv3d(width, 1, 1)
        self.down = nn.Conv3d(width, wider, 2, stride=2)
        self.third = nn.Conv3d(wider, wider, 3, padding=1)
        self.fourth = nn.Conv3d(wider, wider, 3, padding=1)
        self.wider_judge = nn.Conv3d(wider, 1, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, _SLOPE)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def judged(self, volume: Tensor, given: Tensor, place: Tensor, code: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Two maps of logits, five of features."""
        shift, wider_shift = (layer(code)[:, :, None, None, None] * 0.1 for layer in (self.shift, self.wider_shift))
        children, means = space_to_depth(volume, 2), avg_pool3d(volume, 2)
        # Details are small next to intensities, and they are what the generator is judged by.
        seen = torch.cat([(children - means) * 4 + (children * 2 - 1) * 0.5, given, place], dim=1)
        a = leaky_relu(self.first(seen.contiguous(memory_format=torch.channels_last_3d)) + shift, _SLOPE)
        b = leaky_relu(self.second(a), _SLOPE)
        c = leaky_relu(self.down(b), _SLOPE)
        d = leaky_relu(self.third(c) + wider_shift, _SLOPE)
        e = leaky_relu(self.fourth(d), _SLOPE)
        return [self.judge(b), self.wider_judge(e)], [a, b, c, d, e]


class Critic(LocalCritic):
    """That of a pyramid's upsampler: `forward(volume_B1XYZ, coarse, level, places, context)` → logits, features."""

    def __init__(self, width: int, context_size: int) -> None:
        super().__init__(width, 1, context_size + 1)

    def forward(
        self, volume: Tensor, coarse: Tensor, level: Tensor, place: Tensor, context: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As the class says."""
        return self.judged(volume, coarse * 2 - 1, place, torch.cat([context, 5 * level[:, None]], dim=1))
