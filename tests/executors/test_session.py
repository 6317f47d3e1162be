"""A Ray that cannot be joined or started is one clear mistake, not a traceback and not minutes of silence."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from brainsynth.config.job import guarded
from brainsynth.executors import session
from tests.servers.swift import free_ports


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # other tests of this process may have a session,
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # which stays
    monkeypatch.setattr(session, "JOIN_S", 0.2)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # no token is written


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Listens on 127.0.0.1 alone."""
    with socket.create_server((session.LOOPBACK, 0)) as listening:
        yield listening


@pytest.fixture
def free_port() -> int:
    """Nobody listens there."""
    return free_ports(1)[0]


def join() -> None:
    with session.ray_session():
        pass


def told(capsys: pytest.CaptureFixture[str]) -> str:
    assert guarded(join) == 2
    return capsys.readouterr().err


def init(error: Exception | None = None) -> tuple[list[str], object]:
    """A stand-in for ray.init that notes the addresses, or fails."""
    asked: list[str] = []

    def start(address: str, **_: object) -> None:
        asked.append(address)
        if error is not None:
            raise error

    return asked, start


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_listens(
    scheme: str, free_port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, start = init()
    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setenv("RAY_ADDRESS", f"{scheme}127.0.0.3:{free_port}")
    message = told(capsys)
    assert f"RAY_ADDRESS names ({scheme}127.0.0.3:{free_port}): nobody listens at 127.0.0.3 port {free_port}" in message
    assert "start it with `ray start --head`, correct RAY_ADDRESS" in message
    assert asked == []


def test_a_cluster_that_listens_on_loopback_alone(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray takes this machine's own address for 127.0.0.1, and there nobody listens."""
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.2")
    monkeypatch.setenv("RAY_ADDRESS", f"localhost:{listener.getsockname()[1]}")
    message = told(capsys)
    assert "it listens on 127.0.0.1 alone: set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 to join it" in message


def test_a_head_that_is_still_starting_is_waited_for(free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, start = init()
    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(session, "JOIN_S", 60.0)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.3:{free_port}")
    heads: list[socket.socket] = []

    def head_starts(_: float) -> None:
        if not heads:
            heads.append(socket.create_server(("127.0.0.3", free_port)))

    monkeypatch.setattr(session.time, "sleep", head_starts)
    join()
    assert asked == [f"127.0.0.3:{free_port}"]
    assert len(heads) == 1
    heads[0].close()


@pytest.mark.parametrize(
    ("address", "error", "expected"),
    [
        (
            None,
            Exception("The current node timed out during startup. This could happen because\nmore"),
            "error: Ray does not start on this machine: The current node timed out during startup. This could happen "
            "because; it may be too busy, or short of memory or of room in /tmp: run the same command again",
        ),
        (None, RuntimeError(), "error: Ray does not start on this machine: RuntimeError; "),
        (
            "auto",
            ConnectionError("Could not find any running Ray instance.\nmore"),
            "RAY_ADDRESS names (auto): Could not find any running Ray instance.; a cluster with token",
        ),
    ],
)
def test_what_ray_says_becomes_one_message(
    address: str | None,
    error: Exception,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked, start = init(error)
    monkeypatch.setattr(ray, "init", start)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert expected in told(capsys)
    assert asked == [address or "local"]


TWO_HOMES = """
import os
import ray
from brainsynth.executors.session import ray_session

for home in ("first", "second"):
    os.environ["HOME"] = os.path.join(os.getcwd(), home)
    with ray_session():
        print(home, ray.get(ray.put(1)))
"""


def test_a_session_reads_the_token_of_its_own_home(tmp_path: Path) -> None:
    """Ray keeps a token once it has read it; its servers read theirs where HOME points when they start."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    asked = subprocess.run(
        [sys.executable, "-c", TWO_HOMES], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert asked.stdout.split("\n")[-3:] == ["first 1", "second 1", ""], asked.stderr
