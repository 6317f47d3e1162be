"""No file runs code: each malicious one ends in a refusal that a user can read, and none makes its flag."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.security.corpus import CORPUS, Place, flags_below
from tests.security.payloads import LIVE, live_payloads


@pytest.mark.parametrize("name", CORPUS)
def test_a_malicious_file_is_refused(name: str, place: Place, tmp_path: Path) -> None:
    began = time.monotonic()
    reason = CORPUS[name](place)
    assert time.monotonic() - began < 20  # generous: a busy machine, and the making of the file; see the chaos suite
    assert reason
    assert "Traceback" not in reason
    assert flags_below(tmp_path) == []
    assert not list(tmp_path.parent.rglob("slipped"))


def test_the_payloads_are_live(tmp_path: Path) -> None:
    assert live_payloads(tmp_path) == dict.fromkeys(LIVE, True)
