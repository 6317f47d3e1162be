"""Recipes and benchmarks are seldom run: what they take from the package must exist there."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for folder in ("recipes", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
OURS = ("brainsynth", "benchmarks", "recipes", "tests")


def missing(tree: ast.AST) -> list[str]:
    """Imported names, and attributes of imported modules, that do not exist."""
    modules: dict[str, ModuleType] = {}
    lost = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
            home = importlib.import_module(str(node.module))
            for alias in node.names:
                try:
                    if not hasattr(home, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")
                except ModuleNotFoundError:
                    lost.append(f"{node.module}.{alias.name}")
                    continue
                if isinstance(found := getattr(home, alias.name), ModuleType):
                    modules[alias.asname or alias.name] = found
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    for node in used:
        module = modules.get(node.value.id)
        if module is not None and not hasattr(module, node.attr):
            lost.append(f"{module.__name__}.{node.attr}")
    return lost


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_script_uses_exists(path: Path) -> None:
    assert missing(ast.parse(path.read_text())) == []


def test_a_lost_name_is_found() -> None:
    script = "from brainsynth.report import figures, nothing\nfigures.gallery\nfigures.gone\n"
    assert missing(ast.parse(script)) == ["brainsynth.report.nothing", "brainsynth.report.figures.gone"]
