"""Lines that say how far long work is, on any terminal, and what Ctrl-C does before there is any work."""

from __future__ import annotations

import codecs
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

INTERRUPTED = 130
"""The shell's code for SIGINT."""
INTERRUPTED_TEXT = "interrupted; rerun the same command to resume"
_IN_ASCII = {"→": "->", "…": "...", "–": "-", "—": "-", "×": "x", "−": "-", "≤": "<=", "≥": ">=", "²": "^2", "³": "^3"}


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that a terminal cannot show."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    shown = (_IN_ASCII.get(c, ascii(c)[1:-1]) for c in error.object[error.start : error.end])
    return "".join(shown), error.end


codecs.register_error("brainsynth-ascii", _in_ascii)


def print_on_any_terminal() -> None:
    """A terminal or a log that is not UTF-8 gets `->` for an arrow, and never ends the run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="brainsynth-ascii")


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Ctrl-C ends the process with one sentence: raised in the midst of an import, it may come out as any error."""
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not default or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{INTERRUPTED_TEXT}\n".encode())
    os._exit(INTERRUPTED)


def configure_logging() -> None:
    """Our own lines on standard output, with the time; other libraries' only from warnings on."""
    print_on_any_terminal()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    logging.getLogger("brainsynth").setLevel(logging.INFO)


def in_minutes(seconds: float) -> str:
    """Seconds as every progress line shows them: 4m05s."""
    return f"{seconds // 60:.0f}m{int(seconds % 60):02d}s"
