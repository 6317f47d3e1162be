"""The page of an evaluation: the verdict table first, then distributions, scatter plots, slices and trajectories."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd

from brainsynth.evaluation.adherence import Scatter, measured_values
from brainsynth.evaluation.fidelity import Fidelity
from brainsynth.evaluation.fidelity_report import distributions_section, galleries_section, trajectories_section
from brainsynth.evaluation.trajectories import Trajectory
from brainsynth.metrics.finding import Finding
from brainsynth.reading.dataset import SyntheticDataset
from brainsynth.records import to_dict
from brainsynth.report import figures
from brainsynth.report.html import Page
from brainsynth.storage.filesystem import Store
from brainsynth.usefulness.report import usefulness_section
from brainsynth.usefulness.tasks import TaskResult

REPORT_KEY, NUMBERS_KEY, MEASURED_KEY = "report.html", "report.json", "measured.tsv"
JUDGED = "state of the dataset"
"""The fact that is the digest of what was judged."""


def write_report(
    store: Store,
    dataset: SyntheticDataset,
    *,
    facts: dict[str, Any],
    findings: list[Finding],
    scatters: list[Scatter],
    measured: pd.DataFrame,
    fidelity: Fidelity,
    trajectories: tuple[list[Trajectory], SyntheticDataset] | None,
    usefulness: list[TaskResult],
) -> None:
    """report.html, report.json and measured.tsv (one line per volume: asked, measured and every structure in ml).

    Slices are those of the dataset alone: real scans never enter the page.
    """
    page = Page("brainsynth evaluation", f"{dataset.uri} · {dataset.manifest['shards_digest'][:16]}")
    worse = [finding for finding in findings if not finding.as_real]
    page.text(
        f"{len(findings) - len(worse)} of {len(findings)} figures are as in real scans. Each is judged by whether its 95 % "
        "interval meets that of the same figure on real scans that no ruler was fitted on.",
        "warning" if worse else "note",
    )
    page.heading("Verdicts")
    page.table(
        ["metric", "value", "95 % CI", "n", "real scans", "their 95 % CI", "their n", "verdict"],
        [_row(f) for f in findings],
        marked={i for i, f in enumerate(findings) if not f.as_real},
    )
    for remark in fidelity.remarks:
        page.text(remark, "note")
    distributions_section(page, fidelity)
    page.heading("Asked against measured on the image")
    for scatter in scatters:
        asked, shown = np.array(scatter.asked), np.array(scatter.measured)
        known = np.isfinite(asked) & np.isfinite(shown)
        if known.any():
            figure = figures.agreement(asked[known], shown[known], scatter.title, scatter.unit or "category")
            page.figure(figure, f"{scatter.title}: asked against measured")
    galleries_section(page, fidelity, dataset)
    if trajectories is not None:
        trajectories_section(page, *trajectories)
    usefulness_section(page, usefulness)
    page.heading("What was measured, and with what")
    page.table(["", ""], list(facts.items()))
    table = measured.merge(measured_values(scatters), how="left", on="sample_id")
    store.write(MEASURED_KEY, table.to_csv(sep="\t", index=False, na_rep="n/a").encode())
    numbers = {
        "facts": facts,
        "findings": [{**to_dict(f), "as_real": f.as_real} for f in findings],
        "remarks": fidelity.remarks,
        "trajectories": [to_dict(line) for line in trajectories[0]] if trajectories else [],
        "usefulness": [to_dict(task) for task in usefulness],
    }
    store.write(NUMBERS_KEY, (json.dumps(numbers, indent=1) + "\n").encode())
    store.write(REPORT_KEY, page.render().encode())


def _row(finding: Finding) -> list[object]:
    unit = f" {finding.unit}" if finding.unit else ""
    return [
        finding.metric,
        f"{finding.value:.3g}{unit}",
        f"[{finding.low:.3g}, {finding.high:.3g}]",
        finding.n,
        f"{finding.real:.3g}{unit}",
        f"[{finding.real_low:.3g}, {finding.real_high:.3g}]",
        finding.real_n,
        "as real" if finding.as_real else "DIFFERS",
    ]
