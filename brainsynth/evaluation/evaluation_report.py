"""The page of an evaluation: the verdict table first, then scatter plots, distributions and slices."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd

from brainsynth.evaluation.adherence import Scatter
from brainsynth.evaluation.finding import Finding
from brainsynth.records import to_dict
from brainsynth.report import figures
from brainsynth.report.html import Page
from brainsynth.storage.filesystem import Store
from brainsynth.storage.reader import SyntheticDataset

GALLERY = 12
REPORT_KEY, NUMBERS_KEY, MEASURED_KEY = "report.html", "report.json", "measured.tsv"


def write_report(
    store: Store,
    findings: list[Finding],
    scatters: list[Scatter],
    dataset: SyntheticDataset,
    facts: dict[str, Any],
    measured: pd.DataFrame,
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
        ["metric", "value", "95 % CI", "n", "real scans", "95 % CI", "n", "verdict"], [_row(f) for f in findings]
    )
    page.heading("Asked against measured on the image")
    for scatter in scatters:
        asked, found = np.array(scatter.asked), np.array(scatter.measured)
        known = np.isfinite(asked) & np.isfinite(found)
        if known.any():
            figure = figures.agreement(asked[known], found[known], scatter.covariate, scatter.unit or "category")
            page.figure(figure, f"{scatter.covariate}: asked against measured")
    page.heading("Slices")
    page.text("Evenly spaced through the dataset, nothing picked: sagittal, coronal and axial.", "note")
    chosen = np.unique(np.linspace(0, len(dataset) - 1, GALLERY).astype(int))
    ids = dataset.sample_ids
    page.figure(figures.gallery([dataset.volume(int(i)) for i in chosen], [ids[i] for i in chosen]), "slices")
    page.heading("What was measured, and with what")
    page.table(["", ""], list(facts.items()))
    lines = [{**to_dict(f), "as_real": f.as_real} for f in findings]
    store.write(MEASURED_KEY, _measured(measured, scatters).to_csv(sep="\t", index=False, na_rep="n/a").encode())
    store.write(NUMBERS_KEY, (json.dumps({"facts": facts, "findings": lines}, indent=1) + "\n").encode())
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


def _measured(measured: pd.DataFrame, scatters: list[Scatter]) -> pd.DataFrame:
    table = measured.copy()
    for scatter in scatters:
        column = dict(zip(scatter.sample_ids, scatter.measured, strict=True))
        table[f"measured_{scatter.covariate}"] = [column[i] for i in table["sample_id"]]
    return table
