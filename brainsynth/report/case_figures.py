"""Figures of a case: the series as a grid, what changes against one point, and the series as a moving picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from brainsynth.report.montage import Volume, strip, value_strip

_NOBODY = "of no real person"
_DPI, _FRAME_MS, _ORANGE = 110, 500, "#c05621"
Series = Sequence[Volume | None]
"""Volumes in order; None where one could not be made."""


def grid(volumes: Series, captions: Sequence[str], marked: Sequence[bool], columns: int, whose: str = _NOBODY) -> bytes:
    """PNG: sagittal, coronal and axial slices of each volume; captions of `marked` ones say that they are extrapolated."""
    figure, axes = _panels(len(volumes), columns, whose)
    for axis, volume, caption, mark in zip(axes, volumes, captions, marked, strict=False):
        _panel(axis, volume, caption, mark)
    return _png(figure, whose)


def differences(
    volumes: Series,
    captions: Sequence[str],
    marked: Sequence[bool],
    columns: int,
    reference: int,
    whose: str = _NOBODY,
) -> bytes:
    """PNG: each volume minus the `reference`-th, all on one scale of intensities, symmetric about 0."""
    changes = change(volumes, reference)
    slices = [None if c is None else value_strip(c) for c in changes]
    known = np.concatenate([np.abs(s).ravel() for s in slices if s is not None] or [np.zeros(1)])
    limit = max(float(np.quantile(known[known > 0], 0.999)) if (known > 0).any() else 0.0, 1e-3)
    figure, axes = _panels(len(volumes), columns, whose)
    for number, (axis, part, caption, mark) in enumerate(zip(axes, slices, captions, marked, strict=False)):
        _title(axis, f"{caption} (reference)" if number == reference else caption, mark)
        if part is None:
            _blank(axis)
        else:
            shown = axis.imshow(part, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    if any(part is not None for part in slices):
        bar = figure.colorbar(shown, ax=list(axes), shrink=0.6, aspect=30)
        bar.set_label("intensity minus the reference's", fontsize=8)
    return _png(figure, whose)


def change(volumes: Series, reference: int) -> list[Volume | None]:
    """Each volume minus the `reference`-th; None where either is None."""
    base = volumes[reference]
    return [None if v is None or base is None else v - base for v in volumes]


def animation(
    frames: Sequence[Series],
    captions: Sequence[Sequence[str]],
    marked: Sequence[Sequence[bool]],
    whose: str = _NOBODY,
) -> bytes:
    """GIF: one frame a list of volumes side by side, forth and back without end."""
    pictures = []
    for volumes, titles, marks in zip(frames, captions, marked, strict=True):
        figure, axes = _panels(len(volumes), min(4, len(volumes)), whose)
        for axis, volume, title, mark in zip(axes, volumes, titles, marks, strict=False):
            _panel(axis, volume, title, mark)
        canvas = FigureCanvasAgg(figure)
        figure.set_dpi(_DPI)
        canvas.draw()  # type: ignore[no-untyped-call]
        pixels = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
        pictures.append(Image.fromarray(pixels[..., :3].copy()).quantize(256))
    around = [*pictures, *pictures[-2:0:-1]]
    buffer = io.BytesIO()
    around[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=around[1:],
        duration=_FRAME_MS,
        loop=0,
        comment=_mark(whose).encode(),
    )
    return buffer.getvalue()


def _mark(whose: str) -> str:
    return f"AI-generated images {whose}; not for diagnosis"


def _panels(count: int, columns: int, whose: str) -> tuple[Figure, Sequence[Axes]]:
    rows = -(-count // columns)
    figure = Figure(figsize=(3.6 * columns, 1.7 * rows + 0.4), layout="constrained")
    axes: list[Axes] = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axis in axes:
        axis.axis("off")
    figure.suptitle(_mark(whose), fontsize=7, color="#4a5568")
    return figure, axes


def _panel(axis: Axes, volume: Volume | None, caption: str, mark: bool) -> None:
    _title(axis, caption, mark)
    if volume is None:
        _blank(axis)
    else:
        axis.imshow(strip(volume), cmap="gray", vmin=0, vmax=255, interpolation="nearest")


def _title(axis: Axes, caption: str, mark: bool) -> None:
    axis.set_title(f"{caption}\nextrapolated" if mark else caption, fontsize=8, color=_ORANGE if mark else "black")


def _blank(axis: Axes) -> None:
    axis.text(0.5, 0.5, "not made", ha="center", va="center", fontsize=8, transform=axis.transAxes)


def _png(figure: Figure, whose: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Description": _mark(whose), "Software": "brainsynth"})
    return buffer.getvalue()
