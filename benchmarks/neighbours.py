"""Prints how long exact nearest neighbours of a large dataset take: 100,000 × 30,000 rows, d = 128, on 2 cores.

    python -m benchmarks.neighbours [--queries 100000] [--references 30000] [--width 128] [--k 6] [--threads 2]

The rows are unit vectors of Gaussian noise; a sample of the answers is compared with a loop over all pairs in float64.
"""

from __future__ import annotations

import argparse
import os
import resource
import time

import numpy as np
import torch

from brainsynth.metrics.neighbours import nearest_neighbours

CHECKED = 20


def unit_rows(n: int, width: int, seed: int) -> np.ndarray:
    """(n, width) float32 rows of length 1."""
    rows = np.random.default_rng(seed).standard_normal((n, width), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"queries": 100_000, "references": 30_000, "width": 128, "k": 6, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    queries, references = unit_rows(options.queries, options.width, 0), unit_rows(options.references, options.width, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, cpu = time.perf_counter(), time.process_time()
    found = nearest_neighbours(queries, references, options.k)
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    for row in np.random.default_rng(2).integers(0, len(queries), CHECKED):
        exact = np.linalg.norm(queries[row].astype(np.float64) - references, axis=1)
        assert np.array_equal(found.indices[row], np.argsort(exact, kind="stable")[: options.k])
    print(
        f"{options.queries:,} × {options.references:,}, d = {options.width}, k = {options.k}: {wall:.1f} s wall, "
        f"{cpu:.1f} s of CPU on {options.threads} threads ({os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} "
        f"from all processes), {grown:.0f} MiB more memory than the two sets; {CHECKED} rows as in a float64 loop"
    )


if __name__ == "__main__":
    main()
