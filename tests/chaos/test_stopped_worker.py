"""One of two workers is stopped: the other makes all that is left, and a line says what is waited for and where."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from brainsynth.executors.waiting import Waiting
from brainsynth.storage.attempts import Attempts, in_work, worker_of
from brainsynth.storage.filesystem import open_store
from tests.chaos.noise import diary
from tests.chaos.test_generation_faults import Driver, assert_whole


@pytest.mark.slow
def test_the_other_worker_makes_all_but_what_a_stopped_one_holds(tmp_path: Path) -> None:
    run = Driver(tmp_path / "data", "--rows", 40, "--per-shard", 2, "--seconds", 0.3)
    run.wait_until(lambda: len(run.committed()) >= 2 and len(run.workers()) == 2)
    begun = len(diary(run.diary))
    run.wait_until(lambda: len(diary(run.diary)) > begun)
    stopped = diary(run.diary)[-1][1]  # it is in the midst of a shard
    os.kill(stopped, signal.SIGSTOP)
    try:
        run.wait_until(lambda: len(run.committed()) >= 18, timeout_s=60)
        deadline = time.monotonic() + 30
        while f"(process {stopped} on " not in run.output and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)
        held = set(range(20)) - run.committed()
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert run.finish() == 0, run.output
    assert 1 <= len(held) <= 2
    said = re.findall(rf"waiting for shard (\d+) for \d+ s \(process {stopped} on \S+\)", run.output)
    assert set(map(int, said)) & held, run.output
    assert_whole(run.root)


def test_a_line_comes_for_what_takes_long_and_then_ever_rarer(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    waiting = Waiting(store, range(3), every_s=1.0)
    Attempts(store, 0).begin()
    Attempts(store, 2).begin()
    (note,) = (key for key, shard in in_work(store).items() if shard == 0)
    assert worker_of(store, note).startswith(f"{os.getpid()} on ")
    now = time.monotonic()
    assert waiting.line(now) is None
    waiting.came(2, 2.0)
    assert waiting.line(now + 5) is None, "three times the longest so far"
    line = waiting.line(now + 7)
    assert line is not None
    assert line.startswith(f"waiting for shard 0 for 7 s (process {os.getpid()} on ")
    assert "shard 2" not in line
    assert "2 not committed yet: 0, 1" in line
    assert waiting.line(now + 13) is None
    assert "shard 0 for 15 s" in str(waiting.line(now + 15))
    waiting.came(0, 16.0)
    assert waiting.line(time.monotonic() + 1) is None
    silent = waiting.line(time.monotonic() + 60)
    assert silent is not None
    assert "was given and has not begun" in silent
    assert "no shard was committed for 60 s" in silent
