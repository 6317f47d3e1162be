"""`brainsynth verify`: read a dataset back, and re-plan what is damaged."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from brainsynth.config.job import DAMAGED
from brainsynth.errors import UserError
from brainsynth.storage.filesystem import LocalStore, open_store, resolve_uri
from brainsynth.storage.repair import lost_summary, repair
from brainsynth.storage.verify import verify_dataset

RELEASE_KEY = "release.json"
log = logging.getLogger(__name__)


def command(arguments: argparse.Namespace) -> int:
    """Exit code 0: whole; 1: damaged, or a release that is not signed by the key that was given."""
    if arguments.failed and not arguments.repair:
        raise UserError("--failed changes what --repair re-plans: give both")
    store = open_store(resolve_uri(arguments.uri, "uri"))
    if isinstance(store, LocalStore) and (store.path / RELEASE_KEY).is_file():
        return _release(store.path, arguments)
    if arguments.public_key:
        raise UserError(f"--public-key: {arguments.uri} is not the local folder of a release: {RELEASE_KEY} is missing")
    report = verify_dataset(store, progress=_progress)
    print(report.summary())
    if arguments.repair:
        lost = repair(store, report, failed=arguments.failed)
        print(lost_summary(lost) if lost or not report.ok else "nothing to repair")
    return 0 if report.ok else DAMAGED


def _release(folder: Path, arguments: argparse.Namespace) -> int:
    """Every file of a release against its checksums, and who signed it."""
    from brainsynth.stages.released import changed, read_release, signature_problem, sums

    if arguments.repair:
        raise UserError(
            f"--repair: {folder} is a release; repair the dataset that it was made of, and release that again"
        )
    forged = signature_problem(folder, arguments.public_key) if arguments.public_key else ""
    if forged:  # then nothing in it is to be believed
        print(f"{folder}: NOT ok\n{forged}")
        return DAMAGED
    wanted = sums(folder, read_release(folder))
    problems = changed(folder, wanted)
    signed = f", signed by {arguments.public_key}" if arguments.public_key else ""
    print("\n".join([f"{folder}: {'NOT ok' if problems else 'ok'}, {len(wanted)} files{signed}", *problems]))
    return DAMAGED if problems else 0


def _progress(done: int, total: int) -> None:
    if done % max(1, total // 20) == 0 and total >= 100:
        log.info("%d/%d shards", done, total)
