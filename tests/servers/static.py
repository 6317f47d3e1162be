"""A static web server of one folder, on 127.0.0.1: parts of files (RFC 9110 ranges), and a record of every request.

`python -m http.server` gives no parts of files; nginx, Apache, S3 websites and the hub do.
"""

from __future__ import annotations

import dataclasses
import re
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import cast

from tests.servers.loopback import Loopback


@dataclasses.dataclass(frozen=True)
class Request:
    """One request, and how many bytes of a file answered it."""

    method: str
    path: str
    asked: str
    size: int
    token: str


class StaticServer(Loopback):
    """Serves the files of `folder`, never a list of them.

    `ranges` False answers with whole files; `status` answers every request with that error; `redirect` sends every request
    on to another address; `delay_s` waits before each answer.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranges, self.status, self.delay_s, self.redirect = True, 0, 0.0, ""
        self.requests: list[Request] = []
        super().__init__(_Handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def static(self) -> StaticServer:
        return cast(StaticServer, self.server.owner)  # type: ignore[attr-defined]

    def do_GET(self) -> None:
        static = self.static
        time.sleep(static.delay_s)
        asked = self.headers.get("Range", "")
        if static.redirect:
            return self._answer(302, b"", {"Location": static.redirect + self.path}, asked)
        file = static.folder / self.path.lstrip("/")
        if static.status or not file.is_file():
            return self._answer(static.status or 404, b"<html>no</html>", {}, asked)
        data = file.read_bytes()
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", asked)
        if span is None or not static.ranges:
            return self._answer(200, data, {}, asked)
        first, last = span.groups()
        start = int(first) if first else max(0, len(data) - int(last))
        stop = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= len(data):
            return self._answer(416, b"", {"Content-Range": f"bytes */{len(data)}"}, asked)
        return self._answer(206, data[start:stop], {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, asked)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(405, b"", {}, "")

    def _answer(self, status: int, body: bytes, headers: dict[str, str], asked: str) -> None:
        sent = Request(self.command, self.path, asked, len(body), self.headers.get("Authorization", ""))
        self.static.requests.append(sent)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body)), "ETag": '"1"'}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are recorded, not printed."""
