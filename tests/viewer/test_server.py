"""The server is closed: this machine, this address, GET, and the names that it knows; nothing is fetched."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from brainsynth.viewer.server import ViewServer
from tests.viewer.conftest import ask, ask_path, served

BESIDE = "what stands beside the dataset"


@pytest.fixture(scope="module")
def server(finished: Path) -> Iterator[ViewServer]:
    """Of a dataset that has a secret beside it."""
    (finished.parent / "secret.txt").write_text(BESIDE)
    with served(finished) as server:
        yield server


def test_it_listens_on_loopback_only(server: ViewServer) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"
    assert server.address.startswith(f"http://127.0.0.1:{server.server_port}/")
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", server.server_port), timeout=5)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "0.0.0.0:{port}", ""]
)
def test_another_host_is_refused(server: ViewServer, host: str) -> None:
    answer = ask(server, "dataset.json", Host=host.format(port=server.server_port))
    assert answer.status == 403
    assert b"sample_id" not in answer.body


def test_a_request_without_a_host_is_refused(server: ViewServer) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as connection:
        connection.sendall(f"GET /{server.token}/dataset.json HTTP/1.1\r\n\r\n".encode())
        assert b" 403 " in connection.recv(200).splitlines()[0]


def test_two_hosts_are_refused(server: ViewServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.putrequest("GET", f"/{server.token}/", skip_host=True)
    connection.putheader("Host", f"127.0.0.1:{server.server_port}")
    connection.putheader("Host", "evil.example")
    connection.endheaders()
    assert connection.getresponse().status == 403
    connection.close()


def test_localhost_is_this_machine(server: ViewServer) -> None:
    assert ask(server, "", Host=f"localhost:{server.server_port}").status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/dataset.json",
        "/index.html",
        "/x/dataset.json",
        "/{token}",
        "/{short}/dataset.json",
        "*",
        "/ä/",
    ],
)
def test_who_does_not_know_the_address_gets_nothing(server: ViewServer, path: str) -> None:
    asked = path.format(token=server.token, short=server.token[:-1])
    if not asked.isascii():
        asked = asked.encode().decode("latin-1")
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as connection:
        connection.sendall(f"GET {asked} HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n\r\n".encode("latin-1"))
        assert connection.recv(200).splitlines()[0].split()[1] in (b"404", b"400")


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW"])
def test_only_get_is_answered(server: ViewServer, method: str) -> None:
    answer = ask(server, "dataset.json", method)
    assert (answer.status, answer.headers["Allow"]) == (405, "GET")


@pytest.mark.parametrize(
    "name",
    [
        "../secret.txt",
        "../../secret.txt",
        "..%2f..%2fsecret.txt",
        "%2e%2e/%2e%2e/secret.txt",
        "..\\..\\secret.txt",
        "vendor/../../server.py",
        "vendor/",
        "vendor/../index.html",
        "./index.html",
        "/etc/passwd",
        "//etc/passwd",
        "index.html%00.js",
        "server.py",
        "volumes/../dataset.json",
        "volumes/0",
        "volumes/-1.nii",
        "volumes/0.nii/../../secret.txt",
        "volumes/٣.nii".encode().decode("latin-1"),
        "volumes/0.nii?x",
        "dataset.json?x",
        "plan.json",
        "participants.tsv",
    ],
)
def test_no_name_leads_anywhere_else(server: ViewServer, name: str) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as connection:
        request = f"GET /{server.token}/{name} HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n\r\n"
        connection.sendall(request.encode("latin-1"))
        answer = connection.recv(4000)
    assert answer.splitlines()[0].split()[1] == b"404"
    assert BESIDE.encode() not in answer


def test_a_body_is_not_taken_for_the_next_request(server: ViewServer) -> None:
    answer = ask(server, "", Content_Length="5")
    assert (answer.status, answer.headers["Connection"]) == (400, "close")


@pytest.mark.parametrize(
    "path", ["", "app.js", "style.css", "dataset.json", "volumes/0.nii", "volumes/3.nii", "nothing"]
)
def test_the_browser_is_told_to_stay_here(server: ViewServer, path: str) -> None:
    headers = ask(server, path).headers
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert (policy["script-src"], policy["connect-src"], policy["style-src"]) == ("'self'", "'self'", "'self'")
    assert "http" not in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers.get("Access-Control-Allow-Origin") is None


def test_two_servers_have_two_addresses(server: ViewServer, finished: Path) -> None:
    with served(finished) as other:
        assert len(other.token) >= 20
        assert other.token != server.token
        assert ask_path(other, f"/{server.token}/dataset.json").status == 404
