"""Weights ⇄ safetensors files, strictly: every key, shape and digest must match. No pickle anywhere."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from brainsynth.errors import UserError
from brainsynth.storage.whole_file import file_sha256


def save_weights(module: nn.Module, path: Path) -> str:
    """Write a module's state as safetensors; returns the file's sha256."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}, path)
    return file_sha256(path)


def load_weights(module: nn.Module, path: Path, may_lack: tuple[str, ...] = ()) -> None:
    """Load a safetensors file into a module. Raises UserError when keys or shapes do not match exactly.

    Parameters whose names begin with one of `may_lack` stay as they are where the file has none.
    """
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    fit_weights(module, state, path, may_lack)


def fit_weights(module: nn.Module, state: dict[str, Tensor], path: Path, may_lack: tuple[str, ...] = ()) -> None:
    """Put tensors into a module. Raises UserError, naming their file, when keys or shapes do not match exactly."""
    current = module.state_dict()
    lacking = {k for k in current if k not in state and k.startswith(may_lack)}
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
    """The tensors of a safetensors file, or of one made by `torch.save(network.state_dict(), path)`; it runs nothing.

    Raises UserError when it is missing or damaged, or holds more than tensors.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > path.stat().st_size:  # torch stores tensors as they are
                raise ValueError("it unpacks to more than its own size")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler has an error type of the pickle module, which nothing here imports
        text = str(error).splitlines()[0][:200] if str(error) else "no message"
        raise UserError(
            f"{path} is damaged or holds more than weights ({type(error).__name__}: {text}); nothing in it was executed"
        ) from None
    tensors = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(
            f"{path} holds a {type(state).__name__}, not a plain state dict (key → tensor); save it with "
            "torch.save(network.state_dict(), path)"
        )
    return dict(tensors)
