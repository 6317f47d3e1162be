"""Weight files as MONAI's model zoo publishes them → our tensors, strictly: every key, shape and type must match.

Two key styles are read. The published files have that of the `GenerativeModels` package, where both networks were first
written; MONAI core, which took them over, renamed two kinds of layers. Files are read as plain tensors; they run nothing.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brainsynth.bundle.spec import BundleSpec
from brainsynth.errors import UserError, problems_error
from brainsynth.models.autoencoder import build_autoencoder
from brainsynth.models.diffusion import Denoiser
from brainsynth.models.weights import read_tensors

_RENAMED = (  # style of GenerativeModels → style of MONAI core
    (re.compile(r"^(decoder\.blocks\.\d+)\.conv\.conv\."), r"\1.postconv.conv."),
    (re.compile(r"\.upsampler\.conv\.conv\."), ".upsampler.postconv.conv."),
    (re.compile(r"\.to_out\.0\."), ".out_proj."),
)


def file_digests(path: Path) -> dict[str, str]:
    """md5, under which the files are published, and sha256 of a file's bytes, both in hex. Raises UserError."""
    digests = {"md5": hashlib.md5(usedforsecurity=False), "sha256": hashlib.sha256()}
    try:
        with open(path, "rb") as handle:
            while block := handle.read(1 << 22):
                for each in digests.values():
                    each.update(block)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return {name: each.hexdigest() for name, each in digests.items()}


def read_autoencoder(path: Path, spec: BundleSpec) -> dict[str, Tensor]:
    """State of the autoencoder that `spec` describes. Raises UserError as `read_state` does."""
    with torch.device("meta"):
        network = build_autoencoder(spec.autoencoder)
    return read_state(path, network, "autoencoder")


def read_denoiser(path: Path, spec: BundleSpec) -> dict[str, Tensor]:
    """State of the denoiser that `spec` describes. Raises UserError as `read_state` does."""
    with torch.device("meta"):
        denoiser = Denoiser(spec.diffusion, spec.latents.shape_cxyz[0], spec.covariates.context_size)
    assert denoiser.unet is not None
    return {f"unet.{key}": tensor for key, tensor in read_state(path, denoiser.unet, "diffusion").items()}


def read_state(path: Path, network: nn.Module, what: str) -> dict[str, Tensor]:
    """The tensors of a file made by `torch.save(network.state_dict())`, in either key style, under MONAI core's names.

    Args:
        network: has the wanted keys and shapes; may be on the meta device.
        what: "autoencoder" or "diffusion", for errors.

    Raises:
        UserError: the file is damaged or holds anything but float32 tensors that fit the network exactly.
    """
    state = read_tensors(path)
    other = {"autoencoder": ("time_embed.", "diffusion"), "diffusion": ("encoder.", "autoencoder")}[what]
    if any(str(key).startswith(other[0]) for key in state):
        raise UserError(f"--{what} {path} is the file of the {other[1]}; were the two files swapped?")
    renamed: dict[str, Tensor] = {}
    problems = []
    for key in list(state):
        name = str(key)
        for pattern, new in _RENAMED:
            name = pattern.sub(new, name)
        if name in renamed:
            problems.append(f"{key}: given in both key styles")
        renamed[name] = state.pop(key)
    wanted = network.state_dict()
    problems += [f"{key}: missing" for key in wanted if key not in renamed]
    problems += [f"{key}: unknown" for key in renamed if key not in wanted]
    for key in wanted:
        problems += [f"{key}: {wrong}" for wrong in _wrong(renamed.get(key), wanted[key])]
    if problems:
        raise problems_error(f"--{what} {path} does not fit the published architecture", problems, limit=5)
    # Copies, one at a time: a tensor may be a view of a larger storage, or share it with another.
    return {key: renamed.pop(key).clone(memory_format=torch.contiguous_format) for key in wanted}


def _wrong(tensor: Any, wanted: Tensor) -> list[str]:
    if tensor is None:
        return []
    if tensor.shape != wanted.shape:
        return [f"shape {tuple(tensor.shape)}, want {tuple(wanted.shape)}"]
    if tensor.dtype != torch.float32:
        return [f"{tensor.dtype}, want torch.float32"]
    return [] if tensor.isfinite().all() else ["holds NaN or infinity"]
