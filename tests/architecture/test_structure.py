"""The house holds: who may import whom, how long things may be, and where a dangerous word may stand."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
MODULES = sorted((REPO / "brainsynth").rglob("*.py"))
SCRIPTS = sorted((REPO / "jobs").glob("*.py"))
MAX_MODULE, MAX_FUNCTION, MAX_JOB, MAX_CHAIN = 450, 60, 12, 16


def name(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_there_is_something_to_look_at() -> None:
    assert len(MODULES) > 40
    assert len(SCRIPTS) >= 8


def test_import_contracts_hold() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache", "--config", "pyproject.toml"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def imported_at_the_top() -> dict[str, set[str]]:
    """Module → the modules of the package that importing it imports first, without those of its functions."""
    names = {".".join(p.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"): p for p in MODULES}
    del names["brainsynth"]  # its names are imported when they are asked for
    graph = {}
    for module, path in names.items():
        nodes = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ImportFrom) and n.module]
        asked = {f"{n.module}.{a.name}" for n in nodes for a in n.names} | {str(n.module) for n in nodes}
        graph[module] = (asked & set(names)) - {module}
    return graph


def test_imports_have_no_circle_and_short_chains() -> None:
    graph, length = imported_at_the_top(), dict[str, int]()
    for module in TopologicalSorter(graph).static_order():  # raises CycleError
        length[module] = 1 + max((length[m] for m in graph[module]), default=0)
    assert max(length.values()) <= MAX_CHAIN, max(length, key=lambda m: length[m])


def test_no_module_is_too_long() -> None:
    assert {name(p): lines(p) for p in MODULES if lines(p) > MAX_MODULE} == {}


def test_no_job_is_more_than_an_entrypoint() -> None:
    assert {name(p): lines(p) for p in SCRIPTS if lines(p) > MAX_JOB} == {}


def test_no_function_is_too_long() -> None:
    long = {}
    for path in [*MODULES, *SCRIPTS]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                if (node.end_lineno or 0) - first + 1 > MAX_FUNCTION:
                    long[f"{name(path)}:{node.name}"] = (node.end_lineno or 0) - first + 1
    assert long == {}


def test_every_module_says_what_it_is() -> None:
    mute = [p for p in [*MODULES, *SCRIPTS] if p.stat().st_size and not ast.get_docstring(ast.parse(p.read_text()))]
    assert [name(p) for p in mute] == []


def test_only_one_module_knows_the_accelerator() -> None:
    """And one, which needs no torch, its driver."""
    knowing = [name(p) for p in [*MODULES, *SCRIPTS] if "cuda" in p.read_text().lower()]
    assert sorted(knowing) == ["brainsynth/models/device.py", "brainsynth/models/driver.py"]


def test_no_drawer_for_everything() -> None:
    assert [name(p) for p in MODULES if re.search(r"(^|_)(utils?|helpers?|common|misc)$", p.stem)] == []
    assert [name(p) for p in (REPO / "brainsynth").rglob("*") if p.is_dir() and p.name in ("utils", "helpers")] == []


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """Every call by its written name: `torch.load`, `eval`."""
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def imported(tree: ast.AST) -> set[str]:
    """Top-level packages that a module imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def runs_code_from_data(tree: ast.AST) -> list[str]:
    """Ways in which a module could execute what it reads."""
    found = sorted(imported(tree) & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"})
    for called, node in calls(tree):
        if called in ("eval", "exec", "compile", "yaml.unsafe_load", "yaml.full_load", "os.system"):
            found.append(called)
        if called == "torch.load" and not any(
            k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True
            for k in node.keywords
        ):
            found.append(called)
        if called in ("np.load", "numpy.load") and any(k.arg == "allow_pickle" for k in node.keywords):
            found.append(called)
    return found


def test_nothing_executes_what_it_reads() -> None:
    assert {name(p): runs_code_from_data(ast.parse(p.read_text())) for p in [*MODULES, *SCRIPTS]} == {
        name(p): [] for p in [*MODULES, *SCRIPTS]
    }


@pytest.mark.parametrize(
    "text",
    ["import pickle", "from pickle import load", "eval('1')", "torch.load(p)", "torch.load(p, weights_only=False)"],
)
def test_the_search_for_that_finds_it(text: str) -> None:
    assert runs_code_from_data(ast.parse(text))


@pytest.mark.parametrize(
    "module",
    ["brainsynth.plan", "brainsynth.config.schema", "brainsynth.config.job", "brainsynth.storage.verify"],
)
def test_planning_and_verifying_load_no_network_library(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'monai', 'ray'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("use", "needed"),
    [
        ("brainsynth.open_dataset(root)[0]", {"numpy", "numcodecs", "google_crc32c"}),
        ("brainsynth.open_dataset(root).table", {"numpy", "numcodecs", "google_crc32c", "pandas", "pyarrow"}),
        (
            "brainsynth.verify_dataset(root)",
            {"numpy", "numcodecs", "google_crc32c", "pandas", "pyarrow", "zarr", "pydantic"},
        ),
    ],
)
def test_reading_needs_few_libraries(use: str, needed: set[str]) -> None:
    """What the base install holds, and no more; a URL needs obstore as well."""
    known = {"torch", "monai", "ray", "scipy", "nibabel", "obstore", "safetensors", "matplotlib"} | needed
    code = f"import sys, brainsynth; root = sys.argv[1]; {use}; print(sorted({known!r} & set(sys.modules)))"
    command = [sys.executable, "-c", code, str(REPO / "tests/stored/v1/dataset")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str(sorted(needed)), done.stdout + done.stderr
