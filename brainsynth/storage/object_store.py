"""A bucket, or a folder in one (s3://, gs://, az://, to read also https:// and hf://), by obstore: every request is
bounded, repeated and explained.

Credentials come from the environment and from nowhere else. The client's own repetitions are off, so that it is known
here what a failed request may have done. Put-if-absent is only as good as the server: S3, GCS and Azure decide it when
the object is stored. OpenStack Swift decides it when the request begins, so there two writers of one key may both win.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from brainsynth.errors import StoreError, UserError
from brainsynth.storage.keys import check_address, check_key, scrub

log = logging.getLogger(__name__)
# Not the shared generator: workers that were seeded alike would draw the same pauses.
_JITTER = random.SystemRandom()
T = TypeVar("T")

ATTEMPTS = 16
"""Tries of one request; the pauses between them add up to two minutes at most and to one on average."""
FIRST_PAUSE_SECONDS = 0.02
LAST_PAUSE_SECONDS = 20.0
CONNECT_SECONDS = 10
REQUEST_SECONDS = 600
"""One whole request: 100 MB at 1.4 Mbit/s."""
_ATTEMPTS_WITHOUT_CREDENTIALS = 3
HUB = "hf://"
_WEB = ("http://", "https://", HUB)
"""Addresses of web servers, which are only read: a person waits, and what is asked for is small."""
WEB_ATTEMPTS, WEB_SECONDS = 10, 60
_ATTEMPTS_WITHOUT_ANSWER = 3
_WASTE = 10
"""Parts of an object that lie nearer than the tenth of one are one request: at most a tenth more is read than is needed."""
_TRIES_IN_SILENCE = 6
_PAGE = 1000

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_CAUSE = re.compile(r'(?:message|error): "([^"]+)"')
_PASSING_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
_PASSING_CODES = {"RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable"}
# Where a client asks for credentials that the machine itself may have, when the environment has none.
_MACHINE_CREDENTIALS = ("/latest/api/token", "/latest/meta-data", "169.254.", "metadata.google.internal")
_VARIABLES = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN), AWS_REGION and AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT",
    HUB: "HF_TOKEN",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY (or AZURE_STORAGE_SAS_KEY)",
}


class ObjectStore:
    """The objects of a bucket or of a folder in one, as a `Store` (see filesystem.py)."""

    def __init__(self, uri: str) -> None:
        self.uri = check_address(uri)
        # The store of another library: replaced in tests by one that fails.
        self.store: Any = open_client(uri, retries=0)
        from obstore.store import LocalStore, MemoryStore

        self._remote = not isinstance(self.store, LocalStore | MemoryStore)

    def __reduce__(self) -> tuple[type[ObjectStore], tuple[str]]:
        # The client holds the credentials that it found; another process finds its own.
        return ObjectStore, (self.uri,)

    def read(self, key: str) -> bytes:
        check_key(key, self.uri)
        return self._repeat("read", key, lambda: bytes(self.store.get(key).bytes()))

    def size(self, key: str) -> int:
        """Bytes of the object. Raises FileNotFoundError."""
        check_key(key, self.uri)
        return int(self._repeat("read", key, lambda: self.store.head(key)["size"]))

    def read_spans(self, key: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes [start, stop) of each span of the object; near ones are one request. Raises FileNotFoundError."""
        check_key(key, self.uri)
        starts, ends = [start for start, _ in spans], [stop for _, stop in spans]

        gap = (sum(ends) - sum(starts)) // (_WASTE * max(1, len(spans)))

        def get() -> list[bytes]:
            return [bytes(part) for part in self.store.get_ranges(key, starts=starts, ends=ends, coalesce=gap)]

        return self._repeat("read", key, get)

    def read_tail(self, key: str, length: int) -> tuple[bytes, int]:
        """The last bytes of the object, in one request, and the object's size. Raises FileNotFoundError."""
        from obstore.store import AzureStore

        check_key(key, self.uri)
        if isinstance(self.store, AzureStore):  # knows no ranges from the end
            size = self.size(key)
            return self.read_spans(key, [(max(0, size - length), size)])[0], size

        def get() -> tuple[bytes, int]:
            answer = self.store.get(key, options={"range": {"suffix": length}})
            return bytes(answer.bytes()), int(answer.meta["size"])

        return self._repeat("read", key, get)

    def write(self, key: str, data: bytes) -> None:
        check_key(key, self.uri)
        self._repeat("write", key, lambda: self.store.put(key, data, use_multipart=False))

    def write_new(self, key: str, data: bytes) -> bool:
        from obstore.exceptions import AlreadyExistsError, BaseError

        check_key(key, self.uri)
        uncertain = False

        def put() -> bool:
            nonlocal uncertain
            try:
                self.store.put(key, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                # After a lost answer the object that is in the way may be our own: records are unique, so equal bytes
                # are ours. Without one it is another's; but a server that says "conflict" while somebody writes has
                # nothing to show yet, and that somebody may fail.
                try:
                    return bytes(self.store.get(key).bytes()) == data if uncertain else not self.store.head(key)
                except FileNotFoundError:
                    raise _StillWriting from None
            except BaseError:
                uncertain = True
                raise
            return True

        return self._repeat("write", key, put)

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        check_key(prefix, self.uri, empty=True)
        last: str | None = None
        stream: Iterator[Any] | None = None

        def page() -> Any:
            nonlocal stream
            if stream is None:
                stream = iter(self.store.list(prefix or None, offset=last, chunk_size=_PAGE))
            try:
                return next(stream, None)
            except BaseException:
                stream = None  # the next try continues after the last name that arrived
                raise

        while (batch := self._repeat("list", prefix, page)) is not None:
            for item in batch:
                yield item["path"], item["size"]
            last = batch[-1]["path"] if batch else last

    def delete(self, key: str) -> None:
        check_key(key, self.uri)
        with contextlib.suppress(FileNotFoundError):
            self._repeat("delete", key, lambda: self.store.delete(key))

    def _repeat(self, doing: str, key: str, request: Callable[[], T]) -> T:
        """The request's answer. Raises FileNotFoundError, and UserError when it fails for good."""
        from obstore.exceptions import BaseError

        started, attempt = time.monotonic(), 0
        while True:
            if self._remote:
                _check_not_forked()
            try:
                return request()
            except (BaseError, FileNotFoundError, _StillWriting) as error:
                failure = _judge(error, self.uri)
            attempt += 1
            if failure.missing and doing == "write":
                failure = _NO_BUCKET
            if failure.missing:
                raise FileNotFoundError(f"{self.uri}/{key}")
            if not self._remote or attempt >= failure.attempts:
                tries = f" (try {attempt}, after {time.monotonic() - started:.0f} s)" if attempt > 1 else ""
                raise StoreError(
                    f"cannot {doing} {scrub(f'{self.uri}/{key}')}: {failure.text}{tries}; {failure.remedy}"
                )
            level = logging.WARNING if attempt >= _TRIES_IN_SILENCE else logging.INFO
            log.log(level, "cannot %s %s/%s: %s; try %d of %d", doing, self.uri, key, failure.text, attempt, ATTEMPTS)
            time.sleep(_pause(attempt))


class _StillWriting(Exception):
    """The server refuses to create an object that is not there: somebody is writing it."""

    def __str__(self) -> str:
        return "somebody else is writing this object"


@dataclasses.dataclass(frozen=True)
class _Failure:
    """What a failed request means."""

    text: str
    remedy: str
    attempts: int = 1
    missing: bool = False


_NO_BUCKET = _Failure("there is no such bucket", "create it, or correct the address (for s3:// also AWS_ENDPOINT_URL)")


_NO_LISTING = (
    "this server cannot list or write files: open_dataset reads volumes from it, without `measured` and `partial`; all else "
    "needs S3, GCS, Azure or a local copy"
)


def _judge(error: Exception, uri: str) -> _Failure:
    from obstore.exceptions import NotSupportedError

    said, _, source = str(error).partition("\n\nDebug source")
    status = int(match.group(1)) if (match := _STATUS.search(said)) else None
    code = match.group(1) if (match := _CODE.search(said)) else ""
    variables = next((names for scheme, names in _VARIABLES.items() if uri.startswith(scheme)), "the credentials")
    # The body of an answer repeats the request with its key and signature: only its code is shown.
    first = " ".join(
        [said.partition("\n")[0].rpartition(" - ")[2], *(f"({why})" for why in _CAUSE.findall(source)[:1])]
    )
    text = f"HTTP {status} {code}".strip() if status else scrub(first)[:200]
    if any(address in said for address in _MACHINE_CREDENTIALS):
        remedy = f"set {variables} in the environment of every process"
        return _Failure("there are no credentials", remedy, _ATTEMPTS_WITHOUT_CREDENTIALS)
    if code == "NoSuchBucket" or (status == 404 and "ontainer" in code):
        return _NO_BUCKET
    if isinstance(error, FileNotFoundError):
        return _Failure(text, "", missing=True)
    if code not in _PASSING_CODES and (status in (401, 403) or code in ("ExpiredToken", "InvalidToken")):
        remedy = f"access is refused: check {variables}, the clock, and that this key may list, read and write there"
        return _Failure(text, remedy)
    if status in (405, 501):
        return _Failure(text, _NO_LISTING)
    if isinstance(error, NotSupportedError):
        return _Failure("it does not give parts of files", "copy the dataset, or serve it by S3, GCS, Azure or nginx")
    if status in (301, 307, 308) or "region" in said:
        return _Failure(text, "AWS_REGION or AWS_ENDPOINT_URL is not that of the bucket")
    if "certificate" in source and status is None:
        return _Failure(
            text, "the server's certificate is not trusted by this machine: correct the address or the certificate"
        )
    if "builder error" in said:
        return _Failure(text, "an http:// address is used only with AWS_ALLOW_HTTP=true (AZURE_ALLOW_HTTP=true)")
    if "TimedOut" in source and uri.startswith(_WEB):
        remedy = "check the address and the network; a server that is busy may answer later"
        return _Failure(f"no answer within {WEB_SECONDS} s", remedy, _ATTEMPTS_WITHOUT_ANSWER)
    if isinstance(error, _StillWriting) or status in _PASSING_STATUS or code in _PASSING_CODES or status is None:
        remedy = "check the address, the permissions and the network; the same command resumes once the store answers"
        return _Failure(text, remedy, WEB_ATTEMPTS if uri.startswith(_WEB) else ATTEMPTS)
    return _Failure(text, "check the address and the permissions")


def open_client(uri: str, retries: int) -> Any:
    """obstore's client of an address, with our timeouts and that many repetitions of its own. Raises UserError."""
    check_address(uri)
    try:
        from obstore.store import from_url
    except ModuleNotFoundError:
        raise UserError(f"{uri}: object storage needs obstore; pip install obstore") from None
    if not uri.startswith(("memory:", "file:")):
        _check_not_forked()
    options: Any = {
        "connect_timeout": datetime.timedelta(seconds=CONNECT_SECONDS),
        "timeout": datetime.timedelta(seconds=WEB_SECONDS if uri.startswith(_WEB) else REQUEST_SECONDS),
    }
    # Options that are given replace those of the environment.
    address = uri
    if uri.startswith(HUB):
        from brainsynth.storage.hub import hub_address, hub_headers

        address = hub_address(uri)
        options["default_headers"] = hub_headers()
    # An http:// address asks for it, and nothing secret is sent there; a bucket's endpoint is sent the key's name.
    if address.startswith("http://") or any(
        os.environ.get(name, "").lower() in ("1", "true", "yes") for name in ("AWS_ALLOW_HTTP", "AZURE_ALLOW_HTTP")
    ):
        options["allow_http"] = True
    backoff: Any = {
        "init_backoff": datetime.timedelta(seconds=FIRST_PAUSE_SECONDS),
        "max_backoff": datetime.timedelta(seconds=LAST_PAUSE_SECONDS),
    }
    repetitions: Any = {"max_retries": retries, "backoff": backoff}
    reason = ""
    try:
        return from_url(address, client_options=options, retry_config=repetitions)
    except Exception as error:
        reason = scrub(str(error).partition("\n")[0])
    raise UserError(f"cannot open {uri}: {reason}")


def read_through(uri: str, request: Callable[[], T]) -> T:
    """What `request` reads by a client that repeats by itself, in code that is not ours. Raises UserError.

    A client begins again when a request fails, but not when the body of an answer breaks off: that is done here.
    """
    from obstore.exceptions import BaseError

    attempt = 0
    while True:
        try:
            return request()
        except BaseError as error:
            failure = _judge(error, uri)
        attempt += 1
        if attempt >= failure.attempts or "body error" not in failure.text:
            raise StoreError(f"cannot read {uri}: {failure.text}; {failure.remedy}")
        time.sleep(_pause(attempt))


def _pause(attempt: int) -> float:
    """Seconds after the `attempt`-th try: exponential, with full jitter, so that workers do not come back together."""
    return _JITTER.uniform(0, min(LAST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (attempt - 1)))


_used_by: int | None = None


def _check_not_forked() -> None:
    """A client's threads do not survive a fork: without this, a forked process would wait forever."""
    global _used_by
    if _used_by is None:
        _used_by = os.getpid()
    elif _used_by != os.getpid():
        raise UserError(
            "this process was forked from one that used the object store, whose client does not survive that; start "
            "workers by forkserver or spawn: DataLoader(..., multiprocessing_context='forkserver')"
        )
