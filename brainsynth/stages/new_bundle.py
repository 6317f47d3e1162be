"""What every stage that writes a bundle shares: whole or not at all, never into another one's folder."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from brainsynth.bundle.files import check_bundle_files, read_bundle
from brainsynth.errors import UserError


@contextlib.contextmanager
def new_bundle(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill, which becomes the bundle when it is whole; after an error nothing is left of it.

    Raises:
        UserError: `folder` is not empty, or a file in the temporary folder is not what its record names.
    """
    check_empty(folder)
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        check_bundle_files(temporary, read_bundle(temporary))
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_empty(folder: Path) -> None:
    """Raises UserError when there is something in the folder."""
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and is not a bundle; give a new output folder")


def in_float16(path: Path) -> bytes:
    """A weights file with its float32 numbers in float16. Raises UserError when one would overflow."""
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float32:
            tensors[name] = tensor.half()
            if not tensors[name].isfinite().all():
                raise UserError(f"weights: {name} of {path} has numbers beyond float16's range; take float32")
    return save(tensors)
