"""A proxy in front of an object store that breaks a share of the requests, each in a known way, and counts them.

    error  500 or 503 instead of passing the request on
    reset  the connection is dropped before the request is passed on
    slow   the answer comes late
    lost   the request is carried out, and the connection is dropped before the answer
    cut    the request is carried out, and the connection is dropped in the middle of the answer

The last two leave the client in doubt whether its write was carried out.
"""

from __future__ import annotations

import collections
import dataclasses
import http.client
import random
import socket
import struct
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.servers.swift import Endpoint

KINDS = ("error", "reset", "slow", "lost", "cut")
MIX = {"error": 0.08, "reset": 0.06, "slow": 0.05, "lost": 0.06, "cut": 0.05}
"""Three requests of ten fail."""
_HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclasses.dataclass(frozen=True)
class Request:
    """One request that came by, and what was done to it ("" for nothing)."""

    method: str
    path: str
    fault: str


class FaultProxy:
    """Passes requests on to `upstream`; `rates` says which share of them meets which fault."""

    def __init__(self, upstream: Endpoint, seed: int = 0, slow_seconds: float = 0.1) -> None:
        self.upstream = urllib.parse.urlsplit(upstream.url)
        self.rates: dict[str, float] = {}
        self.slow_seconds = slow_seconds
        self.requests: list[Request] = []
        self._forced: collections.deque[tuple[str, str]] = collections.deque()
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.endpoint = dataclasses.replace(upstream, url=f"http://127.0.0.1:{self._server.server_port}")
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Serve no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)

    def reset(self, rates: dict[str, float] | None = None) -> None:
        """Forget what was counted, and break such shares of the requests from now on (none by default)."""
        unknown = set(rates or {}) - set(KINDS)
        if unknown:
            raise ValueError(f"no such faults: {unknown}")
        with self._lock:
            self.rates = dict(rates or {})
            self.requests.clear()
            self._forced.clear()

    def force(self, fault: str, method: str, times: int = 1) -> None:
        """Break the next requests of a method for certain, before chance has a say."""
        self._forced.extend([(fault, method)] * times)

    def counts(self) -> collections.Counter[str]:
        """How many requests met each fault since `reset`."""
        with self._lock:
            return collections.Counter(request.fault for request in self.requests if request.fault)

    def draw(self, method: str, path: str) -> str:
        """The fault of this request."""
        with self._lock:
            fault = self._choose(method)
            self.requests.append(Request(method, path, fault))
        return fault

    def _choose(self, method: str) -> str:
        if self._forced and self._forced[0][1] == method:
            return self._forced.popleft()[0]
        point = self._random.random()
        for kind, rate in self.rates.items():
            point -= rate
            if point < 0:
                return kind
        return ""

    def error_status(self) -> int:
        """Which error this time."""
        with self._lock:
            return self._random.choice((500, 503))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    proxy: FaultProxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _pass(self) -> None:
        proxy = self.server.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = proxy.draw(self.command, self.path)
        if fault == "reset":
            return self._drop()
        if fault == "error":
            status = proxy.error_status()
            return self._answer(status, [], b"<Error><Code>InternalError</Code></Error>")
        if fault == "slow":
            time.sleep(proxy.slow_seconds)
        status, headers, data = self._forward(body)
        if fault == "lost":
            return self._drop()
        if fault == "cut":
            return self._answer(status, headers, data, cut=True)
        return self._answer(status, headers, data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass  # noqa: N815

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = self.server.proxy.upstream
        connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port, timeout=60)
        try:
            # The signature is about the Host header that the client sent: everything is passed on as it came.
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP_HEADERS - {"content-length"}:
                    connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool = False) -> None:
        length = next((v for k, v in headers if k.lower() == "content-length"), "0")
        size = length if self.command == "HEAD" else str(len(data))
        lines = [f"{name}: {value}" for name, value in headers if name.lower() not in _HOP_HEADERS]
        head = "\r\n".join(
            [f"HTTP/1.1 {status} {http.client.responses.get(status, '')}", *lines, f"Content-Length: {size}"]
        )
        whole = f"{head}\r\n\r\n".encode("latin-1") + (b"" if self.command == "HEAD" else data)
        if not cut:
            self.wfile.write(whole)
            return
        self.wfile.write(whole[: len(whole) - max(1, len(data) // 2)])
        # Without linger the half that was sent is thrown away with the connection: here it shall arrive.
        self.close_connection = True

    def _drop(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal of the tests."""
