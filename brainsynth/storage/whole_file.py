"""Files that survive a kill at any moment, and a full disk reported in one sentence."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from brainsynth.errors import UserError
from brainsynth.storage.filesystem import TEMPORARY_PREFIX, remove, sync

log = logging.getLogger(__name__)
_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary name for a file or a flat folder, which takes the place of `path`, synced, when the block ends well."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}-{path.name}")
    try:
        yield temporary
        if temporary.is_dir():
            for file in temporary.iterdir():
                sync(file)
            if os.path.lexists(path):
                discard(path)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        remove(temporary)


def discard(folder: Path) -> None:
    """Remove a folder so that a kill on the way leaves no half of it under its name; only warns when it cannot."""
    aside = folder.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    try:
        folder.rename(aside)
    except OSError as error:
        log.warning("cannot remove %s: %s", folder, error)
        return
    remove(aside)


@contextlib.contextmanager
def reported_when_full(folder: Path, what: str) -> Iterator[None]:
    """Turns the error of a full disk into a UserError; every other error passes.

    Raises:
        UserError: the disk, or the quota on it, is full.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if _error_number(error) not in _FULL:
            raise
        raise UserError(
            f"the disk of {folder} is full: {what} could not be written. The existing checkpoints are intact: "
            "free some space and run the same command again to resume from the newest"
        ) from error


def _error_number(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # safetensors writes by itself, and puts the system's error number into its text alone.
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None
