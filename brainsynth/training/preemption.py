"""Being asked to save: by the job that is stopped, or by a machine that is about to go. Knows nothing of Ray."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from typing import Protocol


class Request(enum.IntEnum):
    """What is asked of a training between two steps; of several wishes the largest wins."""

    NOTHING = 0
    SAVE = 1
    """Save now and continue: the caller restarts the workers if they die."""
    LEAVE = 2
    """Save now and leave."""


Preempted = Callable[[], Request]
"""Looked at between steps. With several workers each of them calls it equally often."""


def never() -> Request:
    """Nobody asks."""
    return Request.NOTHING


class Left(Exception):
    """The training left because it was asked to; all its steps up to `step` are in a checkpoint."""

    def __init__(self, step: int) -> None:
        super().__init__(f"left after step {step}")
        self.step = step


class _Worker(Protocol):
    world_size: int

    def largest(self, values: list[float]) -> list[float]: ...


class Listener:
    """Asks between steps, so that all workers hear the same answer at the same step.

    One worker looks after every step. Several have to talk to agree, so they look about twice a second: how many steps
    that is they agree on each time.
    """

    _EVERY_S = 0.5

    def __init__(self, preempted: Preempted, worker: _Worker, start: int) -> None:
        self._preempted, self._worker = preempted, worker
        self._asked, self._next, self._when = start, start, time.monotonic()

    def request(self, step: int) -> Request:
        """What is asked, with `step` steps done."""
        if self._worker.world_size == 1:
            return self._preempted()
        if step < self._next:
            return Request.NOTHING
        now = time.monotonic()
        fits = int((step - self._asked) * self._EVERY_S / max(now - self._when, 1e-6))
        request, minus_steps = self._worker.largest([float(self._preempted()), -float(min(max(fits, 1), 1000))])
        self._asked, self._next, self._when = step, step - int(minus_steps), now
        return Request(int(request))
