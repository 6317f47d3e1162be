"""benchmarks/h200.py has one call on a GPU: what it needs is tried here, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from benchmarks import h200, overhead
from benchmarks.timed_shards import waiting

REPO = Path(__file__).parents[2]
EXPECTED = ("CUDA graphs need a GPU", "this CPU has no bfloat16 instructions")


@pytest.mark.slow
def test_every_section_runs_at_toy_size(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.h200", "--dry-run", "--out", str(out)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    sections = json.loads(out.read_text())["sections"]
    assert set(sections) == set(h200.SECTIONS)
    for name, section in sections.items():
        assert "error" not in section, (name, section)
        assert section["rungs"], name
        for rung, entry in section["rungs"].items():
            told = entry.get("error", "")
            assert "result" in entry or any(reason in told for reason in EXPECTED), (name, rung, entry)
    made = sections["pipeline"]["rungs"]["2 steps, gate"]["result"]
    assert 0 < made["busy_share"] <= 1
    assert sections["ladder"]["rungs"]["+ UniPC, 12 steps"]["result"]["s_per_volume"] > 0


CHILD = """
    import json, sys, time
    notes = sys.argv[sys.argv.index("--notes") + 1]
    with open(notes, "a") as file:
        for entry in ({"rung": "a", "begun": True}, {"rung": "a", "result": 1}, {"rung": "b", "begun": True}):
            file.write(json.dumps(entry) + "\\n")
    {END}
"""


@pytest.mark.parametrize(
    ("end", "limit_s", "told"), [("time.sleep(600)", 3.0, "ran past its 3 s"), ("sys.exit(9)", 60.0, "exit code 9")]
)
def test_a_section_that_hangs_or_dies_keeps_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, limit_s: float, told: str
) -> None:
    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(CHILD).replace("{END}", end))
    monkeypatch.setattr(h200, "ITSELF", (str(script),))
    began = time.monotonic()
    found = h200.in_a_process("facts", True, limit_s, tmp_path)
    assert time.monotonic() - began < 60
    assert found["rungs"]["a"] == {"result": 1}
    assert told in found["error"]
    assert told in found["rungs"]["b"]["error"]


def test_a_failing_rung_is_noted_and_the_next_one_runs(tmp_path: Path) -> None:
    notes = h200.Notes(tmp_path / "notes.jsonl", time.time() + 60)
    assert notes.rung("bad", lambda: 1 / 0) is None
    assert notes.rung("good", lambda: 7) == 7
    notes.until = 0.0
    assert notes.rung("late", lambda: 7) is None
    entries = [json.loads(line) for line in (tmp_path / "notes.jsonl").read_text().splitlines()]
    assert any("ZeroDivisionError" in e.get("error", "") for e in entries)
    assert entries[-1] == {"rung": "late", "skipped": "the section's time was over"}


def test_a_package_that_is_missing_is_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(h200.NEEDS, "facts", ("torch", "no_such_package"))
    assert h200.in_a_process("facts", True, 1.0, tmp_path) == {"skipped": "not installed: no_such_package"}


def test_busy_share_is_told_from_the_records() -> None:
    """Two actors; after its first shard one is busy 8 of 10 s, the other 5 of 10."""

    def one(pid: int, began_at: float, make_s: float, device_s: float) -> dict[str, float]:
        times = {"began_at": began_at, "make_s": make_s, "sample_s": device_s - 1, "decode_s": 1.0, "finish_s": 1.0}
        return {"host": 0.0, "pid": float(pid), **times}

    records = [one(1, 0, 10, 2), one(1, 11, 9, 8), one(2, 5, 5, 2), one(2, 10, 4, 3), one(2, 15, 5, 2)]
    found = overhead.shares(records)
    assert found["actors"] == 2
    assert found["busy_share"] == pytest.approx(13 / 20)
    assert found["between_shards_share"] == pytest.approx(2 / 20)
    assert found["in_make_beside_device_share"] == pytest.approx(5 / 20)


def test_what_a_device_waits_for_is_told_from_the_threads(tmp_path: Path) -> None:
    """Before the first volume and after the last one nothing counts; with two threads that run, two cores are too few."""
    (tmp_path / "watch").write_text("01 02 11 12 02 03 01 00 11 01 02 1")
    found = waiting(str(tmp_path / "watch"), cores=2)
    assert found["device_waits_share"] == pytest.approx(4 / 7)
    assert found["device_waits_for_cores_share"] == pytest.approx(2 / 7)
    assert found["device_waits_for_python_share"] == pytest.approx(2 / 7)
