"""Every example of docs/reading.md and of the MONAI tutorial, verbatim, on a dataset at the place that they name."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset

from brainsynth import cli
from brainsynth.export.formats import FORMATS
from brainsynth.reading.volumes import Volumes
from tests.servers.static import StaticServer

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "reading.md"
TEXTS = [page.read_text() for page in (PAGE, DOCS / "tutorials" / "monai.md")]
EXAMPLES = re.findall(r"^##? ([^\n]+)\n|^```python\n(.*?)^```$", "\n".join(TEXTS), flags=re.DOTALL | re.MULTILINE)
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
            for line in block.splitlines() if line.startswith("brainsynth ")]  # fmt: skip
ADDRESS = "https://data.example.org/brains"
NEEDS = {"torchio": "torchio", ".xarray()": "dask"}


def named() -> list[tuple[str, str]]:
    heading, found = "", []
    for title, code in EXAMPLES:
        heading = title or heading
        found += [(heading, code)] if code else []
    return found


def test_the_page_has_an_example_of_every_reader() -> None:
    assert {heading for heading, _ in named()} >= {
        "By index, and as a table", "PyTorch", "MONAI", "TorchIO", "xarray and dask", "Ray Data",
        "By URL", "During generation", "Train on it in MONAI",
    }  # fmt: skip


@pytest.mark.parametrize(("heading", "code"), named(), ids=[f"{i}-{h}" for i, (h, _) in enumerate(named())])
def test_an_example_runs(
    heading: str,
    code: str,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    for sign, module in NEEDS.items():
        if sign in code:
            pytest.importorskip(module, reason=f"{module} is not installed: `pip install brainsynth[readers]`")
    server = StaticServer(finished) if ADDRESS in code else None
    code = code.replace(ADDRESS, server.url) if server else code
    monkeypatch.setenv("HOME", str(tmp_path))  # a cache is made there
    if "ray_dataset" in code:
        request.getfixturevalue("ray_cluster")
    (tmp_path / "example.py").write_text(code)
    (tmp_path / "demo-output").symlink_to(finished.parent)
    monkeypatch.chdir(tmp_path)
    values = runpy.run_path(str(tmp_path / "example.py"), run_name="__main__")
    named_here = {name: value for name, value in values.items() if not name.startswith("__")}
    assert named_here, heading
    assert [name for name, value in named_here.items() if is_source(value) and not first_item(value)] == []


def is_source(value: Any) -> bool:
    """A dataset, loader or queue that an example makes: to build one says nothing of what it gives."""
    return not isinstance(value, type) and isinstance(value, Volumes | Dataset | DataLoader)


def first_item(source: Any) -> bool:
    """Whether it gives a sample, or a batch, of volumes."""
    item = next(iter(source))
    images = [item[name] for name in ("image", "t1w") if name in item]
    return len(images) == 1 and len(images[0].shape) >= 3


def test_the_page_has_an_export_to_every_format() -> None:
    assert {format_ for format_ in FORMATS if any(f"--to {format_} " in line for line in COMMANDS)} == set(FORMATS)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_runs(line: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "demo-output"
    place.symlink_to(finished.parent)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    assert len(list(tmp_path.glob("exported/*/participants.tsv"))) == 1
