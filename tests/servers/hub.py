"""A small Hugging Face hub on 127.0.0.1: one dataset repository, as far as an upload asks for it.

Files above `large` bytes go by LFS, as on the hub. It keeps everything in memory, and records what was sent.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler
from typing import Any, cast

from tests.servers.loopback import Loopback

TOKEN = "hf_right"  # noqa: S105


class Hub(Loopback):
    """`token` alone may write to `repo`. After `stop_after` uploads the next one gets no answer, and `reached` is set."""

    def __init__(self, repo: str = "ada/heads", token: str = TOKEN, large: int = 2000) -> None:
        self.repo, self.token, self.large = repo, token, large
        self.files: dict[str, bytes] = {".gitattributes": b"*.parquet filter=lfs"}
        self.lfs: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.commits: list[list[str]] = []
        self.uploads: list[str] = []
        self.read_only, self.stop_after, self.reached = False, -1, threading.Event()
        super().__init__(_Handler)

    def tree(self) -> list[dict[str, Any]]:
        out: list[dict[str, Any]] = []
        for path, data in self.files.items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _blob(data)}
            if path in self.lfs:
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            out.append(entry)
        return out


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return cast(Hub, self.server.owner)  # type: ignore[attr-defined]

    def _handle(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if match := re.fullmatch(r"/objects/(\w+)", path):  # a signed address: no token
            return self._upload(match[1], body)
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._answer({"error": "Invalid credentials in Authorization header"}, 401)
        if f"/{hub.repo}/" not in path.replace(".git/", "/"):
            return self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if path.endswith("/auth-check/write"):
            return self._answer({"error": "Forbidden"}, 403) if hub.read_only else self._answer({})
        if "/tree/" in path:
            return self._answer(hub.tree())
        if "/preupload/" in path:
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["size"] > hub.large else "regular",
                    "shouldIgnore": False,
                    "oid": _blob(hub.files[f["path"]]) if f["path"] in hub.files else None,
                }
                for f in json.loads(body)["files"]
            ]
            return self._answer({"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            return self._answer({"objects": [self._action(one) for one in json.loads(body)["objects"]]})
        if "/commit/" in path:
            return self._commit([json.loads(line) for line in body.splitlines()])
        return self._answer({"error": f"what is {path}?"}, 500)

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def _action(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.hub.objects:
            return wanted
        return wanted | {"actions": {"upload": {"href": f"{self.hub.url}/objects/{wanted['oid']}"}}}

    def _upload(self, oid: str, body: bytes) -> None:
        hub = self.hub
        if len(hub.uploads) == hub.stop_after:
            hub.reached.set()
            threading.Event().wait(10)  # until the client is killed
        assert hashlib.sha256(body).hexdigest() == oid
        hub.objects[oid] = body
        hub.uploads.append(oid)
        self._answer({})

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        hub, sent = self.hub, []
        for value in (line["value"] for line in lines if line["key"] in ("file", "lfsFile")):
            large = "oid" in value
            hub.files[value["path"]] = hub.objects[value["oid"]] if large else base64.b64decode(value["content"])
            (hub.lfs.add if large else hub.lfs.discard)(value["path"])
            sent.append(value["path"])
        hub.commits.append(sent)
        oid = f"{len(hub.commits):040d}"
        self._answer({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/datasets/{hub.repo}/commit/{oid}"})

    def _answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Uploads and commits are recorded, not printed."""
