"""Procedural brains whose true volumes are known, as a BIDS folder."""

from __future__ import annotations

import logging

from brainsynth.cohort.phantom import phantom_grid
from brainsynth.cohort.phantom_cohort import write_phantom_cohort
from brainsynth.config.schema import (
    PhantomConfig,
)
from brainsynth.storage.filesystem import local_folder

log = logging.getLogger(__name__)


def run(config: PhantomConfig) -> None:
    """Procedural scans and their covariates, as a BIDS folder."""
    volume = phantom_grid(config.spacing_mm, config.shape_xyz)
    folder = local_folder(config.output, "output")

    def progress(done: int, total: int) -> None:
        if done % max(1, total // 4) == 0 or done == total:
            log.info("%d/%d phantoms", done, total)

    write_phantom_cohort(folder, config.num_subjects, config.seed, volume, progress, config.workers, config.labels)
    log.info("phantom cohort: %s", folder)


def describe(config: PhantomConfig) -> str:
    """What make_phantoms would write."""
    return f"{config.num_subjects} phantoms of {config.shape_xyz} at {config.spacing_mm} mm → {config.output}"
