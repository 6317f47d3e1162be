"""A bundle's networks, with their weights, ready to sample and decode."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from brainsynth.bundle.files import check_bundle_files, check_decoder
from brainsynth.bundle.spec import AUTOENCODER_FILE, DECODER_FILE, DIFFUSION_FILE, BundleSpec
from brainsynth.config.architectures import GaussianArchitecture
from brainsynth.config.training import DecoderChoice, Precision
from brainsynth.models.autoencoder import Autoencoder, build_autoencoder
from brainsynth.models.device import layout, round_weights
from brainsynth.models.diffusion import Denoiser
from brainsynth.models.rewrites import rewrite
from brainsynth.models.selfcheck import ConvolutionShape, check_bfloat16, convolution_shapes
from brainsynth.models.weights import load_weights

if TYPE_CHECKING:
    from brainsynth.bundle.renderer import RendererSpec
    from brainsynth.models.labeller import VolumeLabeller
    from brainsynth.models.renderer import MapRenderer, Renderer


def load_models(
    folder: Path,
    spec: BundleSpec,
    device: torch.device,
    precision: Precision = "float32",
    rewrites: bool = False,
    decoder: DecoderChoice = "own",
) -> tuple[Autoencoder, Denoiser]:
    """Both networks in evaluation mode on a device, digests checked first.

    Args:
        rewrites: bring them into the cheaper form of rewrites.py, which only rounds differently.
        decoder: which one `decode` uses.

    Raises:
        UserError: a file is missing or not the bundle's, the bundle has no such decoder, or bfloat16 is asked for where it
            computes wrong convolutions.
    """
    check_decoder(folder, spec, decoder)
    check_bundle_files(folder, spec)
    if precision == "bfloat16":
        check_bfloat16(_convolution_shapes(spec, rewrites, decoder), device)
    autoencoder, denoiser = _build(spec, decoder)
    load_weights(autoencoder.network, folder / AUTOENCODER_FILE)
    load_weights(denoiser, folder / DIFFUSION_FILE)
    if autoencoder.distilled is not None:
        load_weights(autoencoder.distilled, folder / DECODER_FILE)
    prepare(autoencoder, denoiser, device, precision, rewrites)
    return autoencoder, denoiser


def prepare(
    autoencoder: Autoencoder, denoiser: Denoiser, device: torch.device, precision: Precision, rewrites: bool
) -> None:
    """Bring networks with their weights to a device, ready for prediction alone."""
    for module in (autoencoder, denoiser):
        module.requires_grad_(False).eval().to(device)
    _arrange(autoencoder, denoiser, rewrites)
    if precision == "bfloat16":
        for part in (denoiser, autoencoder.distilled, autoencoder.network if autoencoder.rounds else None):
            if part is not None:
                round_weights(part)


def load_labeller(folder: Path, device: torch.device, digest: str | None = None) -> VolumeLabeller:
    """A bundle's labeller on a device, in float32 whatever the images' precision.

    Args:
        digest: of its record, where it must be this one.

    Raises:
        UserError: the bundle has none or another one, or its file is damaged.
    """
    from brainsynth.bundle.labeller import LABELLER
    from brainsynth.models.labeller import Labeller, VolumeLabeller  # only where label maps are asked for

    spec = LABELLER.read(folder, digest)
    network = Labeller(spec.architecture, len(spec.labels.labels) + 1)
    _ready(network, folder / LABELLER.file, device)
    return VolumeLabeller(network, spec.labels.indices, device)


def load_renderer(
    folder: Path, device: torch.device, digest: str | None = None, precision: Precision = "float32"
) -> MapRenderer:
    """A bundle's renderer on a device; the same arguments, and errors as of `load_models`."""
    from brainsynth.bundle.renderer import RENDERER
    from brainsynth.models.renderer import MapRenderer

    spec = RENDERER.read(folder, digest)
    network = _renderer(spec)
    _ready(network, folder / RENDERER.file, device)
    if precision == "bfloat16":
        check_bfloat16(_rendering_shapes(spec), device)
        round_weights(network)
    return MapRenderer(network, spec.labels, device, precision)


def _renderer(spec: RendererSpec) -> Renderer:
    from brainsynth.models.renderer import Renderer

    return Renderer(spec.architecture, len(spec.labels.labels) + 1, spec.covariates.context_size)


def _ready(network: torch.nn.Module, weights: Path, device: torch.device) -> None:
    load_weights(network, weights)
    layout(network.float().requires_grad_(False).eval().to(device))


def _build(spec: BundleSpec, decoder: DecoderChoice) -> tuple[Autoencoder, Denoiser]:
    autoencoder = Autoencoder(
        build_autoencoder(spec.autoencoder, spec.covariates.context_size), spec.latents, spec.flipped_axes
    )
    if decoder == "distilled" and spec.distilled is not None:
        from brainsynth.models.distilled_decoder import DistilledDecoder

        autoencoder.distilled = DistilledDecoder(spec.distilled.architecture, spec.autoencoder)
    channels, *grid_xyz = spec.latents.shape_cxyz
    cells = (grid_xyz[0], grid_xyz[1], grid_xyz[2])
    denoiser = Denoiser(spec.diffusion, channels, spec.covariates.context_size, cells, spec.covariates)
    if denoiser.gaussian is not None and isinstance(spec.diffusion, GaussianArchitecture):
        denoiser.gaussian.guidance = spec.diffusion.autoguidance
    return autoencoder, denoiser


def _arrange(autoencoder: Autoencoder, denoiser: Denoiser, rewrites: bool) -> None:
    """Rewrites and memory layout. The denoiser keeps its layout: channels last is 4 % slower there on CPUs."""
    if rewrites:
        rewrite(autoencoder, denoiser)
    layout(autoencoder)


def _convolution_shapes(spec: BundleSpec, rewrites: bool, decoder: DecoderChoice = "own") -> list[ConvolutionShape]:
    with torch.device("meta"):
        autoencoder, denoiser = _build(spec, decoder)
        _arrange(autoencoder, denoiser, rewrites)
        z, context = torch.empty((1, *spec.latents.shape_cxyz)), torch.empty((1, spec.covariates.context_size))

        def make_one_volume() -> None:
            denoiser(z, torch.empty(1), context)
            autoencoder.decode(z, context)

        return convolution_shapes(make_one_volume, autoencoder, denoiser)


def _rendering_shapes(spec: RendererSpec) -> list[ConvolutionShape]:
    from brainsynth.models.labeller import padded
    from brainsynth.models.renderer import CELL

    with torch.device("meta"):
        network = _renderer(spec)
        layout(network)
        labels = padded(torch.empty((1, 1, *spec.volume.shape_xyz), dtype=torch.uint8), network.multiple)[:, 0]
        cells = [size // CELL for size in labels.shape[1:]]
        place, noise = (torch.empty((1, channels, *cells)) for channels in (4, network.noise))
        context = torch.empty((1, spec.covariates.context_size))
        return convolution_shapes(lambda: network.image(labels, place, context, noise), network)
