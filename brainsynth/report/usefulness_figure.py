"""The figure of the usefulness test: one metric of every training set, with both of its intervals."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure


def arms(
    names: Sequence[str],
    means: Sequence[float],
    people: Sequence[tuple[float, float]],
    seeds: Sequence[Sequence[float]],
    chance: float,
    label: str,
) -> Figure:
    """A line per training set: mean and interval over test people, every seed as a ring, chance as a dashed line."""
    figure = Figure(figsize=(5.6, 0.5 * len(names) + 0.9), layout="constrained")
    axis = figure.subplots()
    places = range(len(names))
    for place, mean, (low, high), each in zip(places, means, people, seeds, strict=True):
        axis.plot([low, high], [place, place], color="#2b6cb0", lw=2)
        axis.plot([mean], [place], "o", color="#2b6cb0")
        axis.plot(each, [place] * len(each), "o", mfc="none", mec="#dd6b20", ms=5)
    axis.axvline(chance, color="grey", lw=1, ls="--")
    axis.set_yticks(list(places), list(names), fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(label, fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    return figure
