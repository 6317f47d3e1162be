"""obstore against s3fs: put-if-absent, get and list of shards on one real S3-compatible server, side by side.

    pip install --target SOMEWHERE s3fs
    PYTHONPATH=SOMEWHERE python -m benchmarks.object_store --megabytes 4 --count 30

s3fs is no dependency of brainsynth: it is installed for this only. The server is the one of the tests (OpenStack Swift,
from the dev extra). Both clients take turns object by object, so that a busy machine disturbs both alike; what counts is
the ratio of the medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

from brainsynth.storage.filesystem import ObjectStore
from tests.servers.swift import Endpoint, SwiftServer


class Client(Protocol):
    """What is measured."""

    def put_new(self, key: str, data: bytes) -> bool:
        """False where there is an object already."""

    def get(self, key: str) -> bytes:
        """The object."""

    def names(self) -> int:
        """How many objects a list shows."""


class Obstore:
    """As brainsynth does it, with its repetitions and checks."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.store = ObjectStore(endpoint.uri("obstore"))

    def put_new(self, key: str, data: bytes) -> bool:
        return self.store.write_new(key, data)

    def get(self, key: str) -> bytes:
        return self.store.read(key)

    def names(self) -> int:
        return sum(1 for _ in self.store.list("shards"))


class S3fs:
    """fsspec's client; `mode="create"` is its way to ask for put-if-absent."""

    def __init__(self, endpoint: Endpoint) -> None:
        import s3fs

        self.root = f"{endpoint.bucket}/s3fs"
        self.files: Any = s3fs.S3FileSystem(
            endpoint_url=endpoint.url, use_listings_cache=False, skip_instance_cache=True
        )

    def put_new(self, key: str, data: bytes) -> bool:
        try:
            self.files.pipe_file(f"{self.root}/{key}", data, mode="create")
        except OSError as error:  # errno 22, which other mistakes have too: only the text tells them apart
            if "precondition" not in str(error):
                raise
            return False
        return True

    def get(self, key: str) -> bytes:
        return bytes(self.files.cat_file(f"{self.root}/{key}"))

    def names(self) -> int:
        return len(self.files.find(f"{self.root}/shards"))


def milliseconds(action: Callable[[], object]) -> float:
    """How long it took."""
    began = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - began)


def support(client: Client) -> str:
    """Whether a second put of a key is refused and changes nothing."""
    try:
        told = [client.put_new("probe", b"first"), client.put_new("probe", b"second")]
        return "yes" if told == [True, False] and client.get("probe") == b"first" else f"no ({told})"
    except Exception as error:
        return f"no ({type(error).__name__})"


def measure(clients: dict[str, Client], megabytes: float, count: int) -> dict[str, dict[str, list[float]]]:
    """Times of every operation by every client, taken in turn."""
    times: dict[str, dict[str, list[float]]] = {name: {"put": [], "get": [], "list": []} for name in clients}
    for index in range(-2, count):  # the first ones open the connections
        data = os.urandom(int(megabytes * 1e6))
        order = list(clients.items())[:: 1 if index % 2 else -1]
        for name, client in order:
            key = f"shards/{index}"
            spent = {
                "put": milliseconds(lambda c=client, k=key, d=data: c.put_new(k, d)),  # type: ignore[misc]
                "get": milliseconds(lambda c=client, k=key: c.get(k)),  # type: ignore[misc]
                "list": milliseconds(client.names),
            }
            if client.get(key) != data or client.names() != index + 3:
                raise RuntimeError(f"{name} lost an object")
            if index >= 0:
                for operation, value in spent.items():
                    times[name][operation].append(value)
    return times


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=4.0)
    parser.add_argument("--count", type=int, default=30)
    arguments = parser.parse_args()
    server = SwiftServer()
    try:
        os.environ.update(server.endpoint.environment())
        clients: dict[str, Client] = {"obstore": Obstore(server.endpoint), "s3fs": S3fs(server.endpoint)}
        supported = {name: support(client) for name, client in clients.items()}
        times = measure(clients, arguments.megabytes, arguments.count)
    finally:
        server.stop()
    print(f"{arguments.count} objects of {arguments.megabytes:g} MB, median ms per object (list: per call)")
    print(f"{'':10}{'put-if-absent':>15}{'put':>9}{'get':>9}{'list':>9}")
    for name in clients:
        cells = [f"{statistics.median(times[name][operation]):9.1f}" for operation in ("put", "get", "list")]
        print(f"{name:10}{supported[name]:>15}{''.join(cells)}")


if __name__ == "__main__":
    main()
