"""`brainsynth verify --repair`, `gc` and `regenerate` on a dataset of a real, tiny model."""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

from brainsynth import open_dataset
from brainsynth.cli import main
from brainsynth.config.schema import GenerateConfig
from brainsynth.stages import generate
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.verify import verify_dataset
from tests.line import Line, as_config
from tests.storage.conftest import flip

KEY = "dataset.zarr/t1w/c/2/0/0/0"


class Done(NamedTuple):
    """What a command left."""

    returncode: int
    stdout: str
    stderr: str


def brainsynth(*arguments: str | Path) -> Done:
    """The command line, in this process: importing torch anew for each would take most of the time."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["brainsynth", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as left,
    ):
        main()
    return Done(int(left.value.code or 0), out.getvalue(), err.getvalue())


def test_every_row_is_made_again_alone_with_the_same_voxels(line: Line, generated: Path) -> None:
    done = brainsynth("regenerate", generated, "--bundle", line.root / "bundle", "--random", "12")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("same voxels, largest difference 0") == 12
    assert "12 of 12 rows have the voxels that their records name" in done.stdout


def test_rows_by_name_and_a_stored_row_that_was_changed(line: Line, generated: Path) -> None:
    flip(open_store(str(generated)), KEY, 8 * 3000)
    done = brainsynth(
        "regenerate",
        generated,
        "--bundle",
        line.root / "bundle",
        *("--row", "sub-syn000001", "--row", "6", "--row", "7"),
    )
    assert "syn000001 (row 1): same voxels" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("what is STORED is not what its record says") == 1
    assert done.returncode == 0  # made again they are what the records say: the storage is at fault, and verify says so
    assert brainsynth("verify", generated).returncode == 1


def test_verify_repair_and_the_same_job(line: Line, tmp_path: Path) -> None:
    root = tmp_path / "data"
    config = as_config(line.generate(root), GenerateConfig, tmp_path)
    generate.run(config)
    before = open_dataset(str(root))
    digest, volumes = before.manifest["shards_digest"], before.volumes()
    flip(open_store(str(root)), KEY, 8 * 3000)
    (root / "attempts").mkdir(exist_ok=True)
    (root / "attempts" / "shard-000001-all-dead").write_bytes(b"")
    done = brainsynth("verify", root, "--repair")
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"corrupt: {KEY}" in done.stdout
    assert "re-planned: 1 rows in 1 shards" in done.stdout
    generate.run(config)
    assert verify_dataset(open_store(str(root))).ok
    after = open_dataset(str(root))
    assert abs(after.volumes() - volumes).max() <= 2.0**-11  # a row alone may round otherwise than in its micro-batch
    assert len({digest, after.manifest["shards_digest"]}) <= 2
    collected = brainsynth("gc", root)
    assert collected.returncode == 0
    assert brainsynth("verify", root, "--repair").stdout.endswith("nothing to repair\n")


def test_mistakes(line: Line, generated: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(line.root / "bundle", other)
    text = (other / "bundle.json").read_text()
    (other / "bundle.json").write_text(text.replace('"name": "tiny"', '"name": "tinier"'))
    for arguments, told in (
        (("regenerate", generated, "--bundle", line.root / "bundle"), "name at least one row"),
        (("regenerate", generated, "--bundle", line.root / "bundle", "--row", "nobody"), "neither this sample_id nor"),
        (("regenerate", generated, "--bundle", line.root / "bundle", "--row", "12"), "neither this sample_id nor"),
        (("regenerate", generated, "--bundle", tmp_path, "--row", "1"), "is not a bundle"),
        (("regenerate", generated, "--bundle", other, "--row", "1"), "is damaged"),
        (("regenerate", line.root / "cohort", "--bundle", line.root / "bundle", "--row", "1"), "was not generated"),
        (("verify", generated, "--failed"), "give both"),
        (("gc", tmp_path / "nowhere"), "is not a brainsynth dataset"),
    ):
        done = brainsynth(*arguments)
        assert done.returncode == 2, done.stdout + done.stderr
        assert told in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", ["verify", "gc", "regenerate"])
def test_every_verb_explains_itself(verb: str) -> None:
    done = brainsynth(verb, "--help")
    assert done.returncode == 0
    assert "uri" in done.stdout
