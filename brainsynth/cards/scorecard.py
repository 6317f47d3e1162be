"""The scorecard of synthetic medical data (FDA, Zamzmi et al. 2025): seven criteria, each filled from what was measured.

A criterion that nothing was measured for says so; no figure is asked of the user.
"""

from __future__ import annotations

from brainsynth.cards.facts import Facts
from brainsynth.metrics.finding import Finding

PAPER = "https://doi.org/10.1038/s44172-025-00450-1"
_DIVERSITY = ("recall", "coverage", "MS-SSIM", "4-G-R-SSIM")
_NOT_MEASURED = ("not measured: give the output of `brainsynth evaluate` as `evaluation`",)


def scorecard(facts: Facts) -> str:
    """A section of the dataset card."""
    lines = "".join(f"| {name} | {'<br>'.join(cells)} |\n" for name, cells in _criteria(facts).items())
    return (
        f"## Scorecard\n\nThe seven criteria of the [scorecard of synthetic medical data]({PAPER}). A figure of this "
        "dataset is followed by the same figure of real scans.\n\n| criterion | what was measured |\n| --- | --- |\n"
        + lines
    )


def _criteria(facts: Facts) -> dict[str, tuple[str, ...]]:
    manifest, plan, audit = facts.manifest, facts.plan, facts.audit
    names = tuple(f"{name}:" for name in plan.covariates.names)
    within = [
        f
        for f in facts.findings
        if f.metric.endswith(")") and any(f" ({name} " in f.metric for name in plan.covariates.names)
    ]
    whole = [f for f in facts.findings if f not in within]
    spread = [f for f in whole if f.metric.startswith(_DIVERSITY) or f.metric.endswith("SD measured over SD asked")]
    asked = [f for f in whole if f.metric.startswith(names) and f not in spread]
    like = [f for f in whole if f not in spread and f not in asked]
    gate = "a quality gate refused volumes" if "gate" in plan.identity else "no quality gate"
    ranges = [
        f"{c.name} {c.low:g} to {c.high:g} {c.unit}".strip()
        for c in plan.covariates.covariates
        if c.kind == "continuous"
    ]
    return {
        "Congruence": _measured(like),
        "Coverage": (
            *_measured(spread),
            f"asked: {', '.join(ranges) or 'categories alone'}; {facts.extrapolated} rows outside the training support",
        ),
        "Constraint": (*_measured(asked), f"{manifest.num_rejected} of {manifest.num_samples} rows rejected; {gate}"),
        "Completeness": (
            f"{manifest.num_ok} of {manifest.num_samples} planned volumes, {manifest.num_failed} failed; every row, also "
            "without a volume, is in the manifest",
        ),
        "Compliance": (
            f"memorisation audit {audit.verdict}: {audit.outright_copies} outright copies of {audit.training_people} people "
            f"in {audit.volumes} volumes; licence {facts.config.licence}; every file is marked as AI-generated",
        ),
        "Comprehension": ("model card, seeds and sampler of every row, Croissant, RO-Crate; limits of use above",),
        "Consistency": (
            *(_measured(within) if within else ("within subgroups: not measured (`by` of `brainsynth evaluate`)",)),
            f"read back and compared: {facts.verified}",
        ),
    }


def _measured(findings: list[Finding]) -> tuple[str, ...]:
    return tuple(_line(finding) for finding in findings) or _NOT_MEASURED


def _line(f: Finding) -> str:
    unit = f" {f.unit}" if f.unit else ""
    metric = f.metric.replace("|", "\\|")
    return (
        f"{metric}: {f.value:.3g}{unit} [{f.low:.3g}, {f.high:.3g}], n = {f.n}; real {f.real:.3g} "
        f"[{f.real_low:.3g}, {f.real_high:.3g}], n = {f.real_n}{'' if f.as_real else '; DIFFERS'}"
    )
