"""A Ray cluster of two worker nodes on this machine, one of which is lost half-way."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from brainsynth.executors.session import ray
from brainsynth.storage.commit import committed_shards
from brainsynth.storage.filesystem import open_store


@contextlib.contextmanager
def losing_a_node(root: Path, after: int) -> Iterator[None]:
    """Once so many shards are committed, the second node is gone without a word."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    stays = cluster.add_node(num_cpus=1)
    goes = cluster.add_node(num_cpus=1)
    assert stays is not goes
    ray.init(address=cluster.address, log_to_driver=True)
    over = threading.Event()

    def lose() -> None:
        while not over.wait(0.1):
            if len(committed_shards(open_store(str(root)))) >= after:
                print(f"{time.time():.3f} losing a node", flush=True)
                cluster.remove_node(goes, allow_graceful=False)
                return

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        ray.shutdown()
        cluster.shutdown()
