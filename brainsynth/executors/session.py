"""One Ray session per process: a cluster that was asked for, else a private one on this machine.

Anyone who reaches a Ray port and knows its token can run code as this user. So a private session listens on the loopback
interface alone, and its token is readable by this user alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from brainsynth.errors import UserError

# Read when Ray is imported. A user's own values win.
_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # machines with private data report nothing
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a report returns after the next poll
    "RAY_COLOR_PREFIX": "0",
    "RAY_DATA_LOG_LEVEL": "WARNING",  # our own progress line says it
    "RAY_raylet_start_wait_time_s": "120",  # a busy machine needs more than the default 30 s
}
for _name, _value in _DEFAULTS.items():
    os.environ.setdefault(_name, _value)

# Ray's switch for machines that are no cluster (the default on Windows and macOS): every server listens on 127.0.0.1. It
# is read when Ray is imported, and taken back, so that a `ray start` below this process does not inherit it.
_ONE_MACHINE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_alone = not os.environ.get("RAY_ADDRESS") and _ONE_MACHINE not in os.environ
if _alone:
    os.environ[_ONE_MACHINE] = "0"

import ray  # noqa: E402
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # noqa: E402  # compiled

if _alone:
    del os.environ[_ONE_MACHINE]

LOOPBACK = "127.0.0.1"
JOIN_S = 30.0
"""How long a cluster that was asked for may take until it listens: its head may be starting, too."""
_HERE = (LOOPBACK, "localhost", "::1")
_CANNOT_JOIN = "cannot join the Ray cluster that RAY_ADDRESS names"
log = logging.getLogger(__name__)
logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)


@contextlib.contextmanager
def ray_session() -> Iterator[None]:
    """Join the session that is there, the cluster that RAY_ADDRESS names, or start a private local one.

    A bare `ray.init()` attaches to whatever Ray runs on the host; this never does.

    Raises:
        UserError: nobody answers at that address, the cluster refuses, or Ray does not start on this machine.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    private: dict[str, Any] = {}
    if address == "local":
        _private_token()
        _read_the_token_again()
        private["dashboard_host"] = LOOPBACK
    else:
        _wait_for(address)
    try:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=True, **private)
    except Exception as error:  # Ray raises plain ones, too
        raise UserError(_why(address, error)) from error
    try:
        yield
    finally:
        ray.shutdown()


def _why(address: str, error: Exception) -> str:
    said = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
    if address == "local":
        return (
            f"Ray does not start on this machine: {said}; it may be too busy, or short of memory or of room in /tmp: run "
            "the same command again, or do without Ray (runtime.workers=0); its logs are in /tmp/ray/session_latest/logs"
        )
    return (
        f"{_CANNOT_JOIN} ({address}): {said}; a cluster with token authentication needs RAY_AUTH_MODE=token and the token, "
        "and a program joins it from one of its own nodes"
    )


def _read_the_token_again() -> None:
    """Forget the token of an earlier session of this process: the servers that start now read theirs from where it lies now.

    Without this, a process whose HOME or RAY_AUTH_TOKEN_PATH changed between two sessions is refused by its own servers.
    """
    AuthenticationTokenLoader.instance().reset_cache()


def _wait_for(address: str) -> None:
    """Wait until somebody listens at the address of a cluster: Ray itself tries for many minutes, and hardly says so.

    Raises UserError after JOIN_S seconds.
    """
    client = address.startswith("ray://")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit():
        return  # `auto`, or what Ray tells of at once
    here = host in _HERE and not client
    place = (ray.util.get_node_ip_address() if here else host, int(port))  # type: ignore[no-untyped-call]  # as Ray does
    deadline = time.monotonic() + JOIN_S
    while (problem := _refusal(place, max(1.0, deadline - time.monotonic()))) is not None:
        if time.monotonic() >= deadline:
            mend = "start it with `ray start --head`, correct RAY_ADDRESS, or leave it out for a private session"
            if here and _refusal((LOOPBACK, int(port)), 1.0) is None:
                mend = f"it listens on {LOOPBACK} alone: set {_ONE_MACHINE}=0 to join it from this machine"
            tried = f"{problem}, tried for {JOIN_S:g} s"
            raise UserError(f"{_CANNOT_JOIN} ({address}): nobody listens at {place[0]} port {port} ({tried}); {mend}")
        log.warning("waiting for the Ray cluster at %s: %s", address, problem)
        time.sleep(min(5.0, JOIN_S / 4))


def _refusal(place: tuple[str, int], timeout_s: float) -> str | None:
    """Why no connection can be made; None where it can."""
    try:
        socket.create_connection(place, timeout_s).close()
    except (OSError, OverflowError, UnicodeError) as error:
        return str(getattr(error, "strerror", None) or error)
    return None


def _private_token() -> None:
    """The token of a private session, in a file that only this user may read; Ray itself would write it for all to read.

    A file that is there keeps its token. A user's own RAY_AUTH_TOKEN, or RAY_AUTH_MODE=disabled, is left alone.
    """
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Linked into place when written, so that a session that starts at the same time never reads half a token.
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".auth_token-") as file:
            file.write(secrets.token_hex(32))
            file.flush()
            with contextlib.suppress(FileExistsError):
                os.link(file.name, path)
    except OSError as error:
        if path.is_file():
            return  # a mounted secret cannot be changed; it belongs to the one who mounted it
        raise UserError(
            f"cannot write Ray's token to {path}: {error.strerror}; set RAY_AUTH_TOKEN_PATH to a file that can be written"
        ) from None
    with contextlib.suppress(OSError):
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
