"""A denoiser for small cohorts: what a Gaussian model of the latents knows in closed form, and a network for the rest.

Given covariates, latents are taken for Gaussian: a mean that is linear in the encoded covariates, and on request in their
products with one of them, and a covariance of low rank plus a diagonal. The best denoiser of such latents is a linear map
(the Wiener filter), exact at every noise level and fitted without training. Trained denoisers come close to it where there
is much noise (Wang & Vastola 2024, "The Unreasonable Effectiveness of Gaussian Score Approximation for Diffusion Models",
TMLR); here they start from it. The network sees the filter's estimate and predicts its error, in units of the standard
deviation that the Gaussian leaves open.

Shapes: B batch, C latent channels, XYZ latent cells, D = C X Y Z, L = D of the first channels (those with low-rank
covariance and products), R rank, K context width, P products.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from brainsynth.config.architectures import GaussianArchitecture
from brainsynth.models.device import in_float32

Products = tuple[tuple[int, int], ...]
"""Pairs of positions in the context; the first of each is the same."""
TIMESTEPS = 1000
GAUSSIAN = "gaussian.latents."
"""Beginning of the names, in a `Denoiser`, of what is fitted in closed form."""
ADDED = ("gaussian.network.finest_", f"{GAUSSIAN}product_map")
"""Beginnings of the names of what more `finest_blocks` and `crossed` add: blocks that are the identity at
first, and slopes that are 0."""
_WAVES = 16
_KEPT_BYTES = 64 << 20
_CLEAREST = 1e-3
"""Share of signal below which x_t counts as pure noise: log odds of the time stay finite."""


class GaussianLatents(nn.Module):
    """z given covariates ~ N(mean, U Uᵀ + diag(variance)), all in buffers; `training/gaussian_fit.py` fits them."""

    mean_map: Tensor
    """(K + 1, C, X, Y, Z): mean where nothing is known, then the slope of each number of the context."""
    product_map: Tensor
    """(P, first channels, X, Y, Z): the slope of each product; there if P is not 0."""
    asymmetry: Tensor
    """(1, or 2 with products, C, X, Y, Z): half of what the means of scans and of their mirror images differ by, and its
    slope along the covariate of the products. For training alone: it is in `mean_map`, and not among the weights."""
    factors: Tensor
    """(L, R): U, for the cells of the first channels."""
    variance: Tensor
    """(C, X, Y, Z): what the factors leave, at least 1e-4."""

    def __init__(
        self,
        shape_cxyz: tuple[int, int, int, int],
        context_size: int,
        rank: int,
        rank_channels: int,
        products: Products = (),
    ) -> None:
        super().__init__()
        cells = math.prod(shape_cxyz[1:])
        self.products = products
        self.register_buffer("mean_map", torch.zeros(context_size + 1, *shape_cxyz))
        if products:
            self.register_buffer("product_map", torch.zeros(len(products), rank_channels, *shape_cxyz[1:]))
        self.register_buffer("asymmetry", torch.zeros(2 if products else 1, *shape_cxyz), persistent=False)
        self.register_buffer("factors", torch.zeros(rank_channels * cells, rank))
        self.register_buffer("variance", torch.ones(shape_cxyz))
        self._kept: dict[tuple[float, torch.device, int, int], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy keeps nothing: its buffers restart their change counters, so kept values could be mistaken for its own."""
        return self.__dict__ | {"_kept": {}}

    def multiplied(self, context_BK: Tensor) -> Tensor:  # noqa: N803
        """(B, P): the products."""
        return torch.stack([context_BK[:, i] * context_BK[:, j] for i, j in self.products], dim=1)

    def sided(self, context_BK: Tensor) -> Tensor:  # noqa: N803
        """(B, 1 or 2): what the asymmetry depends on: 1, and the covariate of the products."""
        one = torch.ones_like(context_BK[:, :1])
        return torch.cat([one, context_BK[:, self.products[0][0], None]], 1) if self.products else one

    def mean(self, context_BK: Tensor, mirrored_B: Tensor | None = None) -> Tensor:  # noqa: N803
        """(B, C, X, Y, Z) of scans; of mirror images of scans where `mirrored_B` is true."""
        found = self.mean_map[0] + torch.einsum("bk,kcxyz->bcxyz", context_BK, self.mean_map[1:])
        if self.products:
            more = torch.einsum("bp,pcxyz->bcxyz", self.multiplied(context_BK), self.product_map)
            found = torch.cat([found[:, : more.shape[1]] + more, found[:, more.shape[1] :]], dim=1)
        if mirrored_B is None:
            return found
        apart = torch.einsum("bk,kcxyz->bcxyz", self.sided(context_BK), self.asymmetry)
        return found - 2 * mirrored_B.view(-1, 1, 1, 1, 1) * apart

    def posterior(self, x_BCXYZ: Tensor, time_B: Tensor, prior_BCXYZ: Tensor) -> tuple[Tensor, Tensor]:  # noqa: N803
        """Mean of z given x_t = (1 - t) z + t e, and the standard deviation that the diagonal part leaves open.

        With A = (1 - t)² diag(variance) + t² and B = (1 - t) U the mean is found by Woodbury's identity:
        (A + B Bᵀ)⁻¹ r = A⁻¹ r - A⁻¹ B (1 + Bᵀ A⁻¹ B)⁻¹ Bᵀ A⁻¹ r.
        """
        t = time_B.view(-1, 1, 1, 1, 1)
        a = 1 - t
        noisy_variance = a**2 * self.variance + t**2
        y = (x_BCXYZ - a * prior_BCXYZ) / noisy_variance
        covered = self.factors.shape[0] // math.prod(self.variance.shape[1:])
        along = (y[:, :covered].flatten(1) @ self.factors).double() * a.view(-1, 1)
        times = [0.5] * len(time_B) if time_B.is_meta else time_B.tolist()
        shrinkage = torch.stack([self._shrinkage(time) for time in times])
        weights = (along[:, None] @ shrinkage)[:, 0].float()  # also what z has of each factor
        of_factors = (weights @ self.factors.T).view_as(y[:, :covered])
        correction = a * of_factors / noisy_variance[:, :covered]
        y = torch.cat([y[:, :covered] - correction, y[:, covered:]], dim=1)
        estimate = prior_BCXYZ + a * self.variance * y
        estimate = torch.cat([estimate[:, :covered] + of_factors, estimate[:, covered:]], dim=1)
        return estimate, (self.variance * t**2 / noisy_variance).sqrt()

    def _shrinkage(self, time: float) -> Tensor:
        """(R, R) float64 (1 + Bᵀ A⁻¹ B)⁻¹, kept by time: sampling asks for the same few, training for a thousand at most."""
        key = (time, self.factors.device, self.factors._version, self.variance._version)
        if key not in self._kept:
            if (len(self._kept) + 1) * self.factors.shape[1] ** 2 * 8 > _KEPT_BYTES:
                self._kept.clear()
            length, rank = self.factors.shape
            precision = 1 / ((1 - time) ** 2 * self.variance + time**2).flatten()[:length]
            within = ((self.factors.T * precision) @ self.factors).double() * (1 - time) ** 2
            self._kept[key] = torch.linalg.inv(within + torch.eye(rank, dtype=torch.float64, device=within.device))
        return self._kept[key]


