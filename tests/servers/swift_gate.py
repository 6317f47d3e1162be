"""A filter of the Swift proxy that lets one conditional PUT of a key through at a time, as S3 promises.

Swift looks whether a key exists when a request begins, and stores the object when its body has arrived: of two clients
that put the same key at the same moment both may be told 201 (measured: with eight, in two rounds of three). S3 decides
when the object is stored. Nothing that a client does can mend that, so the tests' server decides one by one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import eventlet.semaphore

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Gate:
    """WSGI middleware: conditional PUTs of one path wait for each other."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.waiting: dict[str, tuple[Any, int]] = {}

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] != "PUT" or "HTTP_IF_NONE_MATCH" not in environ:
            return self.app(environ, start_response)
        with self._alone(environ["PATH_INFO"]):
            return list(self.app(environ, start_response))

    @contextlib.contextmanager
    def _alone(self, path: str) -> Iterator[None]:
        # Green threads of one process: no switch happens between these lines.
        lock, users = self.waiting.get(path, (eventlet.semaphore.Semaphore(), 0))
        self.waiting[path] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            lock, users = self.waiting.pop(path)
            if users > 1:
                self.waiting[path] = (lock, users - 1)


def factory(_global: dict[str, str], **_local: str) -> Callable[[App], Gate]:
    """What the pipeline of the server calls."""
    return Gate
