"""Files that are not ours, or are in the way: verify, gc and a new run agree, and each mistake has its own sentence."""

from __future__ import annotations

import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import brainsynth
from brainsynth import cli
from brainsynth.errors import StoreError, UserError
from brainsynth.storage.commit import check_plan, committed_shards
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.keys import is_of_desktop
from brainsynth.storage.repair import garbage
from brainsynth.storage.verify import verify_dataset
from tests.reading.conftest import plan_of, write

DESKTOP = [
    ".DS_Store", "._dataset.json", "Thumbs.db", "commits/.DS_Store", "commits/._shard-000000.json", "desktop.ini",
    "dataset.zarr/t1w/.DS_Store", "dataset.zarr/t1w/c/0/0/0/._0", ".Trash-1000/info/x", "@eaDir/plan.json", "Icon\r",
    "quality/._measured-00.parquet", "repairs/Thumbs.db", ".nfs0000000000a1b2c3", ".fseventsd/0001",
    ".fuse_hidden0000002a00000001", ".ipynb_checkpoints/README-checkpoint.md", ".~lock.participants.tsv#", "~$x.xlsx",
]  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("small") / "generated"
    write(str(root), *plan_of(rows=6, samples_per_shard=3))
    return root


@pytest.fixture
def own(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "generated"))


def command(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["brainsynth", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


def test_what_a_desktop_leaves_is_harmless(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in DESKTOP:
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_bytes(b"x")
    store = open_store(str(own))
    report = verify_dataset(store)
    assert report.ok
    assert set(report.harmless) == {key for key in DESKTOP if key != "Icon\r"} | {"Icon\r"}
    assert f"harmless, left by a desktop or file server: {report.harmless[0]}" in report.summary()
    assert garbage(store) == []
    assert committed_shards(store) == {0, 1}
    assert command("verify", str(own), monkeypatch=monkeypatch) == 0
    assert command("gc", str(own), monkeypatch=monkeypatch) == 0
    assert "0 objects" in capsys.readouterr().out
    assert all((own / name).exists() for name in DESKTOP)
    assert command("verify", "--repair", str(own), monkeypatch=monkeypatch) == 0
    assert "nothing to repair" in capsys.readouterr().out
    assert len(brainsynth.open_dataset(str(own))) == 6
    # A folder that only holds such files is empty to a new run.
    fresh = own.parent / "fresh"
    fresh.mkdir()
    (fresh / ".DS_Store").write_bytes(b"x")
    assert not check_plan(open_store(str(fresh)), plan_of()[0])


@pytest.mark.parametrize(
    "name", ["notes.txt", "commits/shard-000000.json.bak", "DS_Store", ".hidden", "Thumbs.db.json", "_x"]
)
def test_what_a_person_left_is_named_as_before(name: str, own: Path) -> None:
    (own / name).write_bytes(b"x")
    assert not is_of_desktop(name)
    report = verify_dataset(open_store(str(own)))
    assert [problem.key for problem in report.problems] == [name]


def test_a_damaged_dataset_with_such_files_is_still_damaged(own: Path) -> None:
    (own / ".DS_Store").write_bytes(b"x")
    (own / "commits/shard-000001.json").rename(own / "commits/._shard-000001.json")
    report = verify_dataset(open_store(str(own)))
    assert {problem.key for problem in report.problems} >= {"commits/shard-000001.json"}
    assert report.harmless == (".DS_Store", "commits/._shard-000001.json")


@pytest.mark.parametrize("below", ["", "/deeper/still"])
def test_a_file_in_the_place_of_a_folder(
    below: str, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    there = tmp_path / "scan.nii"
    there.write_bytes(b"x")
    said = "is a file"
    with pytest.raises(UserError, match=said):
        open_store(f"{there}{below}")
    assert command("export", str(own), "--to", "nifti", "--output", f"{there}{below}", monkeypatch=monkeypatch) == 2
    assert said in capsys.readouterr().err
    for verb in ("verify", "gc"):
        assert command(verb, f"{there}{below}", monkeypatch=monkeypatch) == 2
        assert said in capsys.readouterr().err
    assert there.read_bytes() == b"x"
    if not below:
        with pytest.raises(StoreError, match=f"{there} is a file, and a dataset is a folder"):
            brainsynth.open_dataset(str(there))


def test_a_manifest_that_cannot_be_read_is_not_damage(own: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """As by permissions or a failing disk: nothing says that the data is wrong, so a repair must not touch it."""
    refused: Any = Path.read_bytes
    for name in ("dataset.json", "commits/shard-000001.json", "samples.parquet"):

        def read(self: Path, name: str = name) -> bytes:
            if self.as_posix().endswith(name):
                raise PermissionError(13, "Permission denied")
            data: bytes = refused(self)
            return data

        monkeypatch.setattr(Path, "read_bytes", read)
        for options in ([], ["--repair"]):
            assert command("verify", *options, str(own), monkeypatch=monkeypatch) == 2
            error = capsys.readouterr().err
            assert f"{name}: Permission denied" in error
            assert "check the permissions and the disk" in error
    monkeypatch.setattr(Path, "read_bytes", refused)
    assert verify_dataset(open_store(str(own))).ok
    os.rename(own / "dataset.json", own / "moved")
    (own / "dataset.json").mkdir()
    with pytest.raises(StoreError, match="cannot read .*dataset.json: Is a directory"):
        brainsynth.open_dataset(str(own))


@pytest.fixture
def plain_server(small: Path) -> Iterator[str]:
    """A web server that gives whole files and nothing else, as `python -m http.server` does."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(small.parent))

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/generated"
        server.shutdown()
        thread.join()


def test_a_server_that_cannot_list(
    plain_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    for verb in ("verify", "gc"):
        assert command(verb, plain_server, monkeypatch=monkeypatch) == 2
        assert "this server cannot list" in capsys.readouterr().err
    dataset = brainsynth.open_dataset(plain_server)
    assert len(dataset) == 6
    with pytest.raises(UserError, match="this server cannot list"):
        brainsynth.open_dataset(plain_server, measured=True)
    with pytest.raises(UserError, match="does not give parts of files"):
        dataset.volume(0)
