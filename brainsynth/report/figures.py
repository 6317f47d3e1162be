"""Figures as data URIs, so that a page carries them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from brainsynth.report.montage import Volume, overlay_strip, strip

_BLUE, _ORANGE = "#2b6cb0", "#dd6b20"
_DATASET, _COHORT = "this dataset", "training cohort"


def data_uri(figure: Figure) -> str:
    """PNG of a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def gallery(volumes: Sequence[Volume], captions: Sequence[str], columns: int = 4) -> Figure:
    """Sagittal, coronal and axial slices of each volume, with its covariates."""
    rows = -(-len(volumes) // columns)
    figure = Figure(figsize=(4.2 * columns, (1.75 if not any("\n" in c for c in captions) else 2.1) * rows))
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, volume, caption in zip(axes, volumes, captions, strict=False):
        axis.imshow(strip(volume), cmap="gray", vmin=0, vmax=255, interpolation="bilinear")
        axis.set_title(caption, fontsize=8)
    return figure


def label_maps(
    volumes: Sequence[Volume],
    maps: Sequence[npt.NDArray[np.uint8]],
    captions: Sequence[str],
    colors: dict[int, tuple[str, tuple[int, int, int]]],
    columns: int = 4,
) -> Figure:
    """As `gallery`, with the label maps over the volumes. `colors`: label → name and color."""
    lookup = np.zeros((256, 3), np.uint8)
    for index, (_, rgb) in colors.items():
        lookup[index] = rgb
    rows = -(-len(volumes) // columns)
    figure = Figure(figsize=(4.2 * columns, 1.75 * rows + 0.25 * -(-len(colors) // 6)))
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, volume, labels, caption in zip(axes, volumes, maps, captions, strict=False):
        axis.imshow(overlay_strip(volume, labels, lookup), interpolation="nearest")
        axis.set_title(caption, fontsize=8)
    patches = [Patch(color="#{:02x}{:02x}{:02x}".format(*rgb), label=name) for name, rgb in colors.values()]
    figure.legend(handles=patches, loc="lower center", ncols=6, fontsize=7, frameon=False, bbox_to_anchor=(0.5, -0.05))
    return figure


def covariate_histograms(rows: pd.DataFrame, reference: pd.DataFrame | None, units: dict[str, str]) -> Figure:
    """Each covariate of the dataset, over that of the training cohort, where its distribution is known."""
    names = list(units)
    figure = Figure(figsize=(3.4 * len(names), 2.6))
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        if pd.api.types.is_numeric_dtype(rows[name]):
            both = pd.concat([rows[name], reference[name]]) if reference is not None else rows[name]
            bins = np.histogram_bin_edges(both.dropna(), bins=20)
            if reference is not None and reference[name].notna().any():
                axis.hist(reference[name].dropna(), bins, density=True, color=_ORANGE, alpha=0.5, label=_COHORT)
            if rows[name].notna().any():
                axis.hist(rows[name].dropna(), bins, density=True, histtype="step", color=_BLUE, lw=1.5, label=_DATASET)
        else:
            levels = sorted(set(rows[name].dropna()))
            place = np.arange(len(levels))
            if reference is not None:
                axis.bar(
                    place, [(reference[name] == v).mean() for v in levels], 0.8, color=_ORANGE, alpha=0.5, label=_COHORT
                )
            axis.bar(
                place,
                [(rows[name] == v).mean() for v in levels],
                0.8,
                fill=False,
                edgecolor=_BLUE,
                lw=1.5,
                label=_DATASET,
            )
            axis.set_xticks(place, levels)
        axis.set_title(f"{name} [{units[name]}]" if units[name] else name, fontsize=9)
        axis.set_yticks([])
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, frameon=False)
    return figure


def agreement(asked: npt.NDArray[Any], measured: npt.NDArray[Any], title: str, unit: str) -> Figure:
    """Measured against asked, with the line of identity."""
    figure = Figure(figsize=(4.2, 4.0))
    agreement_panel(figure.subplots(), asked, measured, title, unit)
    return figure


def agreement_panel(axis: Any, asked: npt.NDArray[Any], measured: npt.NDArray[Any], title: str, unit: str) -> None:
    """The same, in an axis of a larger figure."""
    axis.scatter(asked, measured, s=14, color=_BLUE, alpha=0.7)
    ends = [min(asked.min(), measured.min()), max(asked.max(), measured.max())]
    axis.plot(ends, ends, color="grey", lw=1)
    axis.set_xlabel(f"asked [{unit}]")
    axis.set_ylabel(f"measured on the image [{unit}]")
    axis.set_title(title, fontsize=9)
