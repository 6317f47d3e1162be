"""Every example of docs/reading.md, verbatim, on a dataset at the place that it names."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "reading.md"
EXAMPLES = re.findall(r"^## ([^\n]+)\n|^```python\n(.*?)^```$", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
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
        "While it is still being generated",
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
    if "ray_dataset" in code:
        request.getfixturevalue("ray_cluster")
    (tmp_path / "example.py").write_text(code)
    monkeypatch.chdir(finished.parents[1])
    values = runpy.run_path(str(tmp_path / "example.py"), run_name="__main__")
    assert any(not name.startswith("__") for name in values), heading
