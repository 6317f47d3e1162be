"""A Ray cluster of two worker nodes of one CPU each on this machine, one of which may be lost half-way.

`python -m tests.chaos.two_nodes COMMAND …` runs commands on it one after the other, as `ray job submit` would.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from brainsynth.executors.session import ray
from brainsynth.storage.commit import committed_shards
from brainsynth.storage.filesystem import open_store


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Any, Any]]:
    """The cluster, and its second worker node; the head takes no work."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        stays = cluster.add_node(num_cpus=1)
        goes = cluster.add_node(num_cpus=1)
        assert stays is not goes
        yield cluster, goes
    finally:
        ray.shutdown()
        cluster.shutdown()


@contextlib.contextmanager
def losing_a_node(root: Path, after: int) -> Iterator[None]:
    """Once so many shards are committed, the second node is gone without a word."""
    over = threading.Event()
    with two_nodes() as (cluster, goes):
        ray.init(address=cluster.address, log_to_driver=True)

        def lose() -> None:
            while not over.wait(0.1):
                if len(committed_shards(open_store(str(root)))) >= after:
                    print(f"{time.time():.3f} losing a node", flush=True)
                    cluster.remove_node(goes, allow_graceful=False)
                    return

        threading.Thread(target=lose, daemon=True).start()
        try:
            yield
        finally:
            over.set()


def main() -> int:
    """Every command that succeeds is followed by the next one; the code of the last."""
    code = 0
    with two_nodes() as (cluster, _):
        for command in sys.argv[1:]:
            # The cluster listens on the loopback interface alone (executors/session.py), and so must what joins it.
            environment = os.environ | {"RAY_ADDRESS": cluster.address, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
            code = subprocess.run(shlex.split(command), env=environment, check=False).returncode
            if code:
                break
    return code


if __name__ == "__main__":
    sys.exit(main())
