"""What the audit of `make lint` makes of pip-audit's answers."""

from __future__ import annotations

import json

import pytest

from tests.security.audit import judge


def answer(*packages: dict[str, object]) -> str:
    return json.dumps({"dependencies": packages, "fixes": []})


FINE = {"name": "good", "version": "1.0", "vulns": []}
FIXABLE = {"name": "bad", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"], "aliases": []}]}
NO_FIX = {"name": "sad", "version": "1.0", "vulns": [{"id": "PYSEC-2", "fix_versions": [], "aliases": []}]}
UNKNOWN = {"name": "ours", "skip_reason": "not found"}
NO_NETWORK = "requests.exceptions.ProxyError: HTTPSConnectionPool: Max retries exceeded with url: /x (Caused by …)"


@pytest.mark.parametrize(
    ("output", "errors", "code", "said"),
    [
        (answer(FINE, UNKNOWN), "", 0, "1 of 2 packages asked for, 0 fixable"),
        (answer(FINE, FIXABLE), "", 1, "bad 1.0: PYSEC-1, fixed in 1.1"),
        (answer(FINE, NO_FIX), "", 0, "sad 1.0: PYSEC-2, no fix yet"),
        (answer(UNKNOWN), "", 0, "SKIPPED"),
        ("", NO_NETWORK, 0, "SKIPPED, the advisory service cannot be reached"),
        ("", "error: unrecognized arguments", 1, "pip-audit failed: error: unrecognized arguments"),
        ("", "", 1, "pip-audit failed"),
    ],
)
def test_only_a_fixable_vulnerability_or_a_broken_audit_fails(output: str, errors: str, code: int, said: str) -> None:
    found, text = judge(1 if FIXABLE["name"] in output or not output else 0, output, errors)
    assert found == code
    assert said in text
