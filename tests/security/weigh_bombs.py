"""Run as a program: what each bomb costs in processor time and memory, above a small good scan. Prints one line of JSON.

Each is refused in a child that is forked when everything is imported and a good scan has been read, so that the peak of
its resident memory (VmHWM, set back at the start) is its own.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from brainsynth.cohort.scan import ScanRejected, load_scan
from brainsynth.errors import UserError
from brainsynth.plan import Plan
from brainsynth.records import unseal
from tests.conftest import GRID
from tests.security import corpus, payloads
from tests.security.material import nifti


def memory_mib(field: str) -> float:
    """Resident memory of this process now (VmRSS) or at its peak (VmHWM)."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) / 1024


def cost(feed: Callable[[], object]) -> dict[str, float]:
    """Seconds (of the processor: other programs may be busy) and MiB of one refusal, in a child."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reading)
        Path("/proc/self/clear_refs").write_text("5")
        before, began = memory_mib("VmRSS"), time.process_time()
        try:
            feed()
            found: dict[str, float] = {}
        except (ScanRejected, UserError):
            seconds = time.process_time() - began
            found = {"seconds": round(seconds, 3), "mib": round(memory_mib("VmHWM") - before, 1)}
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    found = json.loads(told)
    if not found:
        raise AssertionError("a bomb was accepted")
    return found


def prepared(folder: Path, name: str, case: corpus.Case) -> Callable[[], object]:
    """The feeding alone: the file is made first, so that its making is not counted."""
    made: list[Callable[[], object]] = []
    place = corpus.Place(folder=folder / name.replace("/", "-"), flag=folder / "flag", bundle=folder)
    place.folder.mkdir()
    case_of = {"load_scan": corpus.load_scan, "load_config": corpus.load_config}

    def note(which: str) -> Callable[..., object]:
        def feed(*arguments: object) -> None:
            made.append(lambda: case_of[which](*arguments))  # type: ignore[operator]
            raise ScanRejected if which == "load_scan" else UserError("noted")

        return feed

    for which in case_of:
        setattr(corpus, which, note(which))
    try:
        case(place)
    finally:
        for which, real in case_of.items():
            setattr(corpus, which, real)
    return made[0]


def main() -> None:
    """Every bomb, so many rounds; the worst of each counts."""
    folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
    good = folder / "good.nii"
    good.write_bytes(nifti())
    load_scan(str(good), "", GRID, "world", 512)
    feeds = {name: prepared(folder, name, case) for name, case in corpus.BOMBS.items()}
    feeds |= {f"config {name}": prepared(folder, f"config-{name}", case) for name, case in corpus.CONFIGS.items()}
    wide = b'{"sha256": "0", "record": [' + b"[]," * 95_000 + b"0]}"
    feeds["record depth"] = lambda: unseal(Plan, payloads.deep_json(), "record")
    feeds["record width"] = lambda: unseal(Plan, wide, "record")
    gc.collect()
    gc.freeze()  # else the collector copies every page of the parent into the child
    worst: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for name, feed in feeds.items():
            found, before = cost(feed), worst.get(name, {"seconds": 0.0, "mib": 0.0})
            worst[name] = {kind: max(found[kind], before[kind]) for kind in found}
    print(json.dumps(worst))


if __name__ == "__main__":
    main()
