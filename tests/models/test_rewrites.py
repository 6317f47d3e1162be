"""The rewritten networks compute the same function, and rounding weights once changes no bit."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.networks.blocks import CrossAttentionBlock, UpSample
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from brainsynth.bundle.spec import LatentSpec
from brainsynth.config.architectures import AutoencoderArchitecture, DiffusionArchitecture
from brainsynth.models.autoencoder import Autoencoder, build_autoencoder
from brainsynth.models.device import autocast, round_weights
from brainsynth.models.diffusion import Denoiser
from brainsynth.models.rewrites import rewrite

SHAPE, CONTEXT = (3, 4, 8, 4), 4


def networks(resblock_updown: bool = True, upcast: bool = True, layers: int = 1) -> tuple[Autoencoder, Denoiser]:
    """The paper's structure, narrow; no weight is zero, as a fresh network's last layers are."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(
        build_autoencoder(AutoencoderArchitecture(channels=(8, 16, 16, 16), latent_channels=3, norm_groups=8)),
        LatentSpec(shape_cxyz=SHAPE, shift=(0.1, 0.0, -0.2), scale=(1.0, 2.0, 0.5)),
        (0,),
    )
    architecture = DiffusionArchitecture(
        channels=(8, 16, 24),
        attention=(False, True, True),
        head_channels=0,
        norm_groups=8,
        resblock_updown=resblock_updown,
        transformer_layers=layers,
        upcast_attention=upcast,
    )
    denoiser = Denoiser(architecture, 3, CONTEXT)
    for module in (autoencoder, denoiser):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)
        module.requires_grad_(False).eval()
    return autoencoder, denoiser


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2, *SHAPE, generator=generator)
    return z, torch.tensor([17.0, 900.0]), torch.rand(2, CONTEXT, generator=generator)


@pytest.mark.parametrize(("resblock_updown", "layers"), [(True, 1), (False, 1), (True, 2)])
def test_same_function_in_float64(resblock_updown: bool, layers: int) -> None:
    plain = networks(resblock_updown, upcast=False, layers=layers)
    z, t, context = (value.double() for value in batch())
    for module in plain:
        module.double()
    cheap = copy.deepcopy(plain)
    rewrite(*cheap)
    planes = context[:, :, None, None, None].expand(-1, -1, *SHAPE[1:])
    predictions = [d.unet(torch.cat([z, planes], 1), t, context[:, None]) for _, d in (plain, cheap)]
    images = [a.network.decode(z) for a, _ in (plain, cheap)]
    for wanted, found in (predictions, images):
        assert wanted.std() > 0.05
        assert float((found - wanted).abs().max()) < 1e-12
    assert torch.equal(*(a.network.encode(images[0])[0] for a, _ in (plain, cheap)))


def test_nothing_that_could_be_rewritten_is_left_and_it_is_cheaper() -> None:
    plain, cheap = networks(), networks()
    rewrite(*cheap)
    z, t, context = batch()
    assert not any(isinstance(m, CrossAttentionBlock) for m in cheap[1].modules())
    assert not any(isinstance(m, UpSample) and hasattr(m, "postconv") for n in cheap for m in n.modules())
    flops = []
    for autoencoder, denoiser in (plain, cheap):
        with FlopCounterMode(display=False) as counter:
            denoiser(z, t, context)
        flops.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            autoencoder.decode(z)
        flops.append(counter.get_total_flops())
    assert flops[2] < 0.95 * flops[0]
    assert flops[3] < 0.8 * flops[1]


def test_what_is_not_a_plain_convolution_is_refused() -> None:
    autoencoder, denoiser = networks()
    upsample = next(m for m in autoencoder.modules() if isinstance(m, UpSample))
    upsample.postconv.conv.stride = (2, 2, 2)
    with pytest.raises(ValueError, match="only a plain 3³ convolution"):
        rewrite(autoencoder, denoiser)


@pytest.mark.parametrize("rewritten", [False, True])
def test_weights_rounded_once_give_the_bits_of_autocast(rewritten: bool) -> None:
    """With attention upcast, too, which a cast of the whole network breaks."""
    usual = networks(upcast=True)
    if rewritten:
        rewrite(*usual)
    once = copy.deepcopy(usual)
    for module in once:
        round_weights(module)
    z, t, context = batch()
    with autocast(torch.device("cpu"), "bfloat16"):
        assert torch.equal(usual[1](z, t, context), once[1](z, t, context))
        assert torch.equal(usual[0].decode(z), once[0].decode(z))
    assert sum(p.nbytes for p in once[1].parameters()) < 0.6 * sum(p.nbytes for p in usual[1].parameters())


def test_decode_and_encode_turn_the_networks_axes() -> None:
    flipped, _ = networks()
    plain = Autoencoder(flipped.network, LatentSpec(shape_cxyz=SHAPE, shift=(0.1, 0.0, -0.2), scale=(1.0, 2.0, 0.5)))
    z = batch()[0]
    image = flipped.decode(z)
    assert torch.equal(image, plain.decode(z).flip(2))
    assert not torch.equal(image, plain.decode(z))
    assert torch.equal(flipped.encode(image), plain.encode(image.flip(2)))
