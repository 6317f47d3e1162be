"""Fixtures of the servers; a suite that wants them imports them into its conftest or module."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Iterator

import pytest

from tests.servers.fault_proxy import FaultProxy
from tests.servers.swift import Endpoint, SwiftServer, installed


@functools.cache
def _server() -> SwiftServer:
    # Suites import the fixture separately, and each import is another fixture: they share one server all the same.
    return SwiftServer()


@pytest.fixture(scope="session")
def swift() -> Iterator[Endpoint]:
    """The S3 API of a real server with an empty bucket, for the whole session."""
    if not installed():
        pytest.skip("OpenStack Swift is not installed: `pip install swift`, or the dev extra, for tests on real S3")
    server = _server()
    yield server.endpoint
    server.stop()


@pytest.fixture(scope="session")
def fault_proxy(swift: Endpoint) -> Iterator[FaultProxy]:
    """The same server through a proxy that can break requests."""
    proxy = FaultProxy(swift)
    yield proxy
    proxy.stop()


@pytest.fixture
def s3_root(swift: Endpoint, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of an empty folder in the bucket; the environment lets every process in."""
    for name, value in swift.environment().items():
        monkeypatch.setenv(name, value)
    return swift.uri(uuid.uuid4().hex)


@pytest.fixture
def faulty(s3_root: str, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The proxy between the environment's address and the server; it breaks nothing until it is told to."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", fault_proxy.endpoint.url)
    fault_proxy.reset()
    yield fault_proxy
    fault_proxy.reset()
