"""`brainsynth verify URI`: for whoever holds a dataset. Making one is the jobs' work (jobs/)."""

from __future__ import annotations

import argparse
import logging
import sys

from brainsynth.config.cli import configure_logging, guarded
from brainsynth.storage.filesystem import open_store, resolve_uri
from brainsynth.storage.verify import verify_dataset

log = logging.getLogger(__name__)
DAMAGED = 1


def main() -> None:
    """Exit code 0: whole; 1: something is missing, corrupt or unexpected; 2: there is no dataset to verify."""
    parser = argparse.ArgumentParser(prog="brainsynth", description="Synthetic 3D brain MRI at scale.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verify = verbs.add_parser("verify", help="read everything back; name each missing, corrupt or unexpected object")
    verify.add_argument("uri", help="the dataset's folder: a path or an object-store URI")
    arguments = parser.parse_args()
    configure_logging()
    damaged = False

    def run() -> None:
        nonlocal damaged
        store = open_store(resolve_uri(arguments.uri, "uri"))
        report = verify_dataset(store, progress=_progress)
        print(report.summary())
        damaged = not report.ok

    sys.exit(guarded(run) or (DAMAGED if damaged else 0))


def _progress(done: int, total: int) -> None:
    if done % max(1, total // 20) == 0 and total >= 100:
        log.info("%d/%d shards", done, total)
