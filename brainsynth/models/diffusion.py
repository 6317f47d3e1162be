"""The denoiser: MONAI's `DiffusionModelUNet`, conditioned as in the paper, the diffusion transformer of transformer.py, or
the Gaussian model of gaussian_denoiser.py with a network for the rest.

Shapes: B batch, C latent channels, K context width, XYZ latent cells. The UNet gets the context (see covariates.py) as K
constant channels and as one cross-attention token, the others through their norms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from torch import Tensor, nn

from brainsynth.config.architectures import (
    DenoiserArchitecture,
    DiffusionArchitecture,
    GaussianArchitecture,
    TransformerArchitecture,
)

if TYPE_CHECKING:
    from brainsynth.covariates.schema import CovariateSchema
    from brainsynth.models.gaussian_denoiser import GaussianDenoiser
    from brainsynth.models.transformer import DiffusionTransformer


class Denoiser(nn.Module):
    """`forward(z_BCXYZ, t_B, context_BK)` → prediction_BCXYZ (epsilon, v or flow, as trained).

    One of `unet`, `transformer` and `gaussian` is there, the others are None.
    """

    def __init__(
        self,
        architecture: DenoiserArchitecture,
        latent_channels: int,
        context_size: int,
        grid_xyz: tuple[int, int, int] | None = None,
        schema: CovariateSchema | None = None,
    ) -> None:
        """A denoiser with random weights.

        Args:
            grid_xyz: latent cells along each axis, to which the Gaussian model is bound; the others take any.
            schema: where each covariate is in the context; a Gaussian model with `crossed` needs it.

        Raises:
            UserError: `crossed` is not a binary covariate of the schema.
        """
        super().__init__()
        self.unet: DiffusionModelUNet | None = None
        self.transformer: DiffusionTransformer | None = None
        self.gaussian: GaussianDenoiser | None = None
        if isinstance(architecture, GaussianArchitecture):
            if grid_xyz is None:
                raise ValueError("a Gaussian denoiser needs grid_xyz")
            from brainsynth.models.gaussian_denoiser import GaussianDenoiser  # only the network that is there

            products: tuple[tuple[int, int], ...] = ()
            if architecture.crossed:
                if schema is None:
                    raise ValueError("a Gaussian denoiser with crossed needs the schema")
                products = schema.products(architecture.crossed)
            self.gaussian = GaussianDenoiser(architecture, (latent_channels, *grid_xyz), context_size, products)
        elif isinstance(architecture, TransformerArchitecture):
            from brainsynth.models.transformer import DiffusionTransformer

            self.transformer = DiffusionTransformer(architecture, latent_channels, context_size)
        else:
            self.unet = _unet(architecture, latent_channels, context_size)

    def forward(self, z_BCXYZ: Tensor, t_B: Tensor, context_BK: Tensor, mirrored_B: Tensor | None = None) -> Tensor:  # noqa: N803
        """Flow, v or epsilon.

        Args:
            t_B: in [0, 1000) as the time embedding expects.
            mirrored_B: in the training of a Gaussian model, true where z is of a scan's mirror image.
        """
        prediction: Tensor
        if self.gaussian is not None:
            prediction = self.gaussian(z_BCXYZ, t_B, context_BK, mirrored_B)
        elif self.transformer is not None:
            prediction = self.transformer(z_BCXYZ, t_B, context_BK)
        else:
            assert self.unet is not None
            planes = context_BK[:, :, None, None, None].expand(-1, -1, *z_BCXYZ.shape[2:])
            prediction = self.unet(torch.cat([z_BCXYZ, planes], dim=1), timesteps=t_B, context=context_BK[:, None, :])
        return prediction.float()


def _unet(architecture: DiffusionArchitecture, latent_channels: int, context_size: int) -> DiffusionModelUNet:
    return DiffusionModelUNet(
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


def attention_of(architecture: DenoiserArchitecture) -> str:
    """How a denoiser computes attention, in words."""
    if isinstance(architecture, TransformerArchitecture):
        return "by torch's fused kernel"
    if isinstance(architecture, GaussianArchitecture):
        return "none"
    return f"written out{' in float32' if architecture.upcast_attention else ''}"


def drop_context(context_BK: Tensor, drop_B: Tensor) -> Tensor:  # noqa: N803
    """Null context (all zeros: nothing is known) for the samples marked in drop_B."""
    return torch.where(drop_B[:, None], torch.zeros_like(context_BK), context_BK)
