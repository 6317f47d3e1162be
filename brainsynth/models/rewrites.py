"""The trained networks in a cheaper form that computes the same function: only rounding differs.

Applied after the weights are loaded, from outside, so that the networks' definition and their files stay the plain ones:

- Nearest ×2 upsampling followed by a 3³ convolution is one transposed convolution of kernel 4³, stride 2, padding 1. Along
  one axis an output voxel sees two input voxels instead of three copies, so 8 of 27 products are left, and the upsampled
  tensor is never written. With kernel (w0, w1, w2) the transposed one is (w2, w1 + w2, w0 + w1, w0); zero padding included.
- The softmax over a single context token is 1. So cross-attention to one token is `out_proj(to_v(context))`, the same for
  every voxel: queries, keys and the layer norm before them drop out, and the two linear maps merge to one.
"""

from __future__ import annotations

from typing import Any

import torch
from monai.networks.blocks.crossattention import CrossAttentionBlock
from monai.networks.blocks.upsample import UpSample
from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock, DiffusionUNetTransformerBlock
from torch import Tensor, nn

from brainsynth.models.autoencoder import Autoencoder
from brainsynth.models.diffusion import Denoiser

_TAPS = torch.tensor(
    # Rows: positions of the transposed kernel; columns: of the plain one.
    [[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]],
    dtype=torch.float64,
)


def rewrite(autoencoder: Autoencoder, denoiser: Denoiser) -> None:
    """Bring both loaded networks into the cheaper form, in place. For prediction only: their state has other keys then."""
    _fuse_upsampling(autoencoder.network)
    if denoiser.unet is None:
        return  # the others have neither
    _fuse_upsampling(denoiser.unet)
    for module in denoiser.unet.modules():
        if isinstance(module, DiffusionUNetTransformerBlock):
            module.add_module("attn2", _OneTokenAttention(module.attn2))
            module.add_module("norm2", nn.Identity())


def _fuse_upsampling(network: nn.Module) -> None:
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, UpSample) and _is_nearest(child) and hasattr(child, "postconv"):
                setattr(parent, name, _Upsample(_transposed(_convolution(child.postconv))))
            elif isinstance(child, DiffusionUNetResnetBlock) and child.upsample is not None:
                setattr(parent, name, _UpsamplingResnetBlock(child))


def _is_nearest(module: UpSample) -> bool:
    upsample: Any = module.upsample_non_trainable
    return bool(upsample.mode == "nearest" and tuple(upsample.scale_factor) == (2.0, 2.0, 2.0))


def _convolution(block: Any) -> nn.Conv3d:
    """Of one of MONAI's blocks around a convolution."""
    convolution: nn.Conv3d = block.conv
    return convolution


def _transposed(conv: nn.Conv3d) -> nn.ConvTranspose3d:
    """The transposed convolution that equals nearest ×2 upsampling and then `conv`; kernels are summed in float64."""
    if conv.kernel_size != (3, 3, 3) or conv.padding != (1, 1, 1) or conv.stride != (1, 1, 1) or conv.groups != 1:
        raise ValueError(f"only a plain 3³ convolution can be fused with upsampling, not {conv}")
    fused = nn.ConvTranspose3d(
        conv.in_channels, conv.out_channels, 4, stride=2, padding=1, bias=conv.bias is not None, device="meta"
    ).to_empty(device=conv.weight.device)
    taps = _TAPS.to(conv.weight.device)
    kernel = torch.einsum("oixyz,ax,by,cz->ioabc", conv.weight.double(), taps, taps, taps)
    fused.weight = nn.Parameter(kernel.to(conv.weight.dtype), requires_grad=False)
    fused.bias = conv.bias
    return fused


class _Upsample(nn.Module):
    """Takes and ignores the time embedding, as the U-Net's upsampling does."""

    def __init__(self, conv: nn.ConvTranspose3d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        upsampled: Tensor = self.conv(x)
        return upsampled


class _UpsamplingResnetBlock(nn.Module):
    """`DiffusionUNetResnetBlock(up=True)` with its upsampling and first convolution fused; the rest is its own."""

    def __init__(self, block: DiffusionUNetResnetBlock) -> None:
        super().__init__()
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.nonlinearity = block.nonlinearity
        assert block.upsample is not None
        self.upsample = block.upsample
        self.conv1, self.conv2 = _transposed(_convolution(block.conv1)), block.conv2
        self.time_emb_proj = block.time_emb_proj
        self.skip_connection = block.skip_connection

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(self.nonlinearity(self.norm1(x)))
        h = h + self.time_emb_proj(self.nonlinearity(emb))[:, :, None, None, None]
        h = self.conv2(self.nonlinearity(self.norm2(h)))
        # A 1³ convolution commutes with nearest upsampling, and is eight times cheaper before it.
        skipped: Tensor = self.upsample(self.skip_connection(x)) + h
        return skipped


class _OneTokenAttention(nn.Module):
    """Cross-attention to one context token: a linear map of the context, added to every voxel."""

    def __init__(self, block: CrossAttentionBlock) -> None:
        super().__init__()
        value, out = block.to_v, block.out_proj
        weight = out.weight.double() @ value.weight.double()
        bias = out.bias.double()
        if value.bias is not None:
            bias = bias + out.weight.double() @ value.bias.double()
        self.linear = nn.Linear(value.in_features, out.out_features, device="meta").to_empty(device=out.weight.device)
        self.linear.weight = nn.Parameter(weight.to(out.weight.dtype), requires_grad=False)
        self.linear.bias = nn.Parameter(bias.to(out.weight.dtype), requires_grad=False)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, 1, C) for tokens x (B, N, C), of which only the number matters, and context (B, 1, K)."""
        return self.linear(context)  # type: ignore[no-any-return]
