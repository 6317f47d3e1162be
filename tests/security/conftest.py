"""A bundle to spoil, and a place for each malicious file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.security.corpus import Place
from tests.security.material import write_bundle


@pytest.fixture(scope="session")
def good_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole bundle; read it, never write to it."""
    return write_bundle(tmp_path_factory.mktemp("good") / "bundle")


@pytest.fixture
def place(tmp_path: Path, good_bundle: Path) -> Place:
    """Where one malicious file lives."""
    folder = tmp_path / "inside"
    folder.mkdir()
    return Place(folder=folder, flag=tmp_path / "flag", bundle=good_bundle)
