"""The server: loopback only, GET only, an address that nobody guesses, and nothing but what is listed here.

No part of a request becomes a path: it is looked up among the page's files, or it is a row number.
"""

from __future__ import annotations

import errno
import gzip
import json
import logging
import re
import secrets
import socketserver
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from brainsynth.errors import UserError
from brainsynth.viewer.view import View

log = logging.getLogger(__name__)
LOOPBACK = "127.0.0.1"
PAGE = Path(__file__).with_name("page")
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_VOLUME = re.compile(r"(volumes|labels)/(\d{1,9})\.nii")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""A browser that honours it talks to this server only. NiiVue has a font and a texture as data: images inside its script."""
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class ViewServer(ThreadingHTTPServer):
    """Listens as soon as it is made; `serve_forever` answers.

    The address has a random first part, so other users of the machine, and pages of other sites, do not find it.
    """

    daemon_threads = True

    def __init__(self, view: View, port: int = 0) -> None:
        """Raises UserError when the port is not available; 0 takes a free one."""
        self.view = view
        self.token = secrets.token_urlsafe(16)
        self.assets = {"" if key == "index.html" else key: value for key, value in _page_files().items()}
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            taken = "another program has it" if error.errno == errno.EADDRINUSE else error.strerror
            raise UserError(f"--port {port}: {taken}; give another, or none for a free one") from None
        except OverflowError:
            raise UserError(f"--port {port}: give a number from 0 to 65535") from None
        self.hosts = {f"{name}:{self.server_port}" for name in (LOOPBACK, "localhost")}

    def server_bind(self) -> None:
        """Without the look-up of this machine's name that HTTPServer makes, which may ask a name server."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = LOOPBACK, self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves in the middle of an answer is not an error."""
        log.debug("a request ended early", exc_info=True)

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"http://{LOOPBACK}:{self.server_port}/{self.token}/"


class _Handler(BaseHTTPRequestHandler):
    server: ViewServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "brainsynth", ""
    timeout = 60

    def do_GET(self) -> None:
        if self.headers.get_all("Host") is None or not set(self.headers.get_all("Host", [])) <= self.server.hosts:
            return self._plain(HTTPStatus.FORBIDDEN, "this server answers to 127.0.0.1 and localhost only")
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            return self._plain(HTTPStatus.BAD_REQUEST, "a GET has no body")
        _, token, name = [*self.path.split("/", 2), "", ""][:3]
        if not secrets.compare_digest(token.encode(), self.server.token.encode()) or self.path.count("/") < 2:
            return self._plain(HTTPStatus.NOT_FOUND, "open the address that `brainsynth view` printed")
        try:
            self._answer(name)
        except ConnectionError:
            raise
        except ValueError as error:  # a UserError is one
            self._failed(str(error))
        except Exception:
            log.exception("%s", self.path)
            self._failed("something unexpected went wrong; the terminal of `brainsynth view` says what")

    def parse_request(self) -> bool:
        """Any other method is refused before anything is looked up."""
        if not super().parse_request():
            return False
        if self.command != "GET":
            self._plain(HTTPStatus.METHOD_NOT_ALLOWED, "GET only", Allow="GET")
            return False
        return True

    def _answer(self, name: str) -> None:
        volume = _VOLUME.fullmatch(name)
        if name == "dataset.json":
            data, version = self.server.view.document()
            self._send(data, "application/json", version)
        elif volume is not None:
            view, row = self.server.view, int(volume[2])
            try:
                data = view.volume(row) if volume[1] == "volumes" else view.labels(row)
            except KeyError:
                what = "volume" if volume[1] == "volumes" else "label map"
                return self._plain(HTTPStatus.NOT_FOUND, f"row {row} has no {what}")
            self._send(data, "application/octet-stream", compressed=False)
        elif name in self.server.assets:
            self._send(*self.server.assets[name])
        else:
            self._plain(HTTPStatus.NOT_FOUND, "there is nothing of this name")

    def _send(self, data: bytes, kind: str, version: str = "", compressed: bool = True) -> None:
        tag = f'"{version}"'
        if version and self.headers.get("If-None-Match") == tag:
            return self._begin(HTTPStatus.NOT_MODIFIED, ETag=tag)
        packed = compressed and "gzip" in self.headers.get("Accept-Encoding", "")
        body = gzip.compress(data, 1, mtime=0) if packed else data
        encoding = {"Content-Encoding": "gzip"} if packed else {}
        tagged = {"ETag": tag} if version else {}
        caching = {"Cache-Control": "no-cache" if version else "no-store"}
        self._whole(HTTPStatus.OK, body, kind, **encoding, **tagged, **caching)

    def _failed(self, message: str) -> None:
        self._whole(HTTPStatus.INTERNAL_SERVER_ERROR, json.dumps({"error": message}).encode(), "application/json")

    def _plain(self, status: HTTPStatus, text: str, **headers: str) -> None:
        """A refusal; the connection is closed, since what else came with the request is not read."""
        self._whole(status, f"{text}\n".encode(), "text/plain; charset=utf-8", Connection="close", **headers)

    def _whole(self, status: HTTPStatus, body: bytes, kind: str, **headers: str) -> None:
        self._begin(status, **{"Content-Type": kind, "Content-Length": str(len(body))}, **headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _begin(self, status: HTTPStatus, **headers: str) -> None:
        self.send_response(status)
        for name, value in (_HEADERS | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)


def _page_files() -> dict[str, tuple[bytes, str]]:
    """Name → content and type of every file of the page that a browser asks for."""
    files = sorted(file for file in PAGE.rglob("*") if file.suffix in _TYPES)
    return {file.relative_to(PAGE).as_posix(): (file.read_bytes(), _TYPES[file.suffix]) for file in files}
