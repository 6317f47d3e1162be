"""Scans → prepared cohort."""

from __future__ import annotations

import logging

from brainsynth.cohort.prepare import plan_cohort
from brainsynth.config.schema import (
    PrepareConfig,
)
from brainsynth.executors.dataset import dry_run, make_dataset

log = logging.getLogger(__name__)


def run(config: PrepareConfig) -> None:
    """Scans → prepared cohort."""
    manifest = make_dataset(plan_cohort(config), config.runtime)
    if manifest.num_rejected:
        log.info("rejected scans, each with its reason: %s/rejects.tsv", config.output)


def describe(config: PrepareConfig) -> str:
    """What prepare_cohort would make."""
    return dry_run(plan_cohort(config), config.runtime)
