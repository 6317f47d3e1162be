"""`brainsynth report`: a dataset's report, written again."""

from __future__ import annotations

import argparse

from brainsynth.evaluation.dataset_report import report_dataset
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import open_store, resolve_uri


def command(arguments: argparse.Namespace) -> int:
    """Writes report.html and report.json."""
    uri = resolve_uri(arguments.uri, "uri")
    read_plan(open_store(uri))  # a folder without a dataset gets the same message as from the other verbs
    report_dataset(uri, arguments.bundle)
    return 0
