"""The networks of the pyramid: a flow of whole brains at 8 mm, two local generators that double the grid, and their critic.

Attributes of modules have the names that stored checkpoints use.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from recipes.pyramid.data import Scans

CELLS = (20, 28, 20)
"""The grid at 8 mm."""
DETAIL = 0.12
"""SD of what 4 mm adds to 8 mm."""
LAST_TIME = 0.999
"""From here one step of the flow gives the posterior mean."""


def pool(volume: Tensor) -> Tensor:
    """Averages of 2×2×2."""
    return functional.avg_pool3d(volume, 2)


def shuffle(children: Tensor) -> Tensor:
    """(B, 8, X, Y, Z) → (B, 1, 2X, 2Y, 2Z)."""
    b, _, x, y, z = children.shape
    return children.view(b, 2, 2, 2, x, y, z).permute(0, 4, 1, 5, 2, 6, 3).reshape(b, 1, 2 * x, 2 * y, 2 * z)


def unshuffle(volume: Tensor) -> Tensor:
    """(B, 1, 2X, 2Y, 2Z) → (B, 8, X, Y, Z)."""
    b, _, x, y, z = volume.shape
    parts = volume.view(b, x // 2, 2, y // 2, 2, z // 2, 2).permute(0, 2, 4, 6, 1, 3, 5)
    return parts.reshape(b, 8, x // 2, y // 2, z // 2)


def coordinates(shape: Sequence[int], origin: Sequence[int], full: Sequence[int]) -> Tensor:
    """(4, X, Y, Z): x, |x|, y, z of a crop, in -1..1 of the full grid."""
    axes = [(torch.arange(n) + o + 0.5) / f * 2 - 1 for n, o, f in zip(shape, origin, full, strict=True)]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([x, x.abs(), y, z])


def places_of(coarse: Tensor) -> Tensor:
    """Coordinates of a whole grid for each volume of a batch."""
    shape = coarse.shape[2:]
    return coordinates(shape, (0, 0, 0), shape)[None].expand(len(coarse), -1, -1, -1, -1)


def sided(context: Tensor, side: float = 1.0) -> Tensor:
    """The context with its ninth number, which way round the scan is, where it is missing."""
    return torch.cat([context, torch.full((len(context), 1), side)], 1) if context.shape[1] == 8 else context


def rms(x: Tensor) -> Tensor:
    """Normalised over channels; cells do not see each other."""
    return x * torch.rsqrt((x * x).mean(1, keepdim=True) + 1e-5)


def channels_last(x: Tensor) -> Tensor:
    """In the order of memory that convolutions are fast in."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def waves(time: Tensor) -> Tensor:
    """Sines and cosines of the log odds of the time, 32 numbers."""
    frequencies = torch.exp(torch.linspace(math.log(0.2), math.log(4.0), 16))
    angles = torch.log(time / (1 - time).clamp(min=1e-3))[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


def embedding(numbers: int, hidden: int) -> nn.Sequential:
    """Two layers."""
    return nn.Sequential(nn.Linear(numbers, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())


def film(layer: nn.Linear, code: Tensor) -> tuple[Tensor, ...]:
    """Scale and shift of channels."""
    return layer(code)[:, :, None, None, None].chunk(2, 1)


def zeroed(*modules: nn.Module) -> None:
    """Initialise as zero."""
    for module in modules:
        for parameter in module.parameters():
            nn.init.zeros_(parameter)


def times(steps: int, shift: float) -> np.ndarray:
    """From LAST_TIME to 0, denser near noise where the shift is above 1."""
    grid = np.linspace(1, 0, steps + 1)
    grid = shift * grid / (1 + (shift - 1) * grid)
    grid[0] = LAST_TIME
    return grid


def adams_bashforth(x: Tensor, velocity: Tensor, h: float, previous: tuple[Tensor, float] | None) -> Tensor:
    """One step of second order; the first one is Euler's."""
    if previous is None:
        return x + h * velocity
    old, old_h = previous
    q = h / (2 * old_h)
    return x + h * ((1 + q) * velocity - q * old)


class LocalBlock(nn.Module):
    """One 3×3×3 convolution and two 1×1×1, modulated by the context."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.c = nn.Conv3d(width, width, 3, padding=1)
        self.film = nn.Linear(hidden, 2 * width)
        self.a = nn.Conv3d(width, 2 * width, 1)
        self.b = nn.Conv3d(2 * width, width, 1)
        zeroed(self.b, self.film)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """A residual."""
        scale, shift = film(self.film, code)
        hidden = functional.silu(self.c(rms(x)) * (1 + scale) + shift)
        return x + self.b(functional.silu(self.a(hidden)))


class LocalFlow(nn.Module):
    """Flow of the children of each 8 mm cell given the coarse volume; at LAST_TIME it is a generator in one step."""

    def __init__(self, width: int = 96, blocks: int = 5, context: int = 8, hidden: int = 96, gain: float = 1.0):
        super().__init__()
        self.gain = gain
        self.embed = embedding(33 + context, hidden)
        self.first = nn.Conv3d(8 + 1 + 4, width, 3, padding=1)
        self.blocks = nn.ModuleList(LocalBlock(width, hidden) for _ in range(blocks))
        self.last = nn.Conv3d(width, 8, 3, padding=1)
        zeroed(self.last)

    def forward(
        self, x: Tensor, time: Tensor, coarse: Tensor, level: Tensor, places: Tensor, context: Tensor
    ) -> Tensor:
        """The velocity: what a unit Gaussian would have, and the network's part."""
        code = self.embed(torch.cat([waves(time), level[:, None] * 10, context], 1))
        t = time.view(-1, 1, 1, 1, 1)
        norm = (t**2 + (1 - t) ** 2).sqrt()
        h = self.first(channels_last(torch.cat([x / norm, coarse * 2 - 1, places], 1)))
        for block in self.blocks:
            h = block(h, code)
        return x * (2 * t - 1) / norm**2 + self.last(functional.silu(rms(h) * self.gain)) / norm

    def one_step(self, coarse: Tensor, level: Tensor, places: Tensor, context: Tensor) -> Tensor:
        """A volume of twice the grid from fresh noise, for training; may be negative."""
        noise = torch.randn(len(coarse), 8, *coarse.shape[2:])
        time = torch.full((len(noise),), LAST_TIME)
        return shuffle((noise - self(noise, time, coarse, level, places, context)) * DETAIL + coarse)

    @torch.no_grad()
    def sample(self, coarse: Tensor, level: float, context: Tensor, steps: int = 1, seed: int = 0) -> Tensor:
        """Whole volumes at 4 mm."""
        batch = len(coarse)
        random = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, 8, *coarse.shape[2:], generator=random)
        levels, places, grid, previous = torch.full((batch,), level), places_of(coarse), times(steps, 1.5), None
        for i in range(steps):
            velocity = self(x, torch.full((batch,), float(grid[i])), coarse, levels, places, context)
            h = float(grid[i + 1] - grid[i])
            x, previous = adams_bashforth(x, velocity, h, previous), (velocity, h)
        return functional.relu(shuffle(x * DETAIL + coarse))


class LocalGenerator(nn.Module):
    """Children of each 4 mm cell in one step, from the coarse volume, noise, places and context."""

    def __init__(self, width: int = 64, blocks: int = 5, noise: int = 4, context: int = 8, hidden: int = 64):
        super().__init__()
        self.noise = noise
        self.embed = embedding(context + 1, hidden)
        self.first = nn.Conv3d(1 + noise + 4, width, 3, padding=1)
        self.blocks = nn.ModuleList(LocalBlock(width, hidden) for _ in range(blocks))
        self.last = nn.Conv3d(width, 8, 3, padding=1)
        zeroed(self.last)

    def forward(self, coarse: Tensor, level: Tensor, places: Tensor, context: Tensor, noise: Tensor) -> Tensor:
        """A volume of twice the grid; slightly below zero only in training."""
        code = self.embed(torch.cat([context, level[:, None] * 10], 1))
        x = self.first(channels_last(torch.cat([coarse * 2 - 1, noise, places], 1)))
        for block in self.blocks:
            x = block(x, code)
        base = functional.interpolate(coarse, scale_factor=2, mode="nearest")
        made = base + shuffle(self.last(functional.silu(rms(x))))
        return functional.leaky_relu(made, 0.1) if self.training else functional.relu(made)

    def one_step(self, coarse: Tensor, level: Tensor, places: Tensor, context: Tensor) -> Tensor:
        """A volume from fresh noise, for training."""
        return self(coarse, level, places, context, torch.randn(len(coarse), self.noise, *coarse.shape[2:]))

    @torch.no_grad()
    def sample(self, coarse: Tensor, level: float, context: Tensor, seed: int = 0) -> Tensor:
        """Whole volumes at 2 mm."""
        random = torch.Generator().manual_seed(seed)
        places, levels = places_of(coarse), torch.full((len(coarse),), level)
        noise = torch.randn(len(coarse), self.noise, *coarse.shape[2:], generator=random)
        return self(coarse, levels, places, context, noise)


class Critic(nn.Module):
    """Patch discriminator on the coarse grid: logits of each cell and of each 2×2×2 cells, and its features."""

    def __init__(self, width: int = 64, width2: int = 96, context: int = 8, conditional: bool = True):
        super().__init__()
        self.conditional = conditional
        self.a = nn.Conv3d(8 + 5, width, 3, padding=1)
        self.c = nn.Conv3d(width, width, 3, padding=1)
        self.h1 = nn.Conv3d(width, 1, 1)
        self.d = nn.Conv3d(width, width2, 2, stride=2)
        self.e = nn.Conv3d(width2, width2, 3, padding=1)
        self.f = nn.Conv3d(width2, width2, 3, padding=1)
        self.h2 = nn.Conv3d(width2, 1, 1)
        self.proj = nn.Linear(context + 1, width)
        self.proj2 = nn.Linear(context + 1, width2)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, 0.2)
                nn.init.zeros_(module.bias)

    def forward(
        self, volume: Tensor, coarse: Tensor, level: Tensor, places: Tensor, context: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Two maps of logits, five of features."""
        code = torch.cat([context, level[:, None] * 5], 1)
        shift, shift2 = (layer(code)[:, :, None, None, None] * 0.1 for layer in (self.proj, self.proj2))
        leaky = lambda x: functional.leaky_relu(x, 0.2)  # noqa: E731
        children = unshuffle(volume)
        detail = (children - pool(volume)) * 4 + (children * 2 - 1) * 0.5
        seen = coarse if self.conditional else 0 * coarse
        a = leaky(self.a(channels_last(torch.cat([detail, seen * 2 - 1, places], 1))) + shift)
        c = leaky(self.c(a))
        d = leaky(self.d(c))
        e = leaky(self.e(d) + shift2)
        f = leaky(self.f(e))
        return [self.h1(c), self.h2(f)], [a, c, d, e, f]


class Mean(nn.Module):
    """Ridge mean and SD at 8 mm by cohort, given the context with its side."""

    maps: Tensor
    sd: Tensor
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("maps", torch.zeros(2, 6, 1, *CELLS))
        self.register_buffer("sd", torch.ones(2, 1, *CELLS))
        self.register_buffer("mask", torch.zeros(1, *CELLS))

    @staticmethod
    def design(context: Tensor) -> Tensor:
        """One, sex, age, volumes, side."""
        return torch.cat([torch.ones(len(context), 1), context[:, 1:5], context[:, 8:]], 1)

    def fit(self, scans: Scans, contexts: Tensor, ridge: float = 3.0) -> None:
        """On training scans, each also mirrored."""
        rows, volumes = scans.rows("train"), []
        for row in rows:
            volume = scans.volume(row)
            volumes += [functional.avg_pool3d(v, 4)[0] for v in (volume, volume.flip(2).roll(1, 2))]
        cells = torch.stack(volumes)
        numbers = sided(contexts[rows].repeat_interleave(2, 0))
        numbers[1::2, 8] = -1
        penalty = torch.eye(6) * ridge
        penalty[0, 0] = 0
        for j, cohort in enumerate((-1.0, 1.0)):
            mine = numbers[:, 0] == cohort
            design, values = self.design(numbers[mine]), cells[mine].flatten(1)
            weights = torch.linalg.solve(design.T @ design + penalty, design.T @ values)
            self.maps[j] = weights.view(6, *cells.shape[1:])
            sd = (values - design @ weights).std(0).view(cells.shape[1:])
            self.sd[j] = (functional.avg_pool3d(sd[None], 3, 1, 1)[0] * 0.5 + sd * 0.5).clamp(min=0.02)
        filled = (cells.mean((0, 1)) > 0.01).float()
        self.mask[:] = functional.max_pool3d(filled[None, None], 3, 1, 1)[0]

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and SD."""
        cohort = (context[:, 0] > 0).long()
        return torch.einsum("bk,bkcxyz->bcxyz", self.design(context), self.maps[cohort]), self.sd[cohort]


class NormBlock(nn.Module):
    """Two convolutions with group norms, modulated by time and context."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.n = nn.GroupNorm(8, width)
        self.c1 = nn.Conv3d(width, width, 3, padding=1)
        self.m = nn.GroupNorm(8, width, affine=False)
        self.c2 = nn.Conv3d(width, width, 3, padding=1)
        self.film = nn.Linear(hidden, 2 * width)
        zeroed(self.c2, self.film)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """A residual."""
        scale, shift = film(self.film, code)
        hidden = self.m(self.c1(functional.silu(self.n(x)))) * (1 + scale) + shift
        return x + self.c2(functional.silu(hidden))


class UNet(nn.Module):
    """Of whole brains at 8 mm, with a learned map of places at each coarser level."""

    xyz: Tensor

    def __init__(
        self,
        width: tuple[int, ...] = (48, 96, 128),
        blocks: tuple[int, ...] = (2, 2, 1),
        hidden: int = 128,
        context: int = 9,
    ):
        super().__init__()
        levels = len(width)

        def stack(i: int) -> nn.ModuleList:
            return nn.ModuleList(NormBlock(width[i], hidden) for _ in range(blocks[i]))

        self.embed = embedding(32 + context, hidden)
        self.first = nn.Conv3d(2 + 4, width[0], 3, padding=1)
        self.d = nn.ModuleList(stack(i) for i in range(levels))
        self.u = nn.ModuleList(stack(i) for i in range(levels - 1))
        pairs = list(itertools.pairwise(width))
        self.down = nn.ModuleList(nn.Conv3d(fine, coarse, 2, stride=2) for fine, coarse in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose3d(coarse, fine, 2, stride=2) for fine, coarse in pairs)
        self.place = nn.ParameterList(torch.zeros(1, width[i], *(n >> i for n in CELLS)) for i in range(1, levels))
        self.norm = nn.GroupNorm(8, width[0])
        self.last = nn.Conv3d(width[0], 1, 3, padding=1)
        zeroed(self.last)
        self.register_buffer("xyz", coordinates(CELLS, (0, 0, 0), CELLS)[None])

    def forward(self, r: Tensor, mean: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """Down, and up again."""
        code = self.embed(torch.cat([waves(time), context], 1))
        places = self.xyz.expand(len(r), -1, -1, -1, -1)
        x = self.first(channels_last(torch.cat([r, mean * 2 - 1, places], 1)))
        kept = []
        for i, level in enumerate(self.d):
            if i:
                kept.append(x)
                x = self.down[i - 1](x) + self.place[i - 1]
            for block in level:  # type: ignore[attr-defined]
                x = block(x, code)
        for i in reversed(range(len(self.u))):
            x = kept[i] + self.up[i](x)
            for block in self.u[i]:  # type: ignore[attr-defined]
                x = block(x, code)
        return self.last(functional.silu(self.norm(x)))


class WholeFlow(nn.Module):
    """Flow of residuals of the mean over the SD; the network adds to what independent unit cells would have."""

    def __init__(self, width: tuple[int, ...] = (48, 96, 128), blocks: tuple[int, ...] = (2, 2, 1)):
        super().__init__()
        self.mean = Mean()
        self.net = UNet(width, blocks)

    def forward(self, r: Tensor, mean: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """The velocity."""
        t = time.view(-1, 1, 1, 1, 1)
        norm = (t**2 + (1 - t) ** 2).sqrt()
        return r * (2 * t - 1) / norm**2 + self.net(r / norm, mean, time, context) / norm

    @torch.no_grad()
    def sample(self, context: Tensor, steps: int = 12, seed: int = 0, shift: float = 3.0) -> Tensor:
        """Whole volumes at 8 mm."""
        context = sided(context)
        mean, sd = self.mean(context)
        random = torch.Generator().manual_seed(seed)
        r = torch.randn(mean.shape, generator=random) * self.mean.mask
        grid, previous = times(steps, shift), None
        for i in range(steps):
            velocity = self(r, mean, torch.full((len(context),), float(grid[i])), context) * self.mean.mask
            h = float(grid[i + 1] - grid[i])
            r, previous = adams_bashforth(r, velocity, h, previous), (velocity, h)
        return functional.relu(mean + sd * r * self.mean.mask)

    def loss(self, cells: Tensor, context: Tensor, time: Tensor, noise: Tensor) -> Tensor:
        """Of each volume: squared error inside the mask, in units of what independent cells leave open."""
        mean, sd = self.mean(context)
        r, t, mask = (cells - mean) / sd, time.view(-1, 1, 1, 1, 1), self.mean.mask
        error = (self((1 - t) * r + t * noise, mean, time, context) - (noise - r)) ** 2 * mask
        return error.sum((1, 2, 3, 4)) / mask.sum() * (time * time + (1 - time) ** 2)


CONFIGURATION = {
    "coarse": {"width": (48, 96, 128), "blocks": (2, 2, 1)},
    "mid": {"width": 96, "blocks": 5, "gain": (64 / 96) ** 0.5},
    "fine": {"width": 64, "blocks": 5},
}


def build(stage: str) -> nn.Module:
    """The network of a stage, untrained."""
    kinds = {"coarse": WholeFlow, "mid": LocalFlow, "fine": LocalGenerator}
    network = kinds[stage](**CONFIGURATION[stage])  # type: ignore[arg-type]
    inner = network.net if isinstance(network, WholeFlow) else network
    inner.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return network


@torch.no_grad()
def widen(network: LocalFlow, narrow: dict[str, Tensor], w: int) -> None:
    """Weights of a LocalFlow of width w into a wider one that computes the same.

    New channels of the stream are zero and new hidden ones are not read; rms then divides by a smaller mean, which `gain`
    and the factor on `c.weight` undo.
    """
    wide = network.first.weight.shape[0]
    for name, value in network.state_dict().items():
        old = narrow[name]
        kind = name.split(".", 2)[2] if name.startswith("blocks") else name
        if kind.startswith(("first", "last.weight", "film", "b.")):
            value.zero_()
        if kind.startswith(("embed", "last.bias")):
            value.copy_(old)
        elif kind.startswith("first") or kind in ("c.bias", "b.bias"):
            value[:w] = old
        elif kind == "last.weight":
            value[:, :w] = old
        elif kind == "c.weight":
            value[:w, :w] = old * (w / wide) ** 0.5
        elif kind.startswith("film"):
            value[:w], value[wide : wide + w] = old[:w], old[w:]
        elif kind == "a.weight":
            value[: 2 * w, :w], value[: 2 * w, w:] = old, 0
        elif kind == "a.bias":
            value[: 2 * w] = old
        elif kind == "b.weight":
            value[:w, : 2 * w] = old
