"""Weights ⇄ safetensors files, strictly: every key, shape and digest must match. No pickle anywhere."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from brainsynth.bundle.files import check_bundle_files, check_decoder, file_sha256
from brainsynth.bundle.spec import AUTOENCODER_FILE, DECODER_FILE, DIFFUSION_FILE, BundleSpec
from brainsynth.config.training import DecoderChoice, Precision
from brainsynth.errors import UserError
from brainsynth.models.autoencoder import Autoencoder, build_autoencoder
from brainsynth.models.device import layout, round_weights
from brainsynth.models.diffusion import Denoiser
from brainsynth.models.distilled_decoder import DistilledDecoder
from brainsynth.models.rewrites import rewrite
from brainsynth.models.selfcheck import ConvolutionShape, check_bfloat16, convolution_shapes


def save_weights(module: nn.Module, path: Path) -> str:
    """Write a module's state as safetensors; returns the file's sha256."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}, path)
    return file_sha256(path)


def load_weights(module: nn.Module, path: Path, may_lack: str | None = None) -> None:
    """Load a safetensors file into a module. Raises UserError when keys or shapes do not match exactly.

    Parameters whose names begin with `may_lack` stay as they are where the file has none.
    """
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    current = module.state_dict()
    lacking = {k for k in current if k not in state and may_lack is not None and k.startswith(may_lack)}
    wanted = {k: v for k, v in current.items() if k not in lacking}
    wrong = [f"{k}: missing" for k in wanted if k not in state] + [f"{k}: unknown" for k in state if k not in wanted]
    wrong += [
        f"{k}: shape {tuple(state[k].shape)}, want {tuple(wanted[k].shape)}"
        for k in wanted
        if k in state and state[k].shape != wanted[k].shape
    ]
    if wrong:
        raise UserError(f"{path} does not fit the architecture: {'; '.join(wrong[:5])}")
    module.load_state_dict({**{k: current[k] for k in lacking}, **state})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a .pth file of tensors only, of which nothing is executed.

    Raises UserError when it is missing or damaged, or holds more than tensors.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler has an error type of the pickle module, which nothing here imports
        text = str(error).splitlines()[0][:200] if str(error) else "no message"
        raise UserError(
            f"{path} is damaged or holds more than weights ({type(error).__name__}: {text}); nothing in it was executed"
        ) from None
    weights = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(weights, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not the weights of a network")
    return weights


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
    for module in (autoencoder, denoiser):
        module.requires_grad_(False).eval().to(device)
    _arrange(autoencoder, denoiser, rewrites)
    if precision == "bfloat16":
        for part in (denoiser, autoencoder.distilled, autoencoder.network if autoencoder.rounds else None):
            if part is not None:
                round_weights(part)
    return autoencoder, denoiser


def _build(spec: BundleSpec, decoder: DecoderChoice) -> tuple[Autoencoder, Denoiser]:
    autoencoder = Autoencoder(build_autoencoder(spec.autoencoder), spec.latents, spec.flipped_axes)
    if decoder == "distilled" and spec.distilled is not None:
        autoencoder.distilled = DistilledDecoder(spec.distilled.architecture, spec.autoencoder)
    channels, *grid_xyz = spec.latents.shape_cxyz
    denoiser = Denoiser(spec.diffusion, channels, spec.covariates.context_size, (grid_xyz[0], grid_xyz[1], grid_xyz[2]))
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
            autoencoder.decode(z)

        return convolution_shapes(make_one_volume, autoencoder, denoiser)