class GaussianDenoiser(nn.Module):
    """`forward(z_BCXYZ, t_B, context_BK)` → flow prediction e - z. Untrained it is the Wiener filter's."""

    def __init__(
        self,
        architecture: GaussianArchitecture,
        shape_cxyz: tuple[int, int, int, int],
        context_size: int,
        products: Products = (),
    ) -> None:
        super().__init__()
        channels = shape_cxyz[0]
        self.latents = GaussianLatents(
            shape_cxyz, context_size, architecture.rank, architecture.rank_channels, products
        )
        self.network_until = architecture.network_until
        self.guidance = 1.0
        """Factor of what the network adds; `models/loading.py` sets it to the architecture's `autoguidance`."""
        self.network = _ResidualUNet(architecture, 2 * channels, channels, shape_cxyz[1:], context_size)

    def forward(self, z_BCXYZ: Tensor, t_B: Tensor, context_BK: Tensor, mirrored_B: Tensor | None = None) -> Tensor:  # noqa: N803
        """As the class says; t runs from 0 to 999 and stands for the time (t + 1) / 1000.

        Args:
            mirrored_B: in training, true where z is of a scan's mirror image.
        """
        time = _time(t_B)
        noisy = time > self.network_until
        alone = not (torch.is_grad_enabled() or noisy.is_meta) and bool(noisy.all())
        with in_float32(z_BCXYZ.device), torch.no_grad():
            z = z_BCXYZ.float()
            prior = self.latents.mean(context_BK.float(), mirrored_B)
            estimate, spread = self.latents.posterior(z, time, prior)
            t = time.view(-1, 1, 1, 1, 1)
            if alone:
                return (z - estimate) / t
            surprise = (z - (1 - t) * estimate) / ((1 - t) ** 2 * self.latents.variance + t**2).sqrt()
        error = self.network(torch.cat([surprise, estimate], dim=1), time, context_BK)
        added = self.guidance * error.float().masked_fill(noisy.view_as(t), 0.0)
        flow: Tensor = (z - estimate - spread * added) / t
        return flow

    def expected_error(self, t_B: Tensor) -> Tensor:  # noqa: N803
        """(B,) squared error per number of the flow prediction that the Gaussian's diagonal part leaves open."""
        t, variance = _time(t_B).view(-1, 1, 1, 1, 1), self.latents.variance
        return (variance / ((1 - t) ** 2 * variance + t**2)).flatten(1).mean(1)


