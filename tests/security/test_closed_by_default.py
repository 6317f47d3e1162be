"""A private Ray session is closed: loopback only, a token that others cannot read, no request without it."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from brainsynth.errors import UserError
from brainsynth.executors import session

REPO = Path(__file__).parents[2]


def look(home: Path, ray_folder: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    """The facts of a session that is started in a process of its own, with a home of its own."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_ADDRESS", "RAY_AUTH"))}
    done = subprocess.run(
        [sys.executable, "-m", "tests.security.closed_session", *arguments],
        cwd=REPO,
        env=clean | {"HOME": str(home), "RAY_TMPDIR": str(ray_folder)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FACTS ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    facts: dict[str, Any] = json.loads(lines[0].removeprefix("FACTS "))
    return facts


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Of one session, in an empty home, under a careless umask."""
    ray_folder = Path(tempfile.mkdtemp(prefix="bs-"))
    before = os.umask(0o000)
    try:
        yield look(tmp_path_factory.mktemp("home"), ray_folder)
    finally:
        os.umask(before)
        shutil.rmtree(ray_folder, ignore_errors=True)


def test_every_port_is_on_the_loopback_interface(facts: dict[str, Any]) -> None:
    addresses = [ipaddress.ip_address(where.rpartition(":")[0]) for where in facts["listening"]]
    assert len(addresses) >= 8, facts["listening"]
    assert [str(a) for a in addresses if not a.is_loopback] == []
    assert {"gcs_server", "raylet"} <= set(facts["listening"].values())
    assert facts["node"] == "127.0.0.1"
    assert facts["dashboard"].startswith("http://127.0.0.1:")


def test_no_request_without_the_token(facts: dict[str, Any]) -> None:
    assert facts["without token"] == 401
    assert facts["with another token"] in (401, 403)
    assert facts["with token"] == 200


def test_only_this_user_may_read_the_token(facts: dict[str, Any]) -> None:
    assert facts["token mode"] == "0o600"
    assert facts["token length"] == 64


def test_no_usage_statistics(facts: dict[str, Any]) -> None:
    assert facts["usage statistics"] == "0"


def test_the_switch_is_taken_back(facts: dict[str, Any]) -> None:
    assert facts["switch left behind"] is None


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and no word on tokens in the environment."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_token_that_others_can_read_is_closed_and_kept(home: Path) -> None:
    (home / ".ray").mkdir()
    token = home / ".ray" / "auth_token"
    token.write_text("a" * 64)
    token.chmod(0o644)
    session._private_token()
    assert (token.read_text(), mode(token)) == ("a" * 64, 0o600)
    session._private_token()
    assert token.read_text() == "a" * 64


def test_the_token_goes_where_the_user_says(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "secrets" / "ray"))
    session._private_token()
    assert mode(home / "secrets" / "ray") == 0o600
    assert [path.name for path in (home / "secrets").iterdir()] == ["ray"]
    assert not (home / ".ray").exists()


@pytest.mark.parametrize(("name", "value"), [("RAY_AUTH_TOKEN", "mine"), ("RAY_AUTH_MODE", "disabled")])
def test_a_user_who_decided_is_left_alone(home: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    session._private_token()
    assert not (home / ".ray").exists()


def test_a_home_that_cannot_be_written_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").write_text("in the way")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "file" / "token"))
    with pytest.raises(UserError, match="RAY_AUTH_TOKEN_PATH"):
        session._private_token()
