"""OpenStack Swift with its S3 API, on 127.0.0.1 and one temporary folder: a persistent object store that tests may end.

One process each for accounts, containers, objects and the proxy in front; one replica on a plain folder. Signatures
are checked and objects are files. Only one thing is added (`swift_gate.py`): a conditional put is decided atomically, as
S3 promises and Swift does not.
"""

from __future__ import annotations

import ctypes
import dataclasses
import datetime
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

BUCKET = "datasets"
REGION = "us-east-1"
ACCESS_KEY, SECRET_KEY = "tests:reader", "a-secret-of-the-tests"
_START_SECONDS = 180.0
_REPO = Path(__file__).parents[2]
_SCRIPTS = Path(sys.executable).parent

_BACKEND = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {root}
devices = {root}/devices
mount_check = false
fallocate_reserve = 0
workers = 0
user =
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""
_PROXY = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {root}
workers = 0
user =
[pipeline:main]
pipeline = catch_errors proxy-logging cache gate listing_formats bulk s3api tempauth slo dlo proxy-logging proxy-server
[app:proxy-server]
use = egg:swift#proxy
allow_account_management = true
account_autocreate = true
[filter:tempauth]
use = egg:swift#tempauth
user_{user} = {secret} .admin
[filter:s3api]
use = egg:swift#s3api
location = {region}
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:proxy-logging]
use = egg:swift#proxy_logging
[filter:cache]
use = egg:swift#memcache
memcache_servers =
[filter:gate]
paste.filter_factory = tests.servers.swift_gate:factory
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:bulk]
use = egg:swift#bulk
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
"""
_COMMON = "[swift-hash]\nswift_hash_path_suffix = tests\nswift_hash_path_prefix = tests\n"


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """An address of the S3 API, and what a client needs to be let in."""

    url: str
    bucket: str = BUCKET

    def environment(self) -> dict[str, str]:
        """What a user sets: credentials and address, all from the environment."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": REGION,
            "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "false",
        }

    def uri(self, prefix: str) -> str:
        """The URI of a folder in the bucket."""
        return f"s3://{self.bucket}/{prefix}"


def installed() -> bool:
    """Whether Swift can be started here."""
    return importlib.util.find_spec("swift") is not None


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """Tests that are killed leave no server behind (Linux, as Swift is)."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class SwiftServer:
    """Four Swift processes on free ports, ended by their ids."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="swift-"))
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            self.endpoint = Endpoint(self._start())
        except BaseException:
            self.stop()
            raise

    def _start(self) -> str:
        ports = dict(zip(("account", "container", "object", "proxy"), free_ports(4), strict=True))
        (self.root / "devices" / "disk").mkdir(parents=True)
        (self.root / "swift.conf").write_text(_COMMON)
        # The programs look for swift.conf in a folder of the machine unless they are told.
        environment = {**os.environ, "SWIFT_CONF_FILE": str(self.root / "swift.conf"), "PYTHONPATH": str(_REPO)}
        for kind in ("account", "container", "object"):
            self._make_ring(kind, ports[kind], environment)
            text = _BACKEND.format(kind=kind, port=ports[kind], root=self.root)
            (self.root / f"{kind}.conf").write_text(text)
        user = ACCESS_KEY.replace(":", "_")
        text = _PROXY.format(port=ports["proxy"], root=self.root, user=user, secret=SECRET_KEY, region=REGION)
        (self.root / "proxy.conf").write_text(text)
        for kind in ports:
            with open(self.root / f"{kind}.log", "wb") as log:
                command = [_SCRIPTS / f"swift-{kind}-server", self.root / f"{kind}.conf", "--verbose"]
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, *map(str, command)],
                        stdout=log,
                        stderr=log,
                        env=environment,
                        cwd=self.root,
                        preexec_fn=_end_with_parent,
                    )
                )
        url = f"http://127.0.0.1:{ports['proxy']}"
        self._wait(url)
        return url

    def _make_ring(self, kind: str, port: int, environment: dict[str, str]) -> None:
        builder = [sys.executable, str(_SCRIPTS / "swift-ring-builder"), str(self.root / f"{kind}.builder")]
        for step in (["create", "4", "1", "1"], ["add", f"r1z1-127.0.0.1:{port}/disk", "1"], ["rebalance"]):
            done = subprocess.run([*builder, *step], capture_output=True, text=True, env=environment, timeout=60)
            if done.returncode != 0:
                raise RuntimeError(f"swift-ring-builder {step}: {done.stdout}{done.stderr}")

    def _wait(self, url: str) -> None:
        """Until the bucket is made, which needs all four processes."""
        deadline = time.monotonic() + _START_SECONDS
        while True:
            dead = [p for p in self._processes if p.poll() is not None]
            if dead or time.monotonic() > deadline:
                raise RuntimeError(f"Swift did not start:\n{self.log()}")
            try:
                make_bucket(Endpoint(url))
            except OSError:
                time.sleep(0.2)
            else:
                return

    def log(self) -> str:
        """The ends of the four logs."""
        logs = sorted(self.root.glob("*.log"))
        return "\n".join(f"--- {log.stem}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)

    def stop(self) -> None:
        """End the processes and remove the folder; once more is no error."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=10)
        self._processes.clear()
        shutil.rmtree(self.root, ignore_errors=True)


def make_bucket(endpoint: Endpoint) -> None:
    """Create the endpoint's bucket. Raises OSError."""
    import obstore
    from obstore.store import S3Store

    store = S3Store(
        bucket=endpoint.bucket,
        endpoint=endpoint.url,
        region=REGION,
        access_key_id=ACCESS_KEY,
        secret_access_key=SECRET_KEY,
        client_options={"allow_http": True},
    )
    signed = obstore.sign(store, "PUT", "", datetime.timedelta(minutes=5))
    with urllib.request.urlopen(urllib.request.Request(signed, method="PUT"), timeout=10):  # noqa: S310
        pass


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on now."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in held]
    for server in held:
        server.close()
    return ports
