"""Local files and folders that are there whole or not at all, even after a kill; a full disk is reported plainly."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from brainsynth.errors import UserError

log = logging.getLogger(__name__)
TEMPORARY_PREFIX = ".tmp-"
_FULL = {errno.ENOSPC, errno.EDQUOT}


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextlib.contextmanager
def temporary(path: Path, mark: str = "") -> Iterator[Path]:
    """A name for a temporary file or folder next to `path`, with its suffix; what is there at the end is removed."""
    name = path.with_name(f"{TEMPORARY_PREFIX}{mark}{uuid.uuid4().hex}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield name
    finally:
        with contextlib.suppress(OSError):
            remove(name)


@contextlib.contextmanager
def replaced(path: Path, mark: str = "") -> Iterator[Path]:
    """A temporary file or folder to write; it takes the place of `path`, synced, only when the block ends well.

    A folder takes the place of nothing but an empty one.
    """
    with temporary(path, mark) as written:
        yield written
        for file in written.rglob("*") if written.is_dir() else ():
            sync(file)
        sync(written)
        os.replace(written, path)
        sync(path.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, replacing one that is there."""
    with replaced(path) as written:
        written.write_bytes(data)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """`replaced`, for a file or folder that a user asked for. Raises UserError when it cannot be written."""
    try:
        with replaced(path) as written:
            yield written
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; fix the space or permissions, and the same command resumes"
        ) from error


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """`whole`, for a new folder: the temporary one is there, and what a killed writer of the same folder left is removed.

    Raises UserError while another process writes the same folder.
    """
    mark = f"{hashlib.sha256(path.name.encode()).hexdigest()[:12]}-"
    for stray in path.parent.glob(f"{TEMPORARY_PREFIX}{mark}*"):
        with _locked(stray) as dead:
            if not dead:
                raise UserError(f"{path} is being written by another process: wait for it, or end it first")
            log.info("removed %s, which a killed run left", stray)
            remove(stray)
    try:
        with replaced(path, mark) as written:
            written.mkdir()
            with _locked(written):
                yield written
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; fix the space or permissions, and run the same command again"
        ) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Holds a folder's lock, which ends with its process; False where a living process has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        except OSError:  # a filesystem without locks
            yield True
        else:
            yield True
    finally:
        os.close(descriptor)


def content_sha256(path: Path) -> str:
    """sha256 of a file, or of a folder's files with their names; "" where nothing is."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        listed = "".join(f"{content_sha256(file)}  {file.relative_to(path).as_posix()}\n" for file in files)
        return hashlib.sha256(listed.encode()).hexdigest()
    if not path.exists():
        return ""
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, link or folder with all in it; no error where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Remove a folder so that a kill on the way leaves no half of it under its name; only warns when it cannot."""
    if not folder.exists():
        return
    aside = folder.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    try:
        folder.rename(aside)
    except OSError as error:
        log.warning("cannot remove %s: %s", folder, error)
        return
    remove(aside)


def sweep(folder: Path, below: bool = False) -> None:
    """Remove what killed writers left in a folder, and in those below it."""
    for stray in list(folder.rglob(f"{TEMPORARY_PREFIX}*") if below else folder.glob(f"{TEMPORARY_PREFIX}*")):
        remove(stray)


@contextlib.contextmanager
def reported_when_full(folder: Path, what: str) -> Iterator[None]:
    """Turns the error of a full disk into a UserError; every other error passes.

    Raises:
        UserError: the disk, or the quota on it, is full.
    """
    try:
        yield
    except Exception as error:
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
    match = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(match[1]) if match else None
