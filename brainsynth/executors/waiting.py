"""Says what a run waits for: a shard that is in work for long, by its number, its worker and how long.

Workers leave notes of what they work on (storage/attempts.py), so a worker that is stopped or hangs is named from outside.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable

from brainsynth.storage.attempts import in_work, worker_of
from brainsynth.storage.filesystem import Store

log = logging.getLogger(__name__)
_SLOW, _FIRST_S, _SHOWN = 3.0, 60.0, 5


class Waiting:
    """A thread that looks while the run lasts: `with Waiting(...) as waiting`, then `waiting.came(...)` at each result."""

    def __init__(self, store: Store, shards: Iterable[int], every_s: float) -> None:
        """Lines come when a shard took longer than two `every_s` and three times the longest so far, then ever rarer."""
        self.store, self.left, self.every_s = store, set(shards), max(1.0, every_s)
        self.longest_s: float | None = None
        self._seen: dict[str, float] = {}
        self._last = self._began = time.monotonic()
        self._next_s = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="waiting", daemon=True)

    def __enter__(self) -> Waiting:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def came(self, shard: int, seconds: float) -> None:
        """A shard is committed, which took so long."""
        self.left.discard(shard)
        self.longest_s = max(self.longest_s or 0.0, seconds)
        self._last = time.monotonic()

    @property
    def patience_s(self) -> float:
        """How long a shard may take before it is worth a line; the first one waits for imports and models, too."""
        return _FIRST_S if self.longest_s is None else max(2 * self.every_s, _SLOW * self.longest_s)

    def _look(self) -> None:
        while not self._over.wait(self.every_s):
            try:
                line = self.line(time.monotonic())
            except Exception as error:  # a run does not end for want of a line
                log.debug("what is waited for is not known: %s", error)
                continue
            if line and not self._over.is_set():
                log.warning("%s", line)

    def line(self, now: float) -> str | None:
        """What is waited for; None where nothing takes long, or where it was said lately."""
        notes = {key: shard for key, shard in in_work(self.store).items() if shard in self.left}
        self._seen = {key: self._seen.get(key, now) for key in notes}
        ages = sorted(((now - self._seen[key], key) for key in notes), reverse=True)
        slow = [(age, key) for age, key in ages if age > self.patience_s]
        silent_s = now - self._last
        longest = max([age for age, _ in slow], default=silent_s if silent_s > self.patience_s else 0.0)
        if not longest:
            self._next_s = 0.0
            return None
        if longest < self._next_s:
            return None
        self._next_s = 2 * longest
        by_shard = {notes[key]: (age, key) for age, key in reversed(slow or ages)}
        named = [
            f"shard {shard} for {age:.0f} s (process {worker_of(self.store, key) or 'unknown'})"
            for shard, (age, key) in list(by_shard.items())[:_SHOWN]
        ]
        usual = "" if self.longest_s is None else f"; the longest so far took {self.longest_s:.1f} s"
        what = ", ".join(named) or "shards that a worker was given and has not begun"
        left = ", ".join(map(str, sorted(self.left)[: 2 * _SHOWN])) + (", …" if len(self.left) > 2 * _SHOWN else "")
        silent = f"; no shard was committed for {silent_s:.0f} s" if silent_s > self.patience_s else ""
        return f"waiting for {what}{usual}{silent}; {len(self.left)} not committed yet: {left}"
