"""Documentation and comments use plain technical English: tests/language.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import language


def test_no_page_and_no_module_has_a_banned_phrase() -> None:
    assert language.all_faults([*language.PROSE, *language.COMMENTED, *language.PYTHON]) == []


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("page.md", "The job\nis told so.\n", 2),
        ("page.md", "a phrase that travels\nalong\n", 1),
        ("page.md", "[beside](there.md)\n", 1),
        ("config.yaml", "key: 1    # drawn anew\n", 1),
        ("module.py", 'x = f"{1} goes on from {2}"\n', 1),
        ("module.py", 'def f():\n    """Says.\n\n    Mends it.\n    """\n', 4),
        ("module.py", "x = 1  # beside it\n", 1),
    ],
)
def test_the_search_finds_them(
    name: str, text: str, line: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "REPO", tmp_path)
    (tmp_path / name).write_text(text)
    (fault,) = language.faults(tmp_path / name)
    assert fault.startswith(f"{name}:{line}: ")


@pytest.mark.parametrize(
    "text", ["```text\nbeside\n```\n", "the word `told`\n", "They cannot be told apart.\n", "There is no dataset.\n",
             "It is no longer there.\n", "[text](beside.md)\n", "Scans stand in for generated ones.\n"]
)  # fmt: skip
def test_the_search_spares_code_and_good_english(text: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(text)
    assert list(language.faults(tmp_path / "page.md")) == []
