"""A dataset as one file: rows made from it equal the stored ones; a recipe that was changed is refused; whole again."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brainsynth import cli, open_dataset
from brainsynth.errors import UserError
from brainsynth.stages import recipe as stage
from brainsynth.storage.finalise import SUBJECTS_KEY
from brainsynth.storage.recipe_file import RECIPE_KEY, Recipe, read_recipe, write_recipe
from brainsynth.storage.verify import verify_dataset
from tests.docs.pages import commands
from tests.line import Line


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    return int(str(ended.value.code))


@pytest.fixture
def written(line: Line, generated: Path, tmp_path: Path) -> Path:
    path = tmp_path / "brains.recipe"
    assert run("recipe", str(generated), "--bundle", str(line.root / "bundle"), "--output", str(path)) == 0
    return path


def test_rows_of_the_recipe_are_the_stored_ones_and_are_kept(
    written: Path, generated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, made = open_dataset(str(generated)), open_dataset(str(written))
    assert made.sample_ids == stored.sample_ids
    assert made.table.equals(stored.table)
    assert made.shape == stored.shape
    for place in (7, 0, 11):
        np.testing.assert_array_equal(made.volume(place), stored.volume(place))
    np.testing.assert_array_equal(made.patch(7, (1, 2, 3), 8), stored.patch(7, (1, 2, 3), 8))
    stage._rows.cache_clear()
    monkeypatch.setattr(stage._Rows, "_make", lambda self, row: pytest.fail("a row that was kept is made again"))
    np.testing.assert_array_equal(open_dataset(str(written)).volume(7), stored.volume(7))


def test_a_kept_row_that_was_changed_is_made_again(written: Path, generated: Path) -> None:
    made = open_dataset(str(written))
    first = made.volume(0)
    (kept,) = (file for file in Path(f"{written}.made").rglob("0.voxels"))
    kept.write_bytes(bytes(kept.stat().st_size))
    stage._rows.cache_clear()
    np.testing.assert_array_equal(open_dataset(str(written)).volume(0), first)


def test_a_row_that_is_not_what_the_manifest_describes_is_an_error(written: Path) -> None:
    opened = open_dataset(str(written))
    rows = stage._rows(opened.uri)
    rows.subjects.loc[3, "voxel_sha256"] = "0" * 64
    rows.subjects.loc[3, "mean"] += 0.1
    with pytest.raises(ValueError, match="row 3 was made, and is not the volume that the recipe describes"):
        opened.volume(list(opened.rows).index(3))
    stage._rows.cache_clear()


@pytest.mark.parametrize("member", ["plan.json", "samples.parquet", "bundle/diffusion.safetensors", SUBJECTS_KEY])
def test_a_recipe_that_was_changed_is_refused(written: Path, member: str) -> None:
    with zipfile.ZipFile(written) as archive:
        offset = archive.getinfo(member).header_offset
    data = bytearray(written.read_bytes())
    data[offset + 200] ^= 1
    written.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        open_dataset(str(written))


def test_a_recipe_sealed_anew_around_another_part_is_refused(written: Path, tmp_path: Path) -> None:
    """Its own digests fit again; plan and manifest still name what was there."""
    recipe, members = read_recipe(written)
    other: dict[str, Any] = json.loads(members["bundle/bundle.json"])
    import dataclasses
    import hashlib

    for name, data in (
        ("participants.tsv", members["participants.tsv"].replace(b"\tF", b"\tM")),
        (SUBJECTS_KEY, members["manifest/shards.parquet"]),
    ):
        changed = members | {name: data}
        files = {key: hashlib.sha256(value).hexdigest() for key, value in changed.items()}
        write_recipe(tmp_path / "other.recipe", dataclasses.replace(recipe, files=files), changed)
        with pytest.raises(UserError, match="was changed"):
            open_dataset(str(tmp_path / "other.recipe"))
    assert other["record"]["name"] == "tiny"


def test_what_is_no_recipe_is_refused(tmp_path: Path, written: Path) -> None:
    for name, data in (("text", b"a text"), ("empty", b""), ("cut", written.read_bytes()[:-500])):
        (tmp_path / f"{name}.recipe").write_bytes(data)
        with pytest.raises(UserError, match="is not a recipe, or is damaged"):
            open_dataset(str(tmp_path / f"{name}.recipe"))
    with zipfile.ZipFile(tmp_path / "foreign.recipe", "w") as archive:
        archive.writestr("../outside.txt", b"x")
        with zipfile.ZipFile(written) as whole:
            archive.writestr(RECIPE_KEY, whole.read(RECIPE_KEY))
    with pytest.raises(UserError, match="which no recipe does"):
        open_dataset(str(tmp_path / "foreign.recipe"))
    with pytest.raises(UserError, match="there is no recipe at"):
        open_dataset(str(tmp_path / "nowhere.recipe"))


def test_a_digest_is_no_path() -> None:
    with pytest.raises(ValueError, match="shards_digest must be a sha256"):
        Recipe(plan_fingerprint="", shards_digest="../../outside", bundle="", files={})


def test_a_recipe_is_made_whole(
    written: Path, generated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again"
    words = ["materialise", str(written), "--output", str(again), "--workers", "0"]
    assert run(*words) == 0
    assert "every object is the one that the recipe was written from" in capsys.readouterr().out
    assert verify_dataset(str(again)).ok
    np.testing.assert_array_equal(open_dataset(str(again)).volumes(), open_dataset(str(generated)).volumes())
    assert run(*words) == 0  # once more: nothing is left to do


def test_twice_has_the_same_bytes(line: Line, generated: Path, written: Path, tmp_path: Path) -> None:
    stage.write(str(generated), str(line.root / "bundle"), tmp_path / "second.recipe")
    assert (tmp_path / "second.recipe").read_bytes() == written.read_bytes()
    with pytest.raises(UserError, match="the name of a recipe ends in .recipe"):
        stage.write(str(generated), str(line.root / "bundle"), tmp_path / "brains.zip")
    with pytest.raises(UserError, match="is not the bundle that made"):
        stage.write(str(generated), "t1w-2mm", tmp_path / "third.recipe")


def test_the_commands_of_the_page_run(
    line: Line, generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/recipe.md, on a dataset of the tiny bundle at the place of one of the bundled model's."""
    (tmp_path / "demo-output").mkdir()
    (tmp_path / "demo-output" / "generated").symlink_to(generated)
    monkeypatch.chdir(tmp_path)
    typed = [command.words for command in commands("docs/recipe.md") if not command.quoted]
    assert [words[1] for words in typed] == ["recipe", "materialise"]
    for words in typed:
        more = ["--bundle", str(line.root / "bundle")] if words[1] == "recipe" else []
        assert run(*words[1:], *more) == 0
    assert len(open_dataset("brains.recipe")) == len(open_dataset("demo-output/again"))
