"""The stage of jobs/evaluate.py: measure two datasets on any executor, then judge the measurements here."""

from __future__ import annotations

import logging

from brainsynth.config.evaluation import EvaluateConfig
from brainsynth.errors import UserError
from brainsynth.evaluation.assessment import assess
from brainsynth.evaluation.evaluation_report import REPORT_KEY, write_report
from brainsynth.evaluation.fidelity import diversity, fidelity
from brainsynth.evaluation.finding import Finding
from brainsynth.evaluation.measurement import (
    check_same_grid,
    instruments_of,
    measured_table,
    open_volumes,
    plan_measurement,
)
from brainsynth.executors.dataset import dry_run, make_dataset
from brainsynth.storage.filesystem import open_store, resolve_uri
from brainsynth.storage.work import Work

log = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig) -> list[Finding]:
    """Measurements of dataset and reference → report.html, report.json, measured.tsv. Returns the verdict table."""
    works = _plan(config)
    for work in works:
        make_dataset(work, config.runtime)
    made, real = (work.root for work in works)
    dataset = open_volumes(config.dataset, "dataset")
    reference = open_volumes(config.reference, "reference")
    findings, scatters = assess(config, made, real)
    findings += fidelity(made, real) + diversity(dataset, reference, config.pairs)
    facts = {
        "dataset": f"{config.dataset}, {len(dataset)} volumes",
        "reference": f"{config.reference}, {len(reference)} real scans",
        "instruments": instruments_of(made),
    }
    store = open_store(resolve_uri(config.output, "output"))
    write_report(store, findings, scatters, dataset, facts, measured_table(made))
    for finding in findings:
        log.info(
            "%s: %.3g [%.3g, %.3g] n = %d; real %.3g [%.3g, %.3g] n = %d%s",
            *(finding.metric, finding.value, finding.low, finding.high, finding.n),
            *(finding.real, finding.real_low, finding.real_high, finding.real_n),
            "" if finding.as_real else "  DIFFERS FROM REAL",
        )
    log.info("report: %s/%s", store.uri, REPORT_KEY)
    return findings


def describe_evaluate(config: EvaluateConfig) -> str:
    """What evaluate would measure."""
    return "\n".join(dry_run(work, config.runtime) for work in _plan(config))


def _plan(config: EvaluateConfig) -> tuple[Work, Work]:
    dataset, reference = open_volumes(config.dataset, "dataset"), open_volumes(config.reference, "reference")
    check_same_grid(dataset, reference)
    absent = [name for name in config.structures if name not in dataset.covariates]
    if absent:
        raise UserError(
            f"structures: {', '.join(absent)} is no covariate of {config.dataset} ({', '.join(dataset.covariates)})"
        )
    for split in ("train", "validation"):
        open_volumes(config.reference, "reference", split=split)
    return (
        plan_measurement(config, config.dataset, "dataset", "measured-dataset"),
        plan_measurement(config, config.reference, "reference", "measured-reference"),
    )
