"""Prints the peak memory of judging 1,000, 10,000 and 100,000 measured volumes, as Markdown.

    python -m benchmarks.judge_memory [--rows 1000 10000 100000] [--output FOLDER]

The measurements are noise in the form in which `brainsynth evaluate` stores them, with the embedder's features, on a small
box: tissue maps have 2,100 numbers in place of a head's 17,000. The reference has 2,000 scans. Each judgement runs in its
own process. Disk: 13 kB per row.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from brainsynth.evaluation.fidelity import fidelity
from tests.evaluation.noise import write_measurements

REFERENCE = 2000


def main() -> None:
    """Parse the command line, make what is missing, judge in new processes, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--judge", type=Path, nargs=2, default=None, help="judge this set against that one, and exit")
    options = parser.parse_args()
    if options.judge is not None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began, cpu = time.perf_counter(), time.process_time()
        found = fidelity(*(str(path) for path in options.judge))
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        print(
            f"{found.made.count:,} | {len(found.made):,} | {before / 1024:.0f} | {after / 1024:.0f} | {cpu:.0f} | {wall:.0f}"
        )
        return
    root = options.output or Path(tempfile.mkdtemp())
    write_measurements(root / "reference", REFERENCE, 0)
    print(
        "| volumes | kept | MiB before | MiB at the peak | s of CPU | s |\n| --- | --- | --- | --- | --- | --- |",
        flush=True,
    )
    for rows in options.rows:
        write_measurements(root / str(rows), rows, 1)
        command = [
            sys.executable,
            "-m",
            "benchmarks.judge_memory",
            "--judge",
            str(root / str(rows)),
            str(root / "reference"),
        ]
        print(
            "| " + subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() + " |", flush=True
        )


if __name__ == "__main__":
    main()
