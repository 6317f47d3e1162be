"""Bundle + covariates → dataset and its report."""

from __future__ import annotations

import logging
from pathlib import Path

from brainsynth.config.schema import (
    GenerateConfig,
)
from brainsynth.evaluation.dataset_report import report_dataset
from brainsynth.executors.dataset import dry_run, make_dataset
from brainsynth.generate import estimate_s, plan_generation, write_model_record

log = logging.getLogger(__name__)


def run(config: GenerateConfig) -> Path | None:
    """Bundle + covariates → dataset and its report: what `jobs/generate.py` does. The same call again resumes.

    With `runtime.workers: 0` it runs in this process, else on Ray: in the session that is there, on the cluster that
    RAY_ADDRESS names, or in a private session.

    Returns:
        The path of report.html (None on an object store); the dataset is at `config.output`.

    Raises:
        UserError: a mistake in the config or its inputs, another plan at `config.output`, or a layout that cannot run.
    """
    work = plan_generation(config)
    make_dataset(work, config.runtime)
    write_model_record(work, config.bundle)
    return report_dataset(work.root, config.bundle)


def describe(config: GenerateConfig) -> str:
    """What generate would make, and about how long it takes."""
    work = plan_generation(config)
    seconds = estimate_s(work, config.runtime.workers)
    return f"{dry_run(work, config.runtime)}\nabout {seconds / 60:.1f} min of generation, by one micro-batch timed here"
