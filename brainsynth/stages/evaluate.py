"""`brainsynth evaluate`: measure two datasets on any executor, then judge the measurements here."""

from __future__ import annotations

import logging

from brainsynth.config.evaluation import EvaluateConfig
from brainsynth.evaluation.adherence import check_rulers, measured_values
from brainsynth.evaluation.assessment import assess
from brainsynth.evaluation.evaluation_report import JUDGED, REPORT_KEY, write_report
from brainsynth.evaluation.fidelity import diversity, fidelity
from brainsynth.evaluation.trajectories import Trajectory, read_trajectories
from brainsynth.evaluation.two_sample import check_two_sample, two_sample_findings
from brainsynth.executors.dataset import dry_run, make_dataset
from brainsynth.instruments.measured import instruments_of, measured_table
from brainsynth.instruments.measurement import check_same_grid, open_volumes, plan_measurement
from brainsynth.instruments.own_rulers import load_functions
from brainsynth.metrics.finding import Finding
from brainsynth.reading.dataset import SyntheticDataset
from brainsynth.stages.feature_network import feature_network
from brainsynth.stages.trajectories import plan_trajectories
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import open_store, resolve_uri
from brainsynth.storage.measured import put_measured
from brainsynth.storage.work import Work
from brainsynth.usefulness.tasks import check_usefulness, usefulness_findings, usefulness_results

log = logging.getLogger(__name__)


def run(config: EvaluateConfig) -> list[Finding]:
    """Measurements of dataset and reference → report.html, report.json, measured.tsv. Returns the verdict table."""
    _plan(config, make=False)  # every mistake is reported before an embedder is trained
    load_functions(config.functions)
    works = _plan(config, make=True)
    for work in works:
        make_dataset(work, config.runtime)
    made, real = (work.root for work in works[:2])
    dataset = open_volumes(config.dataset, "dataset")
    reference = open_volumes(config.reference, "reference")
    store = open_store(resolve_uri(config.output, "output"))
    findings, scatters = assess(config, made, real)
    looks = fidelity(made, real, config.by)
    findings += looks.findings + diversity(dataset, reference, config.pairs)
    findings += two_sample_findings(config, made, real, dataset, reference)
    usefulness = usefulness_results(config, made, real, dataset, reference, store)
    findings += usefulness_findings(usefulness)
    facts = {
        "dataset": f"{config.dataset}, {len(dataset)} volumes",
        JUDGED: dataset.manifest["shards_digest"],
        "reference": f"{config.reference}, {len(reference)} real scans",
        "instruments": instruments_of(made),
        "rulers": "; ".join(f"{s.title}: {s.ruler}" for s in scatters),
        "feature network": _network_fact(config, made),
    }
    trajectories = _trajectories(config, works[2].root, real) if config.trajectories else None
    write_report(
        store,
        dataset,
        facts=facts,
        findings=findings,
        scatters=scatters,
        measured=measured_table(made),
        fidelity=looks,
        trajectories=trajectories,
        usefulness=usefulness,
    )
    if config.publish and scatters:
        recorded = {"reference": reference.manifest["shards_digest"], "instruments": facts["instruments"]}
        digest = dataset.manifest["shards_digest"]
        table = measured_values(scatters)
        key = put_measured(open_store(dataset.uri), table, digest, recorded | {"rulers": facts["rulers"]})
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


def _network_fact(config: EvaluateConfig, made: str) -> str:
    """Which network gave the features, and whose weights those are."""
    network = read_plan(open_store(made)).identity.get("features")
    if network is None or config.features is None:
        return "none"
    given = config.features.medicalnet or config.features.embedder
    whose = (
        f"weights of {given}"
        if given
        else f"trained here on the reference's training split, {config.features.steps} steps"
    )
    return f"{network['network']}; {whose}; sha256 {network['sha256'][:16]}"


def describe(config: EvaluateConfig) -> str:
    """What evaluate would measure."""
    return "\n".join(dry_run(work, config.runtime) for work in _plan(config, make=False))


def _plan(config: EvaluateConfig, make: bool) -> list[Work]:
    """Measuring dataset and reference, then generating trajectories. With `make`, trains the embedder that is needed."""
    dataset, reference = open_volumes(config.dataset, "dataset"), open_volumes(config.reference, "reference")
    check_same_grid(dataset, reference)
    check_rulers(config, read_plan(open_store(dataset.uri)).covariates, config.dataset)
    counts = [len(open_volumes(config.reference, "reference", split=split)) for split in ("train", "validation")]
    check_usefulness(config, dataset, reference, *counts)
    check_two_sample(config, dataset, reference)
    network = feature_network(config, make)
    works = [
        plan_measurement(config, config.dataset, "dataset", "measured-dataset", network),
        plan_measurement(config, config.reference, "reference", "measured-reference", network),
    ]
    return [*works, plan_trajectories(config, config.trajectories)] if config.trajectories else works


def _trajectories(config: EvaluateConfig, root: str, real: str) -> tuple[list[Trajectory], SyntheticDataset]:
    """Measure the generated trajectories with the dataset's rulers, and read them back."""
    assert config.trajectories is not None
    work = plan_measurement(config, root, "trajectories", "measured-trajectories")
    make_dataset(work, config.runtime)
    volumes = open_volumes(root, "trajectories")
    return read_trajectories(config, config.trajectories, work.root, real, volumes), volumes
