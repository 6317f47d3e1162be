"""Figures of the memorisation audit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from brainsynth.report.figures import gallery
from brainsynth.report.montage import Volume

Numbers = npt.NDArray[np.floating[Any]]
_BLUE, _ORANGE = "#2b6cb0", "#dd6b20"
_LOWEST = -12.0
"""Exact copies reach minus hundreds of standard deviations; whatever is lower is drawn here."""


def closeness_histogram(null: Numbers, dataset: Numbers, threshold: float) -> Figure:
    """The statistic of people who are not copies (null) and of the dataset's volumes; flagged left of the line."""
    figure = Figure(figsize=(7.0, 3.0))
    axis = figure.subplots()
    shown = [np.maximum(values, _LOWEST) for values in (null, dataset)]
    bins = np.histogram_bin_edges(np.concatenate([*shown, [_LOWEST]]), bins=50).tolist()
    axis.hist(
        shown[0], bins, density=True, color=_ORANGE, alpha=0.5, label=f"people who are not copies, n = {len(null)}"
    )
    label = f"volumes of the dataset, n = {len(dataset)}"
    axis.hist(shown[1], bins, density=True, histtype="step", color=_BLUE, lw=1.5, label=label)
    axis.axvline(threshold, color="grey", lw=1, ls="--")
    axis.set_xlabel(f"statistic [robust SD of the null]; low is a copy; below {_LOWEST:g} drawn at {_LOWEST:g}")
    axis.set_yticks([])
    axis.legend(fontsize=8, frameon=False, loc="upper left")
    return figure


def membership_curve(members: Numbers, non_members: Numbers, title: str) -> Figure:
    """ROC of telling training people from held-out ones by how near the dataset comes to them; low scores are near."""
    cuts = np.concatenate([[-np.inf], np.sort(np.concatenate([members, non_members]))])
    rates = [(values[None] <= cuts[:, None]).mean(axis=1) for values in (non_members, members)]
    figure = Figure(figsize=(3.6, 3.4))
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="grey", lw=1)
    axis.step(rates[0], rates[1], where="post", color=_BLUE, lw=1.5)
    axis.set_xlabel("held-out people taken for members")
    axis.set_ylabel("members found")
    axis.set_title(title, fontsize=9)
    return figure


def pairs(volumes: Sequence[tuple[Volume, Volume]], captions: Sequence[tuple[str, str]]) -> Figure:
    """Each volume next to the training scan that it may copy, both in the audit's pose: three slices of either."""
    return gallery([v for pair in volumes for v in pair], [c for pair in captions for c in pair], columns=2)
