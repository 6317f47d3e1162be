"""One Ray session per process: a cluster that was asked for, else a private one on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

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

import ray  # noqa: E402

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
    address = os.environ.get("RAY_ADDRESS")
    try:
        ray.init(address=address or "local", logging_level=logging.WARNING, log_to_driver=True)
    except ConnectionError as error:
        raise UserError(
            f"cannot join the Ray cluster that RAY_ADDRESS names ({address}): {str(error).splitlines()[0]}; "
            "a cluster with token authentication needs RAY_AUTH_MODE=token and the token"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def check_resources(workers: int, cpus: float, gpus: float, what: str) -> None:
    """Refuse a layout that this machine can never run; on a joined cluster nodes may still come, so only say so."""
    have = ray.cluster_resources()
    wanted = {"CPU": workers * cpus, "GPU": workers * gpus}
    short = [f"{wanted[k]:g} {k} wanted, {have.get(k, 0):g} there" for k in wanted if wanted[k] > have.get(k, 0) + 1e-9]
    if not short:
        return
    message = f"{what}: {workers} workers do not fit: {'; '.join(short)}"
    if os.environ.get("RAY_ADDRESS"):
        log.warning("%s; waiting for nodes to join", message)
        return
    raise UserError(f"{message}; lower runtime.workers or what each worker asks for")
