"""Notes of which worker works on what, so that a row that kills its worker is recognised and cannot do so forever.

A note is put when a worker starts on a shard and taken away when it commits or fails with an error. A note that is left
says that the worker died. No decision looks at a clock.
"""

from __future__ import annotations

import os
import re
import socket
import uuid
from collections.abc import Iterator

from brainsynth.storage.filesystem import Store

FOLDER = "attempts"


def in_work(store: Store) -> dict[str, int]:
    """Every note that is there → its shard."""
    named = [(key, re.match(rf"{FOLDER}/shard-(\d+)-", key)) for key, _ in store.list(FOLDER)]
    return {key: int(match[1]) for key, match in named if match}


def worker_of(store: Store, note: str) -> str:
    """Which process put a note, as `PID on HOST`; empty where that is not known (any more)."""
    try:
        return store.read(note).decode(errors="replace")[:200]
    except OSError:
        return ""


class Attempts:
    """The attempts at one shard."""

    def __init__(self, store: Store, shard: int) -> None:
        self.store, self.shard = store, shard
        self._mine: list[str] = []

    def begin(self, row: int | None = None) -> int:
        """Note a start on the shard, or on one row of it; returns how many earlier starts ended in a death."""
        prefix = self._prefix(row)
        deaths = sum(key not in self._mine for key in self._notes(prefix))
        note = f"{prefix}{uuid.uuid4().hex}"
        self.store.write(note, f"{os.getpid()} on {socket.gethostname()}".encode())
        self._mine.append(note)
        return deaths

    def survived(self, row: int | None = None) -> None:
        """Take back what this worker noted of the shard, or of one row: it is alive."""
        for note in [note for note in self._mine if row is None or note.startswith(self._prefix(row))]:
            self._mine.remove(note)
            self.store.delete(note)

    def clear(self) -> None:
        """Forget every attempt: the shard is committed."""
        for note in list(self._notes(f"{FOLDER}/shard-{self.shard:06d}-")):
            self.store.delete(note)
        self._mine.clear()

    def _notes(self, prefix: str) -> Iterator[str]:
        return (key for key, _ in self.store.list(FOLDER) if key.startswith(prefix))

    def _prefix(self, row: int | None) -> str:
        return f"{FOLDER}/shard-{self.shard:06d}-{'all' if row is None else f'row-{row}'}-"
