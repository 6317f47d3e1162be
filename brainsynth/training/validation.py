"""Validation while a training runs: all workers measure, each its share. What fails here must not end the training.

At the paper's size a picture once needed more memory than the steps, and a training that dies of it dies of it again
after every resume.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from brainsynth.models.device import free_memory, is_out_of_memory
from brainsynth.training.image_quality import mean_closeness

if TYPE_CHECKING:
    from brainsynth.config.training import OptimisationConfig
    from brainsynth.training.loop import Task, Worker
    from brainsynth.training.trackers import MetricsLog

log = logging.getLogger(__name__)


def validated(
    task: Task, worker: Worker, metrics: MetricsLog | None, done: int, must: bool = False
) -> dict[str, float]:
    """The means over the validation split, the same on every worker; the first one logs them, and draws the figures.

    Args:
        metrics: the first worker's log.
        done: steps done.
        must: raise what went wrong. Else out of memory is a warning, and there are no numbers.
    """
    wrong: BaseException | None = None
    rows: list[dict[str, float]] | None = None
    try:
        rows = task.validate()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        wrong = error
    parts = worker.gathered(rows)
    rows = [row for part in parts if part is not None for row in part]
    if None in parts:
        free_memory()
        if must:
            raise wrong or RuntimeError("another worker ran out of memory while it validated")
        if metrics:
            log.warning("step %d: out of memory while validating; the training continues without these numbers", done)
        return {}
    values = mean_closeness(rows)
    if metrics:
        metrics.scalars(done, {f"validation/{name}": value for name, value in values.items()})
        log.info("step %d, on the validation split:  %s", done, "  ".join(f"{k} {v:.4g}" for k, v in values.items()))
        _draw(task, metrics, done)
    return values


def resumed_validation(
    task: Task, worker: Worker, metrics: MetricsLog | None, options: OptimisationConfig, start: int
) -> dict[str, float]:
    """What an undisturbed run would have measured after its last checkpoint, where this one was killed before it could."""
    last = start == options.steps
    if not start or not (last or start % options.validate_every == 0):
        return {}
    lacking = bool(worker.largest([float(metrics is not None and not metrics.validated)])[0])
    if not lacking and not last:
        return {}
    return validated(task, worker, metrics if lacking else None, start, must=last)


def _draw(task: Task, metrics: MetricsLog, done: int) -> None:
    try:
        for name, image in task.figures().items():
            metrics.figure(done, name, image)
    except Exception as error:
        log.warning("step %d: no figures (%s: %s); the training continues", done, type(error).__name__, error)
        free_memory()
