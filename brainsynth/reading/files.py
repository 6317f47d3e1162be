"""The files of a dataset as a reader wants them, at a path or an object-store URI. Needs obstore for the latter only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from brainsynth.errors import StoreError
from brainsynth.storage.keys import file_path


def is_remote(uri: str) -> bool:
    """True for an address that is not a local path."""
    return "://" in uri and not uri.startswith("file://")


def local_path(uri: str) -> str:
    """The path behind a local URI."""
    return file_path(uri) if uri.startswith("file://") else os.path.expanduser(uri)


def local_file(uri: str, key: str) -> Path:
    """A file of a local dataset; nothing in it may be a link that leads out of it."""
    root = Path(local_path(uri))
    file = root / key
    if not file.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{file} is reached by a symbolic link that leaves the dataset: remove the link")
    return file


def read_file(uri: str, key: str) -> bytes:
    """A whole file. Raises FileNotFoundError, and StoreError where it is there and cannot be read."""
    if is_remote(uri):
        from brainsynth.storage.object_store import ObjectStore

        return ObjectStore(uri).read(key)
    file = local_file(uri, key)
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        root = local_path(uri)
        if os.path.isfile(root):
            raise StoreError(f"{root} is a file, and a dataset is a folder") from None
        raise StoreError(f"cannot read {file}: {error.strerror}; check the permissions and the disk") from None


def list_files(uri: str, folder: str) -> list[str]:
    """Keys below a folder."""
    if is_remote(uri):
        from brainsynth.storage.object_store import ObjectStore

        return [key for key, _ in ObjectStore(uri).list(folder)]
    return sorted(f"{folder}/{file.name}" for file in local_file(uri, folder).glob("*"))


def zarr_store(uri: str) -> Any:
    """What zarr opens a dataset by."""
    if is_remote(uri):
        from brainsynth.storage.object_store import ATTEMPTS, open_client

        # Zarr asks the client directly: here the client repeats by itself, and reading twice does no harm.
        client = open_client(uri, retries=ATTEMPTS - 1)
        from zarr.storage import ObjectStore

        return ObjectStore(client, read_only=True)
    return local_path(uri)


class Parts(Protocol):
    """Parts of the files of a dataset."""

    def tail(self, key: str, length: int) -> tuple[bytes, int]:
        """The last bytes of a file, fewer where it is shorter, and its size. Raises FileNotFoundError."""

    def read(self, key: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes [start, stop) of each span; fewer where the file ends before."""


class LocalParts:
    """Parts of the files of a local dataset."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def tail(self, key: str, length: int) -> tuple[bytes, int]:
        """The last bytes of a file, and its size. Raises FileNotFoundError."""
        size = local_file(self.uri, key).stat().st_size
        return self.read(key, [(max(0, size - length), size)])[0], size

    def read(self, key: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes [start, stop) of each span; fewer where the file ends before."""
        file = os.open(os.path.join(local_path(self.uri), key), os.O_RDONLY)
        try:
            return [os.pread(file, stop - start, start) for start, stop in spans]
        finally:
            os.close(file)


class RemoteParts:
    """Parts of the objects of a dataset in an object store."""

    def __init__(self, uri: str) -> None:
        from brainsynth.storage.object_store import ObjectStore

        self.store = ObjectStore(uri)

    def tail(self, key: str, length: int) -> tuple[bytes, int]:
        """The last bytes of an object, by one request, and its size. Raises FileNotFoundError."""
        return self.store.read_tail(key, length)

    def read(self, key: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes [start, stop) of each span; spans that lie close together are one request."""
        return self.store.read_spans(key, spans)