def _time(t_B: Tensor) -> Tensor:  # noqa: N803
    return (t_B.float() + 1) / TIMESTEPS


class _ResidualUNet(nn.Module):
    """A residual block a level and way (at the first level `finest_blocks`), two at the bottom.

    Time and covariates scale and shift inside each block.
    """

    def __init__(
        self,
        architecture: GaussianArchitecture,
        inputs: int,
        outputs: int,
        grid_xyz: tuple[int, int, int],
        context_size: int,
    ) -> None:
        super().__init__()
        widths, groups, embedding = architecture.channels, architecture.norm_groups, architecture.embedding
        self.embed = nn.Sequential(
            nn.Linear(2 * _WAVES + context_size, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU()
        )
        self.first = nn.Conv3d(inputs, widths[0], 3, padding=1)
        self.down = nn.ModuleList(nn.Conv3d(a, b, 2, stride=2) for a, b in itertools.pairwise(widths))
        self.up = nn.ModuleList(nn.ConvTranspose3d(b, a, 2, stride=2) for a, b in itertools.pairwise(widths))
        self.descending = nn.ModuleList(_Block(width, embedding, groups) for width in widths)
        self.ascending = nn.ModuleList(_Block(width, embedding, groups) for width in widths)
        more = architecture.finest_blocks - 1
        self.finest_down = nn.ModuleList(_Block(widths[0], embedding, groups) for _ in range(more))
        self.finest_up = nn.ModuleList(_Block(widths[0], embedding, groups) for _ in range(more))
        # Registered brains show the same anatomy at the same cell: every level below the first learns where it is.
        self.places = nn.ParameterList(
            torch.zeros(1, width, *(size >> level for size in grid_xyz))
            for level, width in enumerate(widths[1:], start=1)
        )
        self.norm = nn.GroupNorm(groups, widths[0])
        self.last = nn.Conv3d(widths[0], outputs, 3, padding=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, time_B: Tensor, context_BK: Tensor) -> Tensor:  # noqa: N803
        odds = torch.log(time_B / (1 - time_B).clamp(min=_CLEAREST))[:, None]
        waves = odds * torch.exp(torch.linspace(math.log(0.2), math.log(4.0), _WAVES, device=x.device))
        condition = self.embed(torch.cat([waves.sin(), waves.cos(), context_BK], dim=1))
        h = self.descending[0](self.first(x), condition)
        for block in self.finest_down:
            h = block(h, condition)
        kept = []
        for down, block, place in zip(self.down, self.descending[1:], self.places, strict=True):
            kept.append(h)
            h = block(down(h) + place, condition)
        for index in range(len(self.up) - 1, -1, -1):
            h = kept[index] + self.up[index](self.ascending[index + 1](h, condition))
        h = self.ascending[0](h, condition)
        for block in self.finest_up:
            h = block(h, condition)
        return self.last(silu(self.norm(h)))  # type: ignore[no-any-return]


class _Block(nn.Module):
    """Norm, convolution, norm, scale and shift by the condition, convolution, added; the identity at first."""

    def __init__(self, width: int, embedding: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, width), nn.GroupNorm(groups, width, affine=False)
        self.conv1, self.conv2 = (nn.Conv3d(width, width, 3, padding=1) for _ in range(2))
        self.modulation = nn.Linear(embedding, 2 * width)
        for parameter in (*self.conv2.parameters(), *self.modulation.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition)[:, :, None, None, None].chunk(2, dim=1)
        h = self.norm2(self.conv1(silu(self.norm1(x)))) * (1 + scale) + shift
        added: Tensor = x + self.conv2(silu(h))
        return added
