"""`brainsynth export`: here, or its units on Ray. Ray spreads gzip's work over CPUs; reading a shard costs little."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator

from brainsynth.errors import UserError
from brainsynth.export.plan import ExportPlan, ExportRecord, begin, plan_export
from brainsynth.export.run import export_unit, finish, units

log = logging.getLogger(__name__)
PROGRESS_S = 15.0
ATTEMPTS = 3


def run_export(export: ExportPlan, partial: bool = False, workers: int = 0) -> ExportRecord:
    """Write everything that is not there yet. `workers` 0: in this process; else this many Ray tasks at a time.

    Raises:
        UserError: a volume is damaged and `partial` is not set, or the output cannot be written.
    """
    if workers < 0:
        raise UserError(f"--workers {workers}: 0 (this process) or more")
    begin(export)
    done, damaged, shown = 0, [], time.monotonic()
    for ids, count in _on_ray(export, partial, workers) if workers else _here(export, partial):
        damaged += ids
        done += count
        if time.monotonic() - shown > PROGRESS_S:
            shown = time.monotonic()
            log.info("%d/%d volumes", done, len(export.subjects))
    return finish(export, damaged)


def _here(export: ExportPlan, partial: bool) -> Iterator[tuple[list[str], int]]:
    for number, subjects in units(export):
        yield export_unit(export, number, subjects, partial), len(subjects)


def _on_ray(export: ExportPlan, partial: bool, workers: int) -> Iterator[tuple[list[str], int]]:
    from brainsynth.executors.session import ray_session

    with ray_session():
        import ray

        # A unit may be run again: what is written is whole, and the next try leaves it.
        run = ray.remote(num_cpus=1, max_retries=ATTEMPTS)(export_unit)
        shared = ray.put(_without_subjects(export))
        waiting: dict[ray.ObjectRef[list[str]], int] = {}
        left = units(export)[::-1]
        while left or waiting:
            while left and len(waiting) < workers:
                number, subjects = left.pop()
                waiting[run.remote(shared, number, subjects, partial)] = len(subjects)
            ready, _ = ray.wait(list(waiting), num_returns=1)
            yield ray.get(ready[0]), waiting.pop(ready[0])


def _without_subjects(export: ExportPlan) -> ExportPlan:
    """What a unit needs: it is given its own subjects."""
    return ExportPlan(export.uri, export.output, export.plan, export.model, export.record, [])


def command(arguments: argparse.Namespace) -> int:
    """See `brainsynth export --help`."""
    export = plan_export(
        arguments.uri, arguments.output, arguments.to, arguments.where, arguments.split, arguments.partial
    )
    done = run_export(export, arguments.partial, arguments.workers)
    print(f"{done.subjects - len(done.left_out)} volumes as {done.format}: {export.output}")
    if done.left_out:
        print(f"left out, damaged: {', '.join(done.left_out)}")
    if export.plan.kind == "generated" and export.model is None:
        print("the dataset does not name the licence of its model: it was made before brainsynth recorded that")
    return 0
