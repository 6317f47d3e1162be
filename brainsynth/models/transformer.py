"""A diffusion transformer on latents: patches as tokens, covariates and time by adaLN-zero (DiT, 2212.09748), in 3D.

Positions are fixed sines and cosines per axis, added to the tokens once. Registered brains show the same anatomy at the same
cell, so it is the absolute place that tells a token what it is; rotary embeddings carry distances only, and would have to
rediscover the place from the border of the grid in every layer.

Shapes: B batch, C latent channels, XYZ latent cells, N tokens (patches, X slowest), W width, H heads, K context width.
"""

from __future__ import annotations

import torch
from monai.networks.nets.diffusion_model_unet import get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional

from brainsynth.config.architectures import TransformerArchitecture

TIME_FREQUENCIES = 256


class DiffusionTransformer(nn.Module):
    """`forward(z_BCXYZ, t_B, context_BK)` → prediction_BCXYZ. Untrained it answers zero, and each block is the identity.

    The latent grid must be a multiple of the patch. Under autocast, tokens and norms stay float32 between the linear maps.
    """

    def __init__(self, architecture: TransformerArchitecture, latent_channels: int, context_size: int) -> None:
        super().__init__()
        width, self.patch_xyz = architecture.width, architecture.patch_xyz
        x, y, z = self.patch_xyz
        numbers = latent_channels * x * y * z
        self.embed = nn.Linear(numbers, width)
        self.time = _mlp(TIME_FREQUENCIES, width, width, nn.SiLU())
        self.covariates = _mlp(context_size, width, width, nn.SiLU())
        self.blocks = nn.ModuleList(
            _Block(width, architecture.heads, architecture.mlp_ratio) for _ in range(architecture.depth)
        )
        self.final = _AdaptiveNorm(width, 2)
        self.head = nn.Linear(width, numbers)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        zero = [self.head, *(m.modulation for m in self.modules() if isinstance(m, _AdaptiveNorm))]
        for linear in zero:
            nn.init.zeros_(linear.weight)

    def forward(self, z_BCXYZ: Tensor, t_B: Tensor, context_BK: Tensor) -> Tensor:  # noqa: N803
        """As the class says; the context may be all zero, which is the null context."""
        patches, grid_xyz = patchify(z_BCXYZ, self.patch_xyz)
        condition = self.time(get_timestep_embedding(t_B, TIME_FREQUENCIES)) + self.covariates(context_BK)
        tokens = self.embed(patches).float() + positions(grid_xyz, self.embed.out_features, z_BCXYZ.device)
        for block in self.blocks:
            tokens = block(tokens, condition)
        normed, _ = self.final(tokens, condition)
        return unpatchify(self.head(normed), self.patch_xyz, grid_xyz)


class _AdaptiveNorm(nn.Module):
    """Layer norm whose shift and scale (and a gate for what follows, with three parts) are linear in the condition."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, parts * width)
        self.parts = parts

    def forward(self, tokens: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, W), condition (B, W) → normed tokens, and the last part (the gate) as (B, 1, W)."""
        shift, scale, *gate = self.modulation(functional.silu(condition))[:, None].chunk(self.parts, dim=-1)
        return self.norm(tokens) * (1 + scale) + shift, gate[0] if gate else shift


class _Block(nn.Module):
    """Self-attention, then an MLP, each behind an adaptive norm and added through a gate that starts at zero."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1, self.attention = _AdaptiveNorm(width, 3), Attention(width, heads)
        self.norm2, self.mlp = _AdaptiveNorm(width, 3), _mlp(width, mlp_ratio * width, width, nn.GELU("tanh"))

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        normed, gate = self.norm1(tokens, condition)
        tokens = tokens + gate * self.attention(normed)
        normed, gate = self.norm2(tokens, condition)
        out: Tensor = tokens + gate * self.mlp(normed)
        return out


class Attention(nn.Module):
    """Multi-head self-attention over all tokens, by torch's fused kernel."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, W) → (B, N, W)."""
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out


def _mlp(inputs: int, hidden: int, outputs: int, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), activation, nn.Linear(hidden, outputs))


def patchify(z_BCXYZ: Tensor, patch_xyz: tuple[int, int, int]) -> tuple[Tensor, tuple[int, int, int]]:  # noqa: N803
    """Tokens (B, N, C * cells of a patch), and how many patches lie along each axis."""
    x, y, z = (cells // patch for cells, patch in zip(z_BCXYZ.shape[2:], patch_xyz, strict=True))
    batch, channels = z_BCXYZ.shape[:2]
    px, py, pz = patch_xyz
    split = z_BCXYZ.reshape(batch, channels, x, px, y, py, z, pz)
    return split.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3), (x, y, z)


def unpatchify(tokens: Tensor, patch_xyz: tuple[int, int, int], grid_xyz: tuple[int, int, int]) -> Tensor:
    """The inverse of `patchify`: (B, C, X, Y, Z)."""
    split = tokens.reshape(len(tokens), *grid_xyz, -1, *patch_xyz)  # B x y z C px py pz
    return split.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)


def positions(grid_xyz: tuple[int, int, int], width: int, device: torch.device | None = None) -> Tensor:
    """(N, W) float32: a third of the numbers for each axis, cosines and sines as of time steps in 2006.11239."""
    sizes = [width // 3 + (axis < width % 3) for axis in range(3)]
    at = torch.meshgrid(*(torch.arange(n, device=device) for n in grid_xyz), indexing="ij")
    return torch.cat([get_timestep_embedding(a.flatten(), size) for a, size in zip(at, sizes, strict=True)], dim=1)
