"""What a notebook shows of a dataset or of one sample: slices in three planes, and the covariates."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from brainsynth.reading.volumes import Volumes
from brainsynth.report.montage import strip

_SHOWN = 4
_HEIGHT = 240  # pixels of a strip of slices: at least two a voxel at 2 mm


def picture(volume: npt.NDArray[np.float32]) -> str:
    """An <img> of sagittal, coronal and axial slices of (X, Y, Z) intensities in [0, 1]."""
    slices = strip(volume)
    buffer = io.BytesIO()
    Image.fromarray(
        slices.repeat(max(1, -(-_HEIGHT // slices.shape[0])), 0).repeat(max(1, -(-_HEIGHT // slices.shape[0])), 1)
    ).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="sagittal, coronal and axial slice" src="data:image/png;base64,{data}">'


def covariates(values: Mapping[str, Any], units: Mapping[str, str]) -> str:
    """`age 70 years, sex F`; a missing value is `n/a`."""
    words = []
    for name, unit in units.items():
        value = values.get(name, "")
        missing = value == "" or value != value
        shown = "n/a" if missing else f"{value:.4g} {unit}".rstrip() if isinstance(value, float) else str(value)
        words.append(f"{name} {shown}")
    return html.escape(", ".join(words))


def sample_html(
    volume: npt.NDArray[np.float32], values: Mapping[str, Any], units: Mapping[str, str], title: str
) -> str:
    """One volume with its covariates."""
    return (
        f"<figure>{picture(volume)}<figcaption>{html.escape(title)}: {covariates(values, units)}</figcaption></figure>"
    )


def dataset_html(dataset: Volumes) -> str:
    """A dataset: what it is, and its first volumes."""
    kind, count = dataset.manifest["kind"], len(dataset)
    head = f"<p><b>{html.escape(dataset.uri)}</b>: {count} {html.escape(str(kind))} volumes</p>"
    if dataset.array_name != "t1w":
        return head
    ids: Sequence[str] = dataset.sample_ids
    shown = (sample_html(dataset.volume(i), dataset.facts(i), dataset.units, ids[i]) for i in range(min(_SHOWN, count)))
    return head + "".join(shown)
