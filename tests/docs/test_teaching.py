"""docs/teaching.md: the cells of its notebook run in their order, then the page's commands on what they made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

from brainsynth import cli, open_dataset
from tests.docs.pages import REPO, commands

NOTEBOOK = REPO / "docs/tutorials/teaching.ipynb"


def sources(kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def test_the_notebook_is_one_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert [cell for cell in notebook["cells"] if cell.get("outputs")] == []
    for source in sources("code"):
        compile(source, NOTEBOOK.name, "exec")


@pytest.mark.slow
def test_the_lesson_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("Agg")
    shown: list[float] = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(float(np.ptp(plt.gcf().axes[0].images[0].get_array()))))
    names: dict[str, Any] = {"__name__": "lesson"}
    for number, source in enumerate(sources("code")):
        exec(compile(source, f"{NOTEBOOK.name}, cell {number}", "exec"), names)  # noqa: S102
    plt.close("all")
    assert len(shown) == 4
    assert min(shown) > 0.3  # none is black
    assert list(names["measured"]) == ["measured_age", "measured_ventricular_volume", "measured_brain_volume"]
    assert "the instrument: " in capsys.readouterr().out
    ventricles = names["answers"].sort_values("ventricular_volume")["measured_ventricular_volume"]
    assert ventricles.iloc[-1] > ventricles.iloc[0]
    typed = [command.words for command in commands("docs/teaching.md") if not command.quoted]
    assert [words[1] for words in typed] == ["view", "export"]
    for words in typed:
        with pytest.raises(SystemExit) as ended:
            cli.main(words[1:])
        assert ended.value.code == 0
    assert (tmp_path / "lesson/site/index.html").is_file()
    assert len(list((tmp_path / "lesson/site/volumes").iterdir())) == len(open_dataset("lesson/ageing")) == 5
    assert len({path.parent for path in (tmp_path / "lesson/dicom").rglob("*.dcm")}) == 5
