"""Folders of this machine: full disks, filesystems without hard links, and keys that would lead out of the folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from brainsynth.errors import UserError
from brainsynth.storage.filesystem import LocalStore, Store, open_store, resolve_uri

EVIL_KEYS = [
    "",
    ".",
    "..",
    "/",
    "../outside",
    "a/../../outside",
    "a/b/../../../outside",
    "./key",
    "a/./key",
    "a//key",
    "/etc/outside",
    "//host/share/outside",
    "a/",
    "..\\outside",
    "a\\..\\..\\outside",
    "C:\\outside",
    "C:/outside",
    "key\0",
    "../outside\0.json",
    "a\nb",
    "a\x1b[2Jb",
    "%2e%2e/outside",
    "%2E%2E%2Foutside",
    "..%2foutside",
    "a/%2e%2e/%2e%2e/outside",
    "%252e%252e/outside",
    "..%5coutside",
    "key%00",
    "%2fetc/outside",
    "\ud800",
    "k" * 5000,
]


@pytest.mark.parametrize("key", EVIL_KEYS)
def test_no_key_leaves_the_folder(store: Store, tmp_path: Path, key: str) -> None:
    (tmp_path / "outside").write_bytes(b"private")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    for way in (store.read, store.delete, lambda k: store.write(k, b"x"), lambda k: store.write_new(k, b"x")):
        with pytest.raises(UserError, match=r"the key .* is refused"):
            way(key)
    if key:
        with pytest.raises(UserError, match=r"the key .* is refused"):
            list(store.list(key))
    assert list(store.list()) == []
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    assert (tmp_path / "outside").read_bytes() == b"private"


@pytest.mark.parametrize("key", ["shard-000001 (1).json", ".tmp-1", "ä/ö", "a..b", "...", "c/1/0/0/0", "50%", "a:b"])
def test_harmless_keys_are_kept_as_they_are(store: Store, key: str) -> None:
    assert store.write_new(key, b"data")
    assert store.read(key) == b"data"
    assert list(store.list()) == [(key, 4)]


@pytest.mark.parametrize("link", ["link/key", "link", "a/link"])
def test_a_link_that_leads_out_is_not_followed(tmp_path: Path, link: str) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    (outside / "key").write_bytes(b"private")
    place = root / link.removesuffix("/key")
    place.parent.mkdir(parents=True)
    place.symlink_to(outside if link == "link/key" else outside / "key")
    store = LocalStore(root)
    for way in (store.read, store.delete, lambda k: store.write(k, b"x"), lambda k: store.write_new(k, b"x")):
        with pytest.raises(UserError, match="a symbolic link that leaves the folder"):
            way(link)
    if link == "link/key":
        with pytest.raises(UserError, match="a symbolic link that leaves the folder"):
            list(store.list("link"))
    assert list(outside.iterdir()) == [outside / "key"]
    assert (outside / "key").read_bytes() == b"private"


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(UserError, match="a symbolic link"):
        LocalStore(tmp_path).read("a/key")


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    store = LocalStore(tmp_path / "data")
    assert store.write_new("a/b", b"x")
    (tmp_path / "data" / "inner").symlink_to(tmp_path / "disk" / "a")
    assert store.read("inner/b") == b"x"


def refuse(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Let a system call fail."""

    def fail(*_args: Any, **_options: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, name, fail)


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_filesystem_without_hard_links_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    store = LocalStore(tmp_path)
    refuse(monkeypatch, "link", number)
    with pytest.raises(UserError, match=r"this filesystem has no hard links.*write to a local disk, NFS, .*copy"):
        store.write_new("a/key", b"x")
    assert list(store.list()) == []
    store.write("a/key", b"x")


@pytest.mark.parametrize("call", ["fsync", "link"])
@pytest.mark.parametrize(("number", "told"), [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the quota")])
def test_a_full_disk_is_told_and_the_same_command_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, told: str
) -> None:
    store = LocalStore(tmp_path)
    with monkeypatch.context() as patch:
        refuse(patch, call, number)
        with pytest.raises(UserError, match=f"{told}.*make space, and the same command resumes"):
            store.write_new("a/key", b"x")
        if call == "fsync":
            with pytest.raises(UserError, match=told):
                store.write("a/key", b"x")
    assert list(store.list()) == []
    assert store.write_new("a/key", b"x")


def test_what_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    store.write("a/key", b"x")
    with pytest.raises(FileNotFoundError):
        store.read("a")
    with pytest.raises(FileNotFoundError):
        store.read("a/key/below")
    store.delete("a/key/below")

    def fail(self: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(UserError, match=r"cannot read .*a/key: Permission denied; check the permissions"):
        store.read("a/key")


def test_the_stores_of_addresses() -> None:
    assert resolve_uri("s3://bucket/folder/", "output") == "s3://bucket/folder"
    with pytest.raises(UserError, match="must not carry credentials"):
        resolve_uri("s3://key:secret@bucket/folder", "output")
    assert isinstance(open_store("/folder"), LocalStore)
    assert isinstance(open_store("file:///folder"), LocalStore)
