"""One Ray session per process: a cluster that was asked for, else a private one on this machine.

Whoever reaches a Ray port and knows its token can run code as this user. So a private session listens on the loopback
interface alone, and its token is readable by this user alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

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
# is read when Ray is imported, and taken back, so that a `ray start` below this process is not told the same.
_ONE_MACHINE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_alone = not os.environ.get("RAY_ADDRESS") and _ONE_MACHINE not in os.environ
if _alone:
    os.environ[_ONE_MACHINE] = "0"

import ray  # noqa: E402

if _alone:
    del os.environ[_ONE_MACHINE]

LOOPBACK = "127.0.0.1"
log = logging.getLogger(__name__)
logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)


@contextlib.contextmanager
def ray_session() -> Iterator[None]:
    """Join the session that is there, the cluster that RAY_ADDRESS names, or start a private local one.

    A bare `ray.init()` attaches to whatever Ray runs on the host; this never does.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    private: dict[str, str] = {}
    if address == "local":
        _private_token()
        private["dashboard_host"] = LOOPBACK
    try:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=True, **private)
    except ConnectionError as error:
        raise UserError(
            f"cannot join the Ray cluster that RAY_ADDRESS names ({address}): {str(error).splitlines()[0]}; "
            "a cluster with token authentication needs RAY_AUTH_MODE=token and the token"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


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
            return  # a mounted secret cannot be changed, and is whoever's mounted it
        raise UserError(
            f"cannot write Ray's token to {path}: {error.strerror}; set RAY_AUTH_TOKEN_PATH to a file that can be written"
        ) from None
    with contextlib.suppress(OSError):
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
