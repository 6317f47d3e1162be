"""What ends a run from outside: nothing moves any more (exit code 75), or SIGTERM asks it to go (143).

Both leave at once: what is committed is kept, and the same command resumes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

log = logging.getLogger(__name__)
STALLED = 75
"""EX_TEMPFAIL: run the same command again."""
TERMINATED = 128 + signal.SIGTERM
GRACE_S = 2.0
"""How long work that is about to be committed may still arrive after SIGTERM; Ray sends SIGKILL after 3 s."""
_TABLE_S = 30.0
_PATIENCE = 10.0
STARTUP_S = 300.0
"""The first shard may take so much longer: Ray starts, workers import torch and load the model."""


class Watch:
    """Watches over a run while it lasts: `with Watch(...) as watch`, then `watch.progress()` at each committed shard."""

    def __init__(self, stall_timeout_s: float, resources: Callable[[], str]) -> None:
        """Without progress for `stall_timeout_s` (0: for ever), or for 10 times the longest wait so far, the run ends."""
        self.stall_timeout_s, self.resources = stall_timeout_s, resources
        self.leaving = threading.Event()
        """SIGTERM has come: begin nothing new."""
        self.committed = 0
        self._longest_s, self._last = 0.0, time.monotonic()
        self._over = threading.Event()
        self._read, self._write = os.pipe()
        self._previous: object = None

    def __enter__(self) -> Watch:
        threading.Thread(target=self._wait_for_stall, name="stall-watch", daemon=True).start()
        threading.Thread(target=self._wait_for_signal, name="signal-watch", daemon=True).start()
        return self

    def listen(self) -> None:
        """Take SIGTERM from here on. To be called after Ray has started, which takes it for itself."""
        if threading.current_thread() is not threading.main_thread():
            return
        # The handler runs when the main thread comes back from C++, which may be never; the byte in the pipe comes at once.
        self._previous = signal.signal(signal.SIGTERM, _noted)
        os.set_blocking(self._write, False)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

    def progress(self) -> None:
        """A shard is committed."""
        now = time.monotonic()
        if self.committed:
            self._longest_s = max(self._longest_s, now - self._last)
        self._last = now
        self.committed += 1

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self.leaving.is_set():
            time.sleep(2 * GRACE_S)  # the other thread ends the process; what would come now must not begin
        if self._previous is not None:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, self._previous)  # type: ignore[arg-type]
        os.close(self._write)

    def _wait_for_signal(self) -> None:
        while byte := os.read(self._read, 1):
            if byte[0] != signal.SIGTERM:
                continue
            self.leaving.set()
            log.warning("SIGTERM: shards that are about to be committed may arrive for %g s more", GRACE_S)
            self._over.wait(GRACE_S)
            log.warning("interrupted; this run committed %d shards; rerun the same command to resume", self.committed)
            leave(TERMINATED)
        os.close(self._read)

    def _wait_for_stall(self) -> None:
        while self.stall_timeout_s and not self._over.wait(min(1.0, self.stall_timeout_s / 4)):
            allowed_s = max(self.stall_timeout_s, _PATIENCE * self._longest_s)
            if not self.committed:
                allowed_s = self.stall_timeout_s + STARTUP_S
            silent_s = time.monotonic() - self._last
            if silent_s > allowed_s:
                log.error(
                    "no shard was committed for %.0f s (runtime.stall_timeout_s %g): the run is ended; look at the stacks "
                    "and resources below, then run the same command again to resume, with a larger stall_timeout_s if a "
                    "shard really takes so long",
                    silent_s,
                    self.stall_timeout_s,
                )
                self._dump()
                leave(STALLED)

    def _dump(self) -> None:
        table = threading.Thread(target=self._print_resources, daemon=True)
        table.start()
        table.join(_TABLE_S)  # the query itself may hang
        if table.is_alive():
            print(f"the resources could not be read within {_TABLE_S:g} s", flush=True)
        sys.stdout.flush()
        with contextlib.suppress(OSError, ValueError):
            faulthandler.dump_traceback(all_threads=True)

    def _print_resources(self) -> None:
        try:
            print(self.resources(), flush=True)
        except Exception as error:
            print(f"the resources cannot be read: {error}", flush=True)


class StackAlarm:
    """Dumps the stacks of this worker when its calls take too long; works while every Python thread is stuck."""

    def __init__(self, after_s: float) -> None:
        self.after_s = after_s
        self._calls = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self._calls += 1
            self._rearm()

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._calls -= 1
            self._rearm()

    def _rearm(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._calls and self.after_s and sys.__stderr__ is not None:
            faulthandler.dump_traceback_later(self.after_s, repeat=False, file=sys.__stderr__)


def _noted(number: int, frame: FrameType | None) -> None:
    """Do nothing: the byte in the pipe does it."""


def leave(code: int) -> None:
    """End this process now, whatever its threads are in."""
    logging.shutdown()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
