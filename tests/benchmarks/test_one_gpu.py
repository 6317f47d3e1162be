"""recipes/pyramid/one_gpu.py has minutes on a GPU: what it needs is tried here, on the CPU and a narrow pyramid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.pyramid import one_gpu


def test_parts_join_to_the_folder_and_are_small(tmp_path: Path) -> None:
    folder = tmp_path / "cohort"
    (folder / "shards").mkdir(parents=True)
    written = {"plan.json": b"{}", "shards/0": bytes(range(256)) * 500}
    for name, content in written.items():
        (folder / name).write_bytes(content)
    one_gpu.pack(folder, tmp_path / "parts", "cohort", 50_000)
    sizes = [path.stat().st_size for path in (tmp_path / "parts").iterdir()]
    assert len(sizes) > 2
    assert max(sizes) <= 50_000
    back = one_gpu.unpack(tmp_path / "parts", "cohort", tmp_path / "back")
    assert {name: (back / name).read_bytes() for name in written} == written


def test_parts_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has no cohort\.tar\.000"):
        one_gpu.unpack(tmp_path, "cohort", tmp_path / "back")


def test_a_command_that_fails_ends_the_run_with_its_log(tmp_path: Path) -> None:
    commands = one_gpu.Commands(tmp_path, "cpu")
    with pytest.raises(SystemExit, match=r"export failed; see .*export\.log"):
        commands.run(
            "export-bundle", "5-bundle.yaml", "export", diffusion=tmp_path / "absent", output=tmp_path / "bundle"
        )
    assert json.loads((tmp_path / "run.json").read_text())[0]["exit_code"] == 2
    assert "absent" in (tmp_path / "export.log").read_text()
