"""`brainsynth verify`: read a dataset back, and re-plan what is damaged."""

from __future__ import annotations

import argparse
import logging

from brainsynth.config.job import DAMAGED
from brainsynth.errors import UserError
from brainsynth.storage.filesystem import open_store, resolve_uri
from brainsynth.storage.repair import lost_summary, repair
from brainsynth.storage.verify import verify_dataset

log = logging.getLogger(__name__)


def command(arguments: argparse.Namespace) -> int:
    """Exit code 0: whole; 1: damaged."""
    if arguments.failed and not arguments.repair:
        raise UserError("--failed changes what --repair re-plans: give both")
    store = open_store(resolve_uri(arguments.uri, "uri"))
    report = verify_dataset(store, progress=_progress)
    print(report.summary())
    if arguments.repair:
        lost = repair(store, report, failed=arguments.failed)
        print(lost_summary(lost) if lost or not report.ok else "nothing to repair")
    return 0 if report.ok else DAMAGED


def _progress(done: int, total: int) -> None:
    if done % max(1, total // 20) == 0 and total >= 100:
        log.info("%d/%d shards", done, total)
