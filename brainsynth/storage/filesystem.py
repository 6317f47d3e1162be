"""Objects in a folder anywhere: a local path or an object store, with put-if-absent on both.

A key is a relative path with forward slashes. A write is atomic: readers see the whole object or none. Local files and
their directories are synced before a write returns, so that what was committed survives a power cut.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from brainsynth.errors import StoreError, UserError
from brainsynth.places import user_path, variable_in, variable_message
from brainsynth.storage.keys import check_address, check_key, file_path
from brainsynth.storage.object_store import ObjectStore
from brainsynth.storage.whole_file import sync, temporary, write_whole

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


class Store(Protocol):
    """What storage code needs of a folder."""

    uri: str

    def read(self, key: str) -> bytes:
        """The object's bytes. Raises FileNotFoundError."""

    def write(self, key: str, data: bytes) -> None:
        """Put the object, replacing one that is there."""

    def write_new(self, key: str, data: bytes) -> bool:
        """Put the object if there is none; False, and nothing changed, where there is one already."""

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """(key, size in bytes) of every object below a folder; an absent folder has none."""

    def delete(self, key: str) -> None:
        """Remove the object; no error where there is none."""


class LocalStore:
    """A folder of this machine or of a shared filesystem."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.uri = str(path)

    def _file(self, key: str, empty: bool = False) -> Path:
        file = self.path / check_key(key, self.uri, empty)
        try:
            # The folder itself may be a link to another disk; nothing in it may be one that leads out.
            inside = file.resolve().is_relative_to(self.path.resolve())
        except (OSError, RuntimeError):  # links in a circle
            inside = False
        if not inside:
            raise UserError(f"{file} is reached by a symbolic link that leaves the folder {self.path}: remove the link")
        return file

    def read(self, key: str) -> bytes:
        file = self._file(key)
        try:
            return file.read_bytes()
        except (NotADirectoryError, IsADirectoryError) as error:
            raise FileNotFoundError(str(error)) from None
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreError(f"cannot read {file}: {error.strerror}; check the permissions and the disk") from error

    def write(self, key: str, data: bytes) -> None:
        file = self._file(key)
        with self._explained(file):
            write_whole(file, data)

    def write_new(self, key: str, data: bytes) -> bool:
        file = self._file(key)
        if file.exists():
            return False
        with self._explained(file), temporary(file) as written:
            written.write_bytes(data)
            sync(written)
            new = _linked(written, file)
            sync(file.parent)
        return new

    @contextlib.contextmanager
    def _explained(self, file: Path) -> Iterator[None]:
        """What the system says of a write that failed, as a UserError that names the remedy."""
        try:
            yield
        except OSError as error:
            if error.errno in _NO_SPACE:
                full = (
                    "the disk is full" if error.errno == errno.ENOSPC else "the quota of this user or folder is used up"
                )
                raise UserError(f"cannot write {file}: {full}; make space, and the same command resumes") from error
            raise UserError(
                f"cannot write {file}: {error.strerror}; check the permissions and the free space of {self.path}"
            ) from error

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        for folder, folders, files in os.walk(self._file(prefix, empty=True)):
            folders.sort()
            for name in sorted(files):
                file = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    yield file.relative_to(self.path).as_posix(), file.lstat().st_size

    def delete(self, key: str) -> None:
        file = self._file(key)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            file.unlink()


def _linked(written: Path, file: Path) -> bool:
    """Give a finished file its name. False where there is a file of that name already."""
    try:
        # A hard link fails where the name exists: the only put-if-absent that POSIX has for a finished file.
        os.link(written, file)
    except FileExistsError:
        return False
    except FileNotFoundError:
        # The dataset was finished, and swept, by someone else while this object was on its way.
        if not file.exists():
            raise
        return False
    except OSError as error:
        if error.errno in _NO_LINKS:
            raise UserError(
                f"cannot write {file}: this filesystem has no hard links, by which brainsynth makes sure that no file is "
                "written twice; write to a local disk, NFS, Lustre or an object store (s3://…), and copy the finished "
                "dataset"
            ) from error
        raise
    return True


def open_store(uri: str) -> Store:
    """The store at a URI: a local path, file://, or whatever obstore opens (s3://, gs://, az://).

    Raises UserError where a file is in the place of the folder.
    """
    scheme, separator, _ = uri.partition("://")
    if not separator:
        return LocalStore(_folder(Path(uri).expanduser().absolute()))
    if scheme == "file":
        return LocalStore(_folder(Path(file_path(uri))))
    return ObjectStore(uri)


def _folder(path: Path) -> Path:
    """The path, of a folder that is there or can be made. Raises UserError where a file is in its place."""
    there = next((place for place in (path, *path.parents) if os.path.exists(place)), path)
    if os.path.isfile(there):
        raise UserError(
            f"{path} is a file, and a folder is needed"
            if there == path
            else f"{path} cannot be a folder: {there} is a file"
        )
    return path


def resolve_uri(uri: str, what: str) -> str:
    """A URI that means the same to every process, and that may be written into logs.

    Raises UserError for a relative path inside a submitted Ray job, for an address that carries credentials, and for a
    shell variable.
    """
    if "://" in uri:
        if variable_in(uri) is not None:
            raise UserError(f"{what}: {variable_message(uri)}")
        return check_address(uri)
    path = user_path(uri, what)
    if not path.is_absolute() and "runtime_resources/working_dir_files" in os.getcwd():
        raise UserError(
            f"{what}: {uri!r} is a relative path, and a submitted job runs in a temporary folder that is deleted later; "
            "give an absolute path or a URI that every node reaches"
        )
    return str(path.absolute())


def check_apart(uri: str, output: str | Path, what: str) -> None:
    """Raises UserError where a dataset's folder and an output are one, or one lies in the other."""
    store = open_store(uri)
    if not isinstance(store, LocalStore):
        return
    dataset, folder = store.path.resolve(), Path(output).resolve()
    if dataset.is_relative_to(folder) or folder.is_relative_to(dataset):
        how = "is" if dataset == folder else "lies in" if folder.is_relative_to(dataset) else "holds"
        raise UserError(f"{what}: {output} {how} the folder of the dataset, {store.path}: give a folder outside of it")


def local_folder(uri: str, what: str) -> Path:
    """The local folder behind a URI, for work that needs real files (training). Raises UserError for others."""
    store = open_store(resolve_uri(uri, what))
    if not isinstance(store, LocalStore):
        raise UserError(f"{what}: {uri} must be a folder that every worker reaches as a path (a shared filesystem)")
    return store.path
