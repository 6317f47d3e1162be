"""What a program may call: light to import, the same for type checkers, and the page that says so runs as it stands."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import brainsynth
from tests.docs.pages import PYTHON, REPO, blocks

PAGE = "docs/reference/python.md"
SOURCE = ast.parse(Path(brainsynth.__file__).read_text())


def for_type_checkers() -> dict[str, str]:
    """Name → where a type checker finds it."""
    (guard,) = (node for node in SOURCE.body if isinstance(node, ast.If))
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in guard.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_importing_the_package_imports_no_library() -> None:
    code = "import sys, brainsynth; print(sorted({m.partition('.')[0] for m in sys.modules} - set(sys.stdlib_module_names)))"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert ast.literal_eval(done.stdout) in (["brainsynth"], ["__main__", "brainsynth"]), done.stderr


def test_a_type_checker_sees_what_a_program_gets() -> None:
    there = for_type_checkers()
    assert sorted(there) == sorted(brainsynth.__all__)
    for name, place in there.items():
        module, _, attribute = place.rpartition(".")
        assert getattr(brainsynth, name) is getattr(importlib.import_module(module), attribute)


def test_a_name_that_is_none_is_told_and_every_name_is_listed() -> None:
    assert set(brainsynth.__all__) <= set(dir(brainsynth))
    assert not hasattr(brainsynth, "open_datasets")
    with pytest.raises(AttributeError, match="module 'brainsynth' has no attribute 'open_datasets'"):
        _ = brainsynth.open_datasets


def test_the_example_of_the_reference_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = (block for block in blocks(PAGE) if block.language == PYTHON)
    (tmp_path / "configs").symlink_to(REPO / "configs")
    monkeypatch.chdir(tmp_path)
    values: dict[str, object] = {}
    exec(compile(block.text, PAGE, "exec"), values)  # noqa: S102
    assert Path(str(values["report"])) == tmp_path / "demo-output/four/report.html"
    assert len(brainsynth.open_dataset("demo-output/four")) == 4
    assert len(values["people"]) == 100  # type: ignore[arg-type]
