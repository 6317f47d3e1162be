"""The denoiser: MONAI's `DiffusionModelUNet`, conditioned as in the paper, by concatenation and by cross-attention.

Shapes: B batch, C latent channels, K context width, XYZ latent cells. The context (see covariates.py) is appended as K
constant channels and given as one cross-attention token.
"""

from __future__ import annotations

import torch
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor, nn

from brainsynth.config.training import DiffusionArchitecture


class Denoiser(nn.Module):
    """`forward(z_BCXYZ, t_B, context_BK)` → prediction_BCXYZ (epsilon, v or flow, as trained)."""

    def __init__(self, architecture: DiffusionArchitecture, latent_channels: int, context_size: int) -> None:
        super().__init__()
        self.unet = DiffusionModelUNet(
            spatial_dims=3,
            in_channels=latent_channels + context_size,
            out_channels=latent_channels,
            channels=architecture.channels,
            attention_levels=architecture.attention,
            num_res_blocks=architecture.num_res_blocks,
            norm_num_groups=architecture.norm_groups,
            num_head_channels=tuple(
                (architecture.head_channels or channels) if attention else 0
                for channels, attention in zip(architecture.channels, architecture.attention, strict=True)
            ),
            resblock_updown=architecture.resblock_updown,
            transformer_num_layers=architecture.transformer_layers,
            upcast_attention=architecture.upcast_attention,
            with_conditioning=True,
            cross_attention_dim=context_size,
        )

    def forward(self, z_BCXYZ: Tensor, t_B: Tensor, context_BK: Tensor) -> Tensor:  # noqa: N803
        """Args: z, t in [0, 1000) as the time embedding expects, and the encoded covariates."""
        planes = context_BK[:, :, None, None, None].expand(-1, -1, *z_BCXYZ.shape[2:])
        prediction: Tensor = self.unet(
            torch.cat([z_BCXYZ, planes], dim=1), timesteps=t_B, context=context_BK[:, None, :]
        )
        return prediction.float()


def drop_context(context_BK: Tensor, drop_B: Tensor) -> Tensor:  # noqa: N803
    """Null context (all zeros: nothing is known) for the samples marked in drop_B."""
    return torch.where(drop_B[:, None], torch.zeros_like(context_BK), context_BK)
