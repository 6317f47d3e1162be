"""An autoencoder without a learned encoder: latents are the volume itself, averaged; its decoder is a pyramid of generators.

Each stage doubles the grid in one step: it makes the 8 children of every coarse cell from the coarse volume, noise, the
cell's place and the covariates. A stage is local, some ten cells see each other, so a few hundred scans hold enough to
train it on crops, with a critic (training/pyramid.py). Everything global is left to the denoiser.

Shapes: B batch, K context width, XYZ coarse cells. A parent's children are in the order of `space_to_depth`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import silu

from brainsynth.config.architectures import PyramidArchitecture, RendererArchitecture, UpsamplerArchitecture
from brainsynth.models.patch_autoencoder import depth_to_space, of_cells
from brainsynth.models.sampling import draw_noise

DECODER_NOISE = 1 << 64
"""Streams of a row's noise from here on are the decoder's stages; no sampler has as many steps."""
_LEVEL_UNIT = 10.0


class PyramidAutoencoder(nn.Module):
    """Images (B, 1, fX, fY, fZ) ⇄ latents (B, 1, X, Y, Z), the mean of each cell. Their sigma is zero."""

    def __init__(self, architecture: PyramidArchitecture, context_size: int) -> None:
        super().__init__()
        self.factor, self.intensity_scale = architecture.factor, architecture.intensity_scale
        self.stages = nn.ModuleList(Upsampler(stage, context_size) for stage in architecture.stages)

    def encode(self, x_B1XYZ: Tensor) -> tuple[Tensor, Tensor]:  # noqa: N803
        """Latents and their spread, which is zero."""
        mu = functional.avg_pool3d(x_B1XYZ, self.factor)
        return mu, torch.zeros_like(mu)

    def decode(self, z_B1XYZ: Tensor, context_BK: Tensor, seeds: Sequence[int]) -> Tensor:  # noqa: N803
        """Images, not yet clipped, of latents, of what is known of each, and of the seed that its noise comes from.

        One sample at a time: no batch mate changes a rounding, and memory is that of one volume.
        """
        rows = zip(torch.split(z_B1XYZ, 1), torch.split(context_BK, 1), seeds, strict=True)
        return torch.cat([self._decode_one(*row) for row in rows])

    def _decode_one(self, z: Tensor, context: Tensor, seed: int) -> Tensor:
        volume = functional.relu(z * self.intensity_scale)
        for index, stage in enumerate(self.stages):
            assert isinstance(stage, Upsampler)
            noise = draw_noise([seed], (stage.noise, *volume.shape[2:]), DECODER_NOISE + index).to(volume)
            volume = functional.relu(stage(volume, volume.new_zeros(1), places(volume), context, noise))
        return volume / self.intensity_scale

    def forward(self, conditions: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
        """What each stage makes of its own crops, from fresh noise, for training; may be negative."""
        made = []
        for stage, (coarse, *rest) in zip(self.stages, conditions, strict=True):
            noise = torch.randn(len(coarse), stage.noise, *coarse.shape[2:]).to(coarse)  # type: ignore[call-overload]
            made.append(stage(coarse, *rest, noise))
        return made


class LocalGenerator(nn.Module):
    """What makes the 8 children of every coarse cell from what is known of the cell and of those around it.

    `channels` of a cell are given; `code_size` numbers say what holds for the whole volume. Untrained it makes zeros.
    """

    def __init__(
        self, architecture: UpsamplerArchitecture | RendererArchitecture, channels: int, code_size: int
    ) -> None:
        super().__init__()
        width, self.noise = architecture.width, architecture.noise
        self.embed = nn.Sequential(nn.Linear(code_size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.first = nn.Conv3d(channels + self.noise + 4, width, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(architecture.blocks))
        self.gain = nn.Parameter(torch.ones(width))
        self.last = nn.Conv3d(width, 8, 3, padding=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def finer(self, given: Tensor, place: Tensor, code: Tensor, noise: Tensor) -> Tensor:
        """(B, 1, 2X, 2Y, 2Z) of what is given (B, channels, X, Y, Z), places, code (B, code_size) and noise."""
        embedded = self.embed(code)
        seen = torch.cat([given, noise, place], dim=1)
        h = self.first(seen.contiguous(memory_format=torch.channels_last_3d))
        for block in self.blocks:
            h = block(h, embedded)
        return depth_to_space(self.last(silu(unit_power(h) * self.gain.view(1, -1, 1, 1, 1))).float(), 2)


class Upsampler(LocalGenerator):
    """`forward(coarse_B1XYZ, level_B, places_B4XYZ, context_BK, noise_BNXYZ)` → (B, 1, 2X, 2Y, 2Z).

    `level` is the SD of the noise that was added to the coarse volume. Untrained it repeats the coarse volume.
    """

    def __init__(self, architecture: UpsamplerArchitecture, context_size: int) -> None:
        super().__init__(architecture, 1, context_size + 1)

    def forward(self, coarse: Tensor, level: Tensor, place: Tensor, context: Tensor, noise: Tensor) -> Tensor:
        """As the class says."""
        code = torch.cat([context, _LEVEL_UNIT * level[:, None]], dim=1)
        details = self.finer(coarse * 2 - 1, place, code, noise)
        return functional.interpolate(coarse, scale_factor=2, mode="nearest") + details


class _Block(nn.Module):
    """A 3×3×3 convolution and two 1×1×1, scaled and shifted by the covariates, added; the identity at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spread = nn.Conv3d(width, width, 3, padding=1)
        self.modulation = nn.Linear(width, 2 * width)
        self.widen, self.narrow = nn.Conv3d(width, 2 * width, 1), nn.Conv3d(2 * width, width, 1)
        for parameter in (*self.narrow.parameters(), *self.modulation.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        scale, shift = self.modulation(code)[:, :, None, None, None].chunk(2, dim=1)
        h = silu(self.spread(unit_power(x)) * (1 + scale) + shift)
        inner = silu(of_cells(self.widen, h.permute(0, 2, 3, 4, 1)))
        added: Tensor = x + of_cells(self.narrow, inner).permute(0, 4, 1, 2, 3)
        return added


def unit_power(x: Tensor) -> Tensor:
    """Normalised over channels (root mean square); cells do not see each other."""
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5)


def places(coarse_B1XYZ: Tensor) -> Tensor:  # noqa: N803
    """(B, 4, X, Y, Z): where each cell of whole volumes is."""
    grid = coarse_B1XYZ.shape[2:]
    return place_of(grid, (0.0, 0.0, 0.0), grid).to(coarse_B1XYZ).expand(len(coarse_B1XYZ), -1, -1, -1, -1)


def place_of(shape: Sequence[int], origin: Sequence[float], grid: Sequence[int]) -> Tensor:
    """(4, X, Y, Z): x, |x|, y and z of the cells of a crop, from -1 to 1 over the whole grid."""
    axes = [(torch.arange(n) + o + 0.5) / full * 2 - 1 for n, o, full in zip(shape, origin, grid, strict=True)]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([x, x.abs(), y, z])
