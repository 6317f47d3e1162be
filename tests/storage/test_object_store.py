"""Object storage on a real server: what a failed request may have done, what a user is told, what nobody is shown."""

from __future__ import annotations

import logging
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from brainsynth.errors import UserError
from brainsynth.storage import object_store
from brainsynth.storage.filesystem import ObjectStore, open_store
from brainsynth.storage.keys import scrub
from tests.servers.fault_proxy import KINDS, FaultProxy
from tests.servers.swift import Endpoint

CANARIES = {
    "AWS_ACCESS_KEY_ID": "AKIACANARY0000000001",
    "AWS_SECRET_ACCESS_KEY": "canary/secret+0002",
    "AWS_SESSION_TOKEN": "canary-token-0003",
}
ACTIONS: dict[str, Callable[[ObjectStore], Any]] = {
    "read": lambda store: store.read("a/b"),
    "write": lambda store: store.write("a/b", b"x"),
    "write_new": lambda store: store.write_new("a/b", b"x"),
    "list": lambda store: list(store.list("a")),
    "delete": lambda store: store.delete("a/b"),
}


@pytest.fixture
def remote(faulty: FaultProxy, s3_root: str) -> ObjectStore:
    """An empty folder of the bucket behind the fault proxy."""
    return ObjectStore(s3_root)


