"""The stage of jobs/evaluate.py: measure two datasets on any executor, then judge the measurements here."""

from __future__ import annotations

import logging

from brainsynth.config.evaluation import EvaluateConfig
from brainsynth.evaluation.adherence import check_rulers, measured_values
from brainsynth.evaluation.assessment import assess, diversity
from brainsynth.evaluation.evaluation_report import REPORT_KEY, write_report
from brainsynth.evaluation.finding import Finding
from brainsynth.evaluation.measurement import (
    check_same_grid,
    instruments_of,
    measured_table,
    open_volumes,
    plan_measurement,
)
from brainsynth.evaluation.own_rulers import load_functions
from brainsynth.evaluation.usefulness_tasks import check_usefulness, usefulness_findings, usefulness_results
from brainsynth.executors.dataset import dry_run, make_dataset
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import open_store, resolve_uri
from brainsynth.storage.quality import put_measured
from brainsynth.storage.work import Work

log = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig) -> list[Finding]:
    """Measurements of dataset and reference → report.html, report.json, measured.tsv. Returns the verdict table."""
    works = _plan(config)
    load_functions(config.functions)  # a mistake is told before anything is written
    for work in works:
        make_dataset(work, config.runtime)
    made, real = (work.root for work in works)
    dataset = open_volumes(config.dataset, "dataset")
    reference = open_volumes(config.reference, "reference")
    store = open_store(resolve_uri(config.output, "output"))
    findings, scatters = assess(config, made, real)
    findings += diversity(dataset, reference, config.pairs)
    usefulness = usefulness_results(config, made, real, dataset, reference, store)
    findings += usefulness_findings(usefulness)
    facts = {
        "dataset": f"{config.dataset}, {len(dataset)} volumes",
        "reference": f"{config.reference}, {len(reference)} real scans",
        "instruments": instruments_of(made),
        "rulers": "; ".join(f"{s.covariate}: {s.ruler}" for s in scatters),
    }
    write_report(store, findings, scatters, dataset, facts, measured_table(made), usefulness)
    if config.publish and scatters:
        beside = {"reference": reference.manifest["shards_digest"], "instruments": facts["instruments"]}
        digest = dataset.manifest["shards_digest"]
        table = measured_values(scatters)
        key = put_measured(open_store(dataset.uri), table, digest, beside | {"rulers": facts["rulers"]})
        log.info("measured values: %s/%s", dataset.uri, key)
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
    check_rulers(config, read_plan(open_store(dataset.uri)).covariates, config.dataset)
    counts = [len(open_volumes(config.reference, "reference", split=split)) for split in ("train", "validation")]
    check_usefulness(config, dataset, *counts)
    return (
        plan_measurement(config, config.dataset, "dataset", "measured-dataset"),
        plan_measurement(config, config.reference, "reference", "measured-reference"),
    )
