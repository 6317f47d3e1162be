"""The quality gate's part of a generation report: how much was drawn again and why, and the worst volumes it let pass."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd

from brainsynth.gate.gate import CHECKS
from brainsynth.metrics.agreement import agreement
from brainsynth.plan import Plan
from brainsynth.reading.dataset import SyntheticDataset
from brainsynth.report import figures
from brainsynth.report.html import Page

WORST, LEAST_PAIRS = 12, 8


def gate_section(page: Page, plan: Plan, dataset: SyntheticDataset, subjects: pd.DataFrame) -> dict[str, Any]:
    """Write the section; returns its figures for report.json."""
    judged = subjects[subjects["gate_attempts"].notna()]
    kept = judged[judged["status"] == "ok"]
    refused = Counter(check for text in judged["gate_refused"] for check in str(text).split())
    attempts = int(judged["gate_attempts"].sum())
    counts: dict[str, Any] = {
        "attempts": attempts,
        "refused": sum(refused.values()),
        "rows_kept_at_first": int((kept["gate_attempts"] == 1).sum()),
        "rows_redrawn": int((kept["gate_attempts"] > 1).sum()),
        "rows_set_aside": int(judged["reason"].str.startswith("quality gate").sum()),
        "refused_by": dict(refused.most_common()),
    }
    rules = plan.identity["gate"]
    page.heading("Quality gate")
    rows = [
        ["volumes judged, refused", f"{attempts}, {counts['refused']} ({counts['refused'] / max(1, attempts):.1%})"],
        ["rows kept at the first attempt", counts["rows_kept_at_first"]],
        [f"rows redrawn (at most {rules['max_attempts']} attempts)", counts["rows_redrawn"]],
        ["rows set aside", counts["rows_set_aside"]],
        ["checks that refuse nothing here", ", ".join(rules["exempt"]) or "none"],
    ]
    page.table(["", ""], rows)
    if refused:
        words = [[CHECKS.get(check, check), count] for check, count in refused.most_common()]
        page.table(["refused for", "volumes"], words)
    counts["measured"] = _measured(page, plan, kept)
    worst = kept.sort_values("gate_score", ascending=False).head(WORST)
    if len(worst):
        page.text(
            "The volumes closest to the gate's limit (score 1) that were kept, with the check they come closest by:"
        )
        places = {int(row): place for place, row in enumerate(dataset.rows)}
        captions = [
            f"{score:.2f} {check}" for score, check in zip(worst["gate_score"], worst["gate_check"], strict=True)
        ]
        page.figure(
            figures.gallery([dataset.volume(places[int(row)]) for row in worst["row"]], captions),
            "the kept volumes with the highest scores",
        )
    page.text(
        "Refusing volumes changes the distribution of those that are kept; with a high share of refused volumes look "
        "at what was refused before using the rest.",
        "note",
    )
    return counts


def _measured(page: Page, plan: Plan, kept: pd.DataFrame) -> dict[str, Any]:
    """Asked against measured, for each covariate that the gate measures."""
    agreements: dict[str, Any] = {}
    units = {c.name: c.unit for c in plan.covariates.covariates}
    rules = plan.identity["gate"]
    lines: list[list[object]] = []
    for name in rules["measures"]:
        asked = kept[name].to_numpy(dtype=np.float64)
        measured = kept[f"measured_{name}"].to_numpy(dtype=np.float64)
        known = np.isfinite(asked) & np.isfinite(measured)
        if known.sum() < LEAST_PAIRS or min(np.ptp(asked[known]), np.ptp(measured[known])) == 0:
            continue
        one = agreement(measured[known], asked[known], groups=np.arange(known.sum()))
        tolerance = rules["tolerance"].get(name)
        agreements[name] = {"n": one.n, "r": one.r, "mae": one.mae, "tolerance": tolerance}
        held = "not held" if tolerance is None else f"{tolerance:.4g}"
        interval = f"{one.r:.3f} [{one.r_low:.3f}, {one.r_high:.3f}]"
        lines.append([f"{name} [{units[name]}]", one.n, interval, f"{one.mae:.3g}", held])
    if lines:
        page.table(["measured on the kept volumes against asked", "n", "r", "MAE", "tolerance"], lines)
    return agreements
