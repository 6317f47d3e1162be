"""A folder of this machine that keeps what was read over the network, under the digest of the dataset that it belongs to.

An entry is the sha256 of its bytes, then the bytes: one that a kill or a disk has cut is read again. Two addresses of one
dataset share their entries; a dataset that was repaired has another digest, and none. To empty it, delete the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from brainsynth.reading.files import Parts

log = logging.getLogger(__name__)
_SHA = hashlib.sha256().digest_size


class Cache:
    """The entries of one dataset."""

    def __init__(self, folder: str, digest: str) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ValueError(f"{ascii(digest)[:80]} is not the digest of a dataset")
        self.folder = Path(folder).expanduser().absolute() / digest

    def get(self, name: str) -> bytes | None:
        """The bytes that were kept under a name; None where there are none, or others."""
        try:
            entry = self._file(name).read_bytes()
        except OSError:
            return None
        data = entry[_SHA:]
        return data if hashlib.sha256(data).digest() == entry[:_SHA] else None

    def put(self, name: str, data: bytes) -> None:
        """Keep bytes under a name. A disk that is full, or read-only, keeps nothing, and reading continues."""
        file = self._file(name)
        written = file.with_name(f".tmp-{uuid.uuid4().hex}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            written.write_bytes(hashlib.sha256(data).digest() + data)
            os.replace(written, file)
        except OSError as error:
            log.warning("the cache %s keeps nothing: %s", self.folder, error.strerror)
            with contextlib.suppress(OSError):
                written.unlink()

    def _file(self, name: str) -> Path:
        name = hashlib.sha256(name.encode()).hexdigest()
        return self.folder / name[:2] / name


class CachedParts:
    """Parts of objects, as `RemoteParts` gives them, each read once; nothing is kept that `intact` finds damaged."""

    def __init__(self, parts: Parts, cache: Cache, intact: Callable[[bytes], bool]) -> None:
        self.parts, self.cache, self.intact = parts, cache, intact

    def tail(self, key: str, length: int) -> tuple[bytes, int]:
        """The last bytes of an object, and its size."""

        name = f"{key} tail {length}"
        kept = self.cache.get(name)
        if kept is not None:
            return kept[8:], int.from_bytes(kept[:8], "little")
        data, size = self.parts.tail(key, length)
        if self.intact(data):
            self.cache.put(name, size.to_bytes(8, "little") + data)
        return data, size

    def read(self, key: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """As `RemoteParts.read`. Spans come in pairs, a chunk and the checksum behind it: one entry holds both."""
        pairs = list(zip(spans[::2], spans[1::2], strict=True))
        names = [f"{key} {start}-{stop}" for (start, _), (_, stop) in pairs]
        entries = [self.cache.get(name) for name in names]
        wanted = [span for pair, entry in zip(pairs, entries, strict=True) if entry is None for span in pair]
        fresh = iter(self.parts.read(key, wanted) if wanted else [])
        read: list[bytes] = []
        for ((start, stop), _), name, entry in zip(pairs, names, entries, strict=True):
            if entry is None:
                entry = next(fresh) + next(fresh)
                if self.intact(entry):
                    self.cache.put(name, entry)
            read += [entry[: stop - start], entry[stop - start :]]
        return read
