"""No name, key or link leads out of the folder that it belongs to: nothing there is made, changed or read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.security.escapes import CASES, Watch, attempt, outside


@pytest.mark.parametrize("name", CASES)
def test_nothing_leaves_its_folder(name: str, tmp_path: Path, good_bundle: Path) -> None:
    assert attempt(CASES[name], tmp_path, good_bundle)


def test_the_watch_sees_what_it_should(tmp_path: Path) -> None:
    with outside(tmp_path) as root, Watch(tmp_path, root) as watch:
        (root / "inside").write_text("x")
        (root / ".." / "secret").read_bytes()
        (root.parent / "made").write_text("x")
    assert [Path(p).name for p in watch.opened] == ["secret", "made"]
    assert [Path(p).name for p, _ in watch.changed] == ["made"]