def hopeless(monkeypatch: pytest.MonkeyPatch, attempts: int = 3) -> None:
    """Give up soon."""
    monkeypatch.setattr(object_store, "ATTEMPTS", attempts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("times", [1, 3])
def test_every_request_survives_every_fault(remote: ObjectStore, faulty: FaultProxy, kind: str, times: int) -> None:
    data, times = os.urandom(50_000), 1 if kind == "slow" else times
    faulty.force(kind, "PUT", times)
    assert remote.write_new("a/new", data)
    assert remote.read("a/new") == data
    faulty.force(kind, "PUT", times)
    remote.write("a/b", data[:10])
    faulty.force(kind, "GET", times)
    assert remote.read("a/b") == data[:10]
    faulty.force(kind, "GET", times)
    assert sorted(remote.list()) == [("a/b", 10), ("a/new", 50_000)]
    faulty.force(kind, "POST", times)
    remote.delete("a/b")
    with pytest.raises(FileNotFoundError):
        remote.read("a/b")
    assert faulty.counts() == {kind: 5 * times}


@pytest.mark.parametrize("kind", ["lost", "cut"])
def test_a_write_whose_answer_was_lost_is_ours_when_its_bytes_are_there(
    remote: ObjectStore, faulty: FaultProxy, kind: str
) -> None:
    faulty.force(kind, "PUT")
    assert remote.write_new("record", b"written by me")
    assert [r.method for r in faulty.requests] == ["PUT", "PUT", "GET"]
    assert not remote.write_new("record", b"written by him")
    assert remote.read("record") == b"written by me"


@pytest.mark.parametrize("kind", KINDS)
def test_a_write_in_doubt_never_takes_anothers_place(remote: ObjectStore, faulty: FaultProxy, kind: str) -> None:
    assert remote.write_new("record", b"the first")
    for times in (1, 2, 3):
        faulty.force(kind, "PUT", times)
        assert not remote.write_new("record", b"the second")
        assert remote.read("record") == b"the first"


def test_the_read_back_itself_may_fail(remote: ObjectStore, faulty: FaultProxy) -> None:
    faulty.force("lost", "PUT")
    faulty.force("error", "GET", 2)
    assert remote.write_new("record", b"mine")
    assert [r.method for r in faulty.requests] == ["PUT", "PUT", "GET", "PUT", "GET", "PUT", "GET"]


def test_equal_bytes_without_doubt_are_not_taken_for_ours(remote: ObjectStore) -> None:
    assert remote.write_new("record", b"same")
    assert not remote.write_new("record", b"same")


def test_one_of_eight_wins_while_a_third_of_the_requests_fails(faulty: FaultProxy, s3_root: str) -> None:
    faulty.reset(dict.fromkeys(KINDS, 0.06))
    for round_ in range(5):
        won: list[int] = []
        barrier = threading.Barrier(8, timeout=60)

        def put(writer: int, key: str, won: list[int] = won, barrier: threading.Barrier = barrier) -> None:
            store = open_store(s3_root)
            barrier.wait()
            if store.write_new(key, bytes([writer]) * 1000):
                won.append(writer)

        threads = [threading.Thread(target=put, args=(writer, f"key{round_}")) for writer in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        assert len(won) == 1
        assert open_store(s3_root).read(f"key{round_}") == bytes(won) * 1000
    assert sum(faulty.counts().values()) > 0


def test_a_key_that_somebody_is_still_writing_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that says "conflict" has nothing to show yet; the other writer may fail."""
    from obstore.exceptions import AlreadyExistsError

    store = ObjectStore("memory:///")
    store._remote = True
    real, refused = store.store, [True, True]

    class Busy:
        def put(self, key: str, data: bytes, **options: Any) -> Any:
            if refused:
                refused.pop()
                raise AlreadyExistsError("409 ConditionalRequestConflict")
            return real.put(key, data, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    store.store = Busy()
    assert store.write_new("key", b"mine")
    refused.append(True)
    assert not store.write_new("key", b"other")
    hopeless(monkeypatch)
    refused.extend([True] * 9)
    with pytest.raises(UserError, match=r"cannot write memory:///.*somebody else is writing this object \(try 3"):
        store.write_new("another", b"mine")


def test_a_list_goes_on_after_the_last_name_that_arrived() -> None:
    from obstore.exceptions import GenericError

    store = ObjectStore("memory:///")
    for index in range(7):
        store.write(f"k{index}", bytes(index))
    store._remote = True
    real, offsets = store.store, []

    class Flaky:
        def list(self, prefix: str | None, offset: str | None, chunk_size: int) -> Iterator[Any]:
            offsets.append(offset)
            for number, page in enumerate(real.list(prefix, offset=offset, chunk_size=2)):
                if number == 1:
                    raise GenericError("connection reset")
                yield page

    store.store = Flaky()
    assert list(store.list()) == [(f"k{index}", index) for index in range(7)]
    assert offsets == [None, "k1", "k3", "k5"]


@pytest.mark.parametrize("action", ACTIONS)
def test_a_server_that_is_down_is_told_after_the_last_try(
    remote: ObjectStore, faulty: FaultProxy, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    hopeless(monkeypatch)
    faulty.reset({"error": 1.0})
    with pytest.raises(UserError, match=r"cannot \w+ s3://.*: HTTP 50[03] InternalError \(try 3.*resumes once"):
        ACTIONS[action](remote)
    assert len(faulty.requests) == 3


def test_a_server_that_is_not_there(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hopeless(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(UserError, match="cannot read s3://.*onnection refused.*try 3.*check the address"):
        ObjectStore(s3_root).read("key")


@pytest.mark.parametrize("action", ACTIONS)
def test_refused_access_names_the_variables_and_is_not_tried_again(
    faulty: FaultProxy, s3_root: str, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-of-the-tests")
    with pytest.raises(UserError, match="HTTP 403 .*check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"):
        ACTIONS[action](ObjectStore(s3_root))
    assert len(faulty.requests) == 1


@pytest.mark.parametrize("action", ACTIONS)
def test_a_bucket_that_is_not_there(faulty: FaultProxy, s3_root: str, action: str) -> None:
    with pytest.raises(UserError, match="there is no such bucket; create it, or correct the address"):
        ACTIONS[action](ObjectStore("s3://nowhere/folder"))
    assert len(faulty.requests) == 1


@pytest.mark.parametrize(
    ("text", "remedy", "attempts"),
    [
        ("status code: 503 Slow: <Error><Code>SlowDown</Code>", "the same command resumes", object_store.ATTEMPTS),
        ("status code: 400 Bad: <Error><Code>RequestTimeout</Code>", "the same command resumes", object_store.ATTEMPTS),
        ("status code: 409 Conflict: <Code>OperationAborted</Code>", "the same command resumes", object_store.ATTEMPTS),
        ("status code: 400 Bad: <Code>ExpiredToken</Code>", "AWS_SESSION_TOKEN", 1),
        ("status code: 403 No: <Code>RequestTimeTooSkewed</Code>", "the clock", 1),
        ("status code: 301 Moved: <Code>PermanentRedirect</Code>", "AWS_REGION", 1),
        ("status code: 501 No: <Code>NotImplemented</Code>", "this server cannot list or write files", 1),
        ('HTTP error: x\n\nDebug source:\n error: "invalid peer certificate: UnknownIssuer"', "not trusted", 1),
    ],
)
def test_what_passes_is_tried_again_and_what_stays_is_not(text: str, remedy: str, attempts: int) -> None:
    from obstore.exceptions import GenericError

    failure = object_store._judge(
        GenericError(f"Error performing PUT http://h/k in 1ms - Server returned {text}"), "s3://b"
    )
    assert remedy in failure.remedy
    assert failure.attempts == attempts


def test_no_credentials_at_all(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    # The client asks the machine; nobody answers at this address.
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError, match="there are no credentials.*set AWS_ACCESS_KEY_ID"):
        ObjectStore(s3_root).read("key")


def test_an_unencrypted_address_must_be_allowed(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(UserError, match="AWS_ALLOW_HTTP=true"):
        ObjectStore(s3_root).read("key")


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("trouble", ["refused", "down", "nobody"])
def test_no_secret_is_shown(
    faulty: FaultProxy,
    s3_root: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    action: str,
    trouble: str,
) -> None:
    hopeless(monkeypatch)
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    if trouble == "down":
        faulty.reset({"error": 0.5, "cut": 0.5})
    if trouble == "nobody":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://canary-user:canary-password@127.0.0.1:1/?sig=canary-query")
    with caplog.at_level(logging.DEBUG), pytest.raises(UserError) as caught:
        ACTIONS[action](ObjectStore(s3_root))
    chain, error = [], caught.value
    while error is not None:
        chain.append(repr(error))
        error = error.__cause__ or error.__context__
    for text in (*chain, caplog.text, repr(pickle.dumps(ObjectStore(s3_root)))):
        assert "canary" not in text.lower(), text


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIACANARY:canary@bucket/folder",
        "s3://bucket/folder?X-Amz-Signature=canary",
        "https://user:canary@host/folder",
        "az://container/folder?sig=canary",
        "gs://bucket/folder#canary",
        "https://[canary/folder?x=canary",
    ],
)
def test_an_address_with_credentials_is_refused_without_showing_them(uri: str) -> None:
    with pytest.raises(UserError, match="cannot open") as caught:
        open_store(uri)
    assert "canary" not in str(caught.value).lower().replace("https://[canary", "")


def test_scrubbing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abc/def+0123")
    told = scrub(
        "GET https://u:p@host/k?X-Amz-Signature=1 abc/def+0123 abc%2Fdef%2B0123 Authorization: AWS4 Bearer xyz"
    )
    for secret in ("u:p", "Amz", "abc", "xyz", "AWS4"):
        assert secret not in told
    assert scrub("cannot read s3://bucket/folder/key: HTTP 503") == "cannot read s3://bucket/folder/key: HTTP 503"


def test_a_store_travels_by_its_address(remote: ObjectStore) -> None:
    remote.write("key", b"data")
    assert pickle.loads(pickle.dumps(remote)).read("key") == b"data"  # noqa: S301


def test_a_forked_process_is_told_instead_of_hanging(remote: ObjectStore) -> None:
    remote.write("key", b"data")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover
        try:
            ObjectStore(remote.uri).read("key")
            os.write(writer, b"read")
        except UserError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert b"forkserver" in pipe.read()
    os.waitpid(child, 0)
    assert remote.read("key") == b"data"


def test_the_environment_is_all_that_a_client_needs(swift: Endpoint, s3_root: str) -> None:
    from obstore.store import from_url

    from_url(s3_root).put("key", b"data")
    assert open_store(s3_root).read("key") == b"data"
