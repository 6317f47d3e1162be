"""Figures of an evaluation: distributions over those of real scans, and trajectories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from brainsynth.report.montage import Volume, orthogonal_slices

Numbers = npt.NDArray[np.floating[Any]]
_COLOURS = {"training scans": "#dd6b20", "validation scans": "#a0aec0", "generated": "#2b6cb0"}
_COLUMNS = 3


def intensities(shares: Mapping[str, Numbers]) -> Figure:
    """Share of voxels per bin over [0, 1], one curve a set; the background's bin is left out, it dwarfs the rest."""
    figure = Figure(figsize=(7.0, 3.0))
    axis = figure.subplots()
    for name, values in shares.items():
        middles = (np.arange(len(values)) + 0.5) / len(values)
        axis.plot(middles[1:], values[1:], lw=1.4, color=_COLOURS[name], label=name)
    axis.set_xlabel("intensity")
    axis.set_ylabel("share of voxels per bin")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8, frameon=False)
    return figure


def histograms(values: Mapping[str, Mapping[str, Numbers]], unit: str) -> Figure:
    """Quantity → set → its values: one small histogram a quantity, sets over each other, each of area 1."""
    rows = -(-len(values) // _COLUMNS)
    figure = Figure(figsize=(3.6 * _COLUMNS, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for axis in axes[len(values) :]:
        axis.axis("off")
    for axis, (quantity, sets) in zip(axes, values.items(), strict=False):
        known = {name: v[np.isfinite(v)] for name, v in sets.items()}
        bins = np.histogram_bin_edges(np.concatenate(list(known.values())), bins=20)
        for name, v in known.items():
            filled = name == "training scans"
            style: dict[str, Any] = {"alpha": 0.4} if filled else {"histtype": "step", "lw": 1.5}
            axis.hist(v, bins, density=True, color=_COLOURS[name], label=f"{name} ({len(v)})", **style)
        axis.set_title(f"{quantity} [{unit}]" if unit else quantity, fontsize=9)
        axis.set_yticks([])
        axis.tick_params(labelsize=8)
    axes[0].legend(fontsize=7, frameon=False)
    return figure


def trajectory(volumes: Sequence[Sequence[Volume]], asked: Sequence[float], covariate: str, unit: str) -> Figure:
    """Axial slices: one noise a row, one asked value a column."""
    rows, columns = len(volumes), len(asked)
    figure = Figure(figsize=(1.7 * columns, 1.95 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for line, row in zip(axes, volumes, strict=True):
        for axis, volume in zip(line, row, strict=True):
            axis.imshow(orthogonal_slices(volume)[2], cmap="gray", vmin=0, vmax=255, interpolation="bilinear")
            axis.axis("off")
    for axis, value in zip(axes[0], asked, strict=True):
        axis.set_title(f"{value:.3g} {unit}", fontsize=8)
    figure.suptitle(f"{covariate}, asked", fontsize=9)
    return figure


def trajectory_lines(asked: Sequence[float], measured: Sequence[Sequence[float]], covariate: str, unit: str) -> Figure:
    """Measured against asked, one line a noise, over the line of identity."""
    figure = Figure(figsize=(4.2, 3.4))
    axis = figure.subplots()
    axis.plot([asked[0], asked[-1]], [asked[0], asked[-1]], color="grey", lw=1, label="as asked")
    for number, line in enumerate(measured):
        axis.plot(asked, line, marker="o", ms=4, lw=1.2, label=f"noise {number + 1}")
    axis.set_xlabel(f"{covariate}, asked [{unit}]")
    axis.set_ylabel(f"measured on the image [{unit}]")
    axis.legend(fontsize=7, frameon=False)
    return figure
