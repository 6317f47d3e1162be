"""Objects in a folder anywhere: a local path or an object store, with put-if-absent on both.

A key is a relative path with forward slashes. A write is atomic: readers see the whole object or none. Local files and
their directories are synced before a write returns, so that what was committed survives a power cut.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from brainsynth.errors import UserError

TEMPORARY_PREFIX = ".tmp-"


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

    def _file(self, key: str) -> Path:
        file = self.path / key
        if ".." in file.parts or not file.is_relative_to(self.path):
            raise ValueError(f"key {key!r} leaves the folder {self.path}")
        return file

    def read(self, key: str) -> bytes:
        try:
            return self._file(key).read_bytes()
        except NotADirectoryError as error:
            raise FileNotFoundError(str(error)) from None

    def write(self, key: str, data: bytes) -> None:
        with self._temporary(key, data) as temporary:
            os.replace(temporary, self._file(key))

    def write_new(self, key: str, data: bytes) -> bool:
        if self._file(key).exists():
            return False
        with self._temporary(key, data) as temporary:
            try:
                # A hard link fails where the name exists: the only put-if-absent that POSIX has for a finished file.
                os.link(temporary, self._file(key))
            except FileExistsError:
                return False
            except FileNotFoundError:
                # The dataset was finished, and swept, by someone else while this object was on its way.
                if not self._file(key).exists():
                    raise
                return False
        return True

    @contextlib.contextmanager
    def _temporary(self, key: str, data: bytes) -> Iterator[Path]:
        file = self._file(key)
        temporary = file.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            yield temporary
            sync(file.parent)
        except OSError as error:
            raise UserError(
                f"cannot write {file}: {error.strerror}; check the permissions and the free space of {self.path}"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        for folder, folders, files in os.walk(self.path / prefix):
            folders.sort()
            for name in sorted(files):
                file = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    yield file.relative_to(self.path).as_posix(), file.stat().st_size

    def delete(self, key: str) -> None:
        self._file(key).unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ObjectStore:
    """A bucket or a folder in one (s3://, gs://, az://), by obstore. Credentials come from the environment."""

    def __init__(self, uri: str) -> None:
        import obstore.store

        self.uri = uri
        try:
            self.store: Any = obstore.store.from_url(uri)
        except Exception as error:
            raise UserError(f"cannot open {uri}: {error}") from error

    def read(self, key: str) -> bytes:
        return bytes(self.store.get(key).bytes())

    def write(self, key: str, data: bytes) -> None:
        with self._explained(key):
            self.store.put(key, data)

    def write_new(self, key: str, data: bytes) -> bool:
        import obstore.exceptions

        try:
            with self._explained(key):
                self.store.put(key, data, mode="create")
        except obstore.exceptions.AlreadyExistsError:
            return False
        return True

    @contextlib.contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        from obstore.exceptions import AlreadyExistsError, BaseError

        try:
            yield
        except AlreadyExistsError:
            raise
        except BaseError as error:
            text = str(error).splitlines()[0]
            raise UserError(f"cannot write {self.uri}/{key}: {text}; check the address and the permissions") from error

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        for batch in self.store.list(prefix or None):
            for item in batch:
                yield item["path"], item["size"]

    def delete(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.store.delete(key)


def open_store(uri: str) -> Store:
    """The store at a URI: a local path, file://, or whatever obstore opens (s3://, gs://, az://)."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return LocalStore(Path(uri).expanduser().absolute())
    if scheme == "file":
        return LocalStore(Path("/" + rest.lstrip("/")))
    return ObjectStore(uri)


def resolve_uri(uri: str, what: str) -> str:
    """A URI that means the same to every process. Raises UserError for a relative path inside a submitted Ray job."""
    if "://" in uri:
        return uri
    path = Path(uri).expanduser()
    if not path.is_absolute() and "runtime_resources/working_dir_files" in os.getcwd():
        raise UserError(
            f"{what}: {uri!r} is a relative path, and a submitted job runs in a temporary folder that is deleted later; "
            "give an absolute path or a URI that every node reaches"
        )
    return str(path.absolute())


def local_folder(uri: str, what: str) -> Path:
    """The local folder behind a URI, for work that needs real files (training). Raises UserError for others."""
    store = open_store(resolve_uri(uri, what))
    if not isinstance(store, LocalStore):
        raise UserError(f"{what}: {uri} must be a folder that every worker reaches as a path (a shared filesystem)")
    return store.path


def read_table(path: str, what: str, ids: Sequence[str] = ("sample_id",)) -> pd.DataFrame:
    """A .csv, .tsv or .parquet table; `n/a` (BIDS) and empty cells are missing values. Raises UserError.

    Columns named in `ids` are text, so that subject 007 stays 007; a column is judged whole, so that it has one type.
    """
    suffix = Path(path).suffix.lower()
    try:
        if suffix == ".parquet":
            return pd.read_parquet(path)
        if suffix in (".csv", ".tsv"):
            separator = "\t" if suffix == ".tsv" else ","
            return pd.read_csv(path, sep=separator, na_values=["n/a"], dtype=dict.fromkeys(ids, str), low_memory=False)
    except FileNotFoundError:
        raise UserError(f"{what}: there is no table at {path}") from None
    except (OSError, ValueError, pd.errors.ParserError) as error:
        raise UserError(f"{what}: {path} cannot be read as a table: {error}") from None
    raise UserError(f"{what}: {path} must end in .csv, .tsv or .parquet")
