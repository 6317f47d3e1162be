"""`start_from`: the weights that a training begins with, of a file, a bundle or another training's folder."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from brainsynth.bundle.files import bundle_folder
from brainsynth.config.schema import SHIPPED_BUNDLE
from brainsynth.errors import UserError
from brainsynth.models.weights import fit_weights, read_tensors
from brainsynth.places import user_path
from brainsynth.records import digest
from brainsynth.storage.whole_file import file_sha256
from brainsynth.training.checkpoint import newest_tensors


def starting_file(start_from: str, weights_file: str) -> Path:
    """The file behind `start_from`: itself, the weights of a finished training, or the newest checkpoint of another.

    Raises UserError where there is none.
    """
    path = bundle_folder(start_from) if start_from == SHIPPED_BUNDLE else user_path(start_from, "start_from")
    if path.is_dir():
        finished = path / weights_file
        file = finished if finished.is_file() else newest_tensors(path)
        if file is None:
            raise UserError(f"start_from: {path} holds neither {weights_file} nor a whole checkpoint of a training")
        return file
    if not path.is_file():
        raise UserError(
            f"start_from: {path} is not a file; give {weights_file} of a training or a bundle, or a training's folder"
        )
    return path


def with_start(data: str, start_from: str | None, weights_file: str) -> str:
    """The identity of a training's inputs: of its data, and of the weights it begins with, where it does."""
    if start_from is None:
        return data
    return digest({"latents": data, "start_from": file_sha256(starting_file(start_from, weights_file))})


def load_start(
    network: nn.Module,
    start_from: str | None,
    weights_file: str,
    name: str,
    may_lack: tuple[str, ...] = (),
    fitted: tuple[str, ...] = (),
) -> None:
    """Put the weights, if there are any, into a network: of a checkpoint the averaged ones of its part `name`.

    Args:
        may_lack: beginnings of names that the file need not have.
        fitted: beginnings of names that are not taken from the file, because they are fitted afterwards.

    Raises:
        UserError: they do not fit.
    """
    if start_from is None:
        return
    path = starting_file(start_from, weights_file)
    tensors: dict[str, Tensor] = read_tensors(path)
    prefix = f"ema.{name}."
    averaged = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    taken = {key: value for key, value in (averaged or tensors).items() if not key.startswith(fitted)}
    fit_weights(network, taken, path, may_lack + fitted)
