"""Run as a program: a private Ray session, looked at from outside. Prints one line of JSON."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import socket
import stat
import struct
import sys
import urllib.error
import urllib.request
from pathlib import Path


def family() -> list[int]:
    """This process and all that descend from it."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = [os.getpid()]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def listening() -> dict[str, str]:
    """address:port → program, of every TCP socket on which this family listens."""
    sockets = {}
    for table, size in (("tcp", 4), ("tcp6", 16)):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A":
                packed, port = bytes.fromhex(local.split(":")[0]), int(local.split(":")[1], 16)
                words = struct.unpack(f"<{size // 4}I", packed)
                sockets[inode] = (ipaddress.ip_address(struct.pack(f">{size // 4}I", *words)), port)
    found = {}
    for pid in family():
        with contextlib.suppress(OSError):
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    target = os.readlink(descriptor)
                    if target.startswith("socket:[") and target[8:-1] in sockets:
                        address, port = sockets[target[8:-1]]
                        found[f"{getattr(address, 'ipv4_mapped', None) or address}:{port}"] = name
    return found


def answer(url: str, token: str | None) -> int:
    """The HTTP status of a request, with or without a token."""
    request = urllib.request.Request(url)  # noqa: S310
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def main() -> None:
    """The session of the package, or with `--bare` one by plain `ray.init`, for comparison."""
    if "--bare" in sys.argv:
        import ray

        context: contextlib.AbstractContextManager[object] = ray.init(address="local", include_dashboard=True)
    else:
        from brainsynth.executors.session import ray_session

        context = ray_session()
    with context:
        import ray

        ray.get(ray.remote(lambda: os.getpid()).remote())
        token_file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
        token = token_file.read_text() if token_file.exists() else ""
        dashboard = f"http://{ray.get_runtime_context().worker.node.webui_url}"  # type: ignore[attr-defined]
        jobs = f"{dashboard}/api/jobs/"
        facts = {
            "listening": listening(),
            "addresses of this machine": socket.gethostbyname_ex(socket.gethostname())[2],
            "node": ray.util.get_node_ip_address(),
            "dashboard": dashboard,
            "without token": answer(jobs, None),
            "with another token": answer(jobs, "0" * 64),
            "with token": answer(jobs, token),
            "token length": len(token),
            "token mode": oct(stat.S_IMODE(token_file.stat().st_mode)),
            "usage statistics": os.environ.get("RAY_USAGE_STATS_ENABLED"),
            "switch left behind": os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"),
        }
    print("FACTS " + json.dumps(facts))


if __name__ == "__main__":
    main()
