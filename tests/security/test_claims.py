"""SECURITY.md names a test for every claim, and each is there."""

from __future__ import annotations

import re
from pathlib import Path

REPO = Path(__file__).parents[2]


def test_every_guard_names_a_test_that_exists() -> None:
    text = (REPO / "SECURITY.md").read_text()
    guards = re.search(r"## What the guards do\n(.*?)\n## ", text, re.S)
    assert guards
    paragraphs = re.findall(r"^\*\*(.+?)\*\* \[(.+?)\]", guards[1], re.M | re.S)
    assert len(paragraphs) >= 5
    assert len(paragraphs) == len(re.findall(r"^\*\*", guards[1], re.M))
    for claim, tests in paragraphs:
        named = re.findall(r"`(tests/[\w/]+\.py)`", tests)
        assert named, claim
        assert [name for name in named if not (REPO / name).is_file()] == []


def test_its_figures_are_those_of_the_code() -> None:
    from brainsynth import records
    from brainsynth.config import load
    from brainsynth.storage import untrusted

    text = " ".join((REPO / "SECURITY.md").read_text().split())
    assert f"at most {load._MAX_BYTES >> 10} KiB, {load._MAX_TOKENS:,} tokens and {load._MAX_DEPTH} levels" in text
    assert f"at most {records.MAX_RECORD_BYTES >> 20} MiB and {records.MAX_RECORD_VALUES:,} values" in text
    assert f"at most {untrusted.MAX_TABLE_BYTES >> 30} GiB and {untrusted.MAX_CELLS // 10**6} million cells" in text
