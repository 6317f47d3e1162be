"""Four promises of SECURITY.md as lines of the table: nothing runs, nothing escapes, bombs cost little, secrets stay out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.ledger import Finding, Ledger
from tests.line import Line
from tests.security import corpus, escapes
from tests.security.conftest import good_bundle as good_bundle  # the fixture
from tests.security.payloads import LIVE, live_payloads
from tests.security.test_secrets import PLANTED, Run
from tests.security.test_secrets import planted as planted  # the fixture

REPO = Path(__file__).parents[2]
MAX_SECONDS, MAX_MIB = 1.0, 256
Size = Callable[[int, int], int]


@pytest.mark.slow
def test_files_cannot_run_code(ledger: Ledger, size: Size, good_bundle: Path, tmp_path: Path) -> None:
    refused, began = [], time.monotonic()
    cases = list(corpus.CORPUS.items())[:: size(3, 1)]
    for name, case in cases:
        folder = tmp_path / name.replace("/", "-")
        folder.mkdir()
        if case(corpus.Place(folder=folder, flag=tmp_path / f"flag-{folder.name}", bundle=good_bundle)):
            refused.append(name)
    ran = corpus.flags_below(tmp_path)
    (tmp_path / "proof").mkdir()
    live = live_payloads(tmp_path / "proof")
    assert len(refused) == len(cases) >= 24
    assert ran == []
    assert live == dict.fromkeys(LIVE, True)
    ledger.record(
        Finding(
            promise="files cannot run code",
            fault="pickles, tags, targets, codecs and lies, in every kind of file that is read",
            tries=len(refused),
            wrong=len(ran),
            figure=f"{len(ran)} of {len(refused)} ran, all were refused, in {time.monotonic() - began:.0f} s together; "
            f"{sum(live.values())} of {len(live)} kinds of payload do run in a reader that trusts them",
            target="0 of at least 24",
        )
    )


def test_no_path_leaves_its_folder(ledger: Ledger, size: Size, good_bundle: Path, tmp_path: Path) -> None:
    cases = list(escapes.CASES.values())[:: size(3, 1)]
    for number, case in enumerate(cases):
        escapes.attempt(case, tmp_path / str(number), good_bundle)
    assert len(cases) >= 40
    ledger.record(
        Finding(
            promise="no path escape",
            fault="ids, keys, names of files and arrays, and links that lead out of their folder",
            tries=len(cases),
            figure=f"0 of {len(cases)} made, changed or read anything outside",
            target="0 of at least 40",
        )
    )


@pytest.mark.slow
def test_bombs_cost_little(ledger: Ledger, size: Size, tmp_path: Path) -> None:
    rounds = size(1, 3)
    command = [sys.executable, "-m", "tests.security.weigh_bombs", str(tmp_path), str(rounds)]
    done = subprocess.run(command, cwd=REPO, env=os.environ, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    costs = json.loads(done.stdout.splitlines()[-1])
    configs = {f"config {name}" for name in corpus.CONFIGS}
    assert set(costs) == {*corpus.BOMBS, *configs, "record depth", "record width"}
    slow = {name: cost for name, cost in costs.items() if cost["seconds"] > MAX_SECONDS}
    heavy = {name: cost for name, cost in costs.items() if cost["mib"] > MAX_MIB}
    assert slow == heavy == {}
    worst = {kind: max(cost[kind] for cost in costs.values()) for kind in ("seconds", "mib")}
    ledger.record(
        Finding(
            promise="bombs rejected",
            fault="huge shapes in small files, gzip, bzip2, nested and endless YAML and JSON, XML entities",
            tries=len(costs) * rounds,
            figure=f"{len(costs)} bombs, the worst took {worst['seconds']:.2f} s of processor time and "
            f"{worst['mib']:.0f} MiB more than a small good scan",
            target=f"<= {MAX_SECONDS:g} s and <= {MAX_MIB} MiB each",
        )
    )


@pytest.mark.slow  # a training and a generation on Ray
def test_secrets_stay_out(ledger: Ledger, line: Line, planted: Run) -> None:
    hits = {what: planted.hits(word) for what, word in PLANTED.items()}
    hits["the token of Ray"] = planted.hits(planted.ray_token)
    assert hits == {what: [] for what in hits}
    files = sum(1 for folder in planted.folders.values() for path in folder.rglob("*") if path.is_file())
    ledger.record(
        Finding(
            promise="secrets stay out",
            fault="a key, a token, two passwords and a signature planted in environment, URIs and config; Ray's token",
            tries=len(hits),
            figure=f"0 hits in the output of 4 runs and in {files} files (dataset, checkpoints, report, Ray's logs)",
            target="5 planted, 0 hits",
        )
    )
