"""OME-Zarr 0.5: one image, a folder, a volume.

0.5 has no orientation: the RAS+ affine of (x, y, z) and the facts of the volume are in `attributes.brainsynth`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec

from brainsynth.export.file_format import ExportedVolume, FileFormat

_CHUNK = 64


def _write(path: Path, volumes: Iterable[ExportedVolume]) -> None:
    """One level, float32, axes z, y, x in mm, with scale and translation."""
    (volume,) = volumes
    group = zarr.open_group(str(path), mode="w", zarr_format=3)
    turned = np.ascontiguousarray(volume.image.transpose(2, 1, 0))
    chunks = tuple(min(_CHUNK, size) for size in turned.shape)
    array = group.create_array(
        "0",
        shape=turned.shape,
        chunks=chunks,
        shards=tuple(-(-size // chunk) * chunk for size, chunk in zip(turned.shape, chunks, strict=True)),
        dtype="float32",
        compressors=BloscCodec(typesize=4, cname="zstd", clevel=3, shuffle="shuffle"),
        dimension_names=("z", "y", "x"),
    )
    array[:] = turned
    axes = [{"name": name, "type": "space", "unit": "millimeter"} for name in "zyx"]
    placed = [
        {"type": "scale", "scale": [float(value) for value in volume.grid.spacing_mm[::-1]]},
        {"type": "translation", "translation": [float(value) for value in volume.grid.origin_mm[::-1]]},
    ]
    level = {"path": "0", "coordinateTransformations": placed}
    image: dict[str, Any] = {"name": f"sub-{volume.sample_id}_T1w", "axes": axes, "datasets": [level]}
    group.attrs["ome"] = {"version": "0.5", "multiscales": [image]}
    group.attrs["brainsynth"] = {"affine": volume.grid.affine.tolist(), "axes": "RAS+", **volume.facts}


FORMAT = FileFormat(
    path="sub-{id}_T1w.ome.zarr",
    about="`sub-<id>_T1w.ome.zarr`: OME-Zarr 0.5, axes z, y, x; the affine of (x, y, z) in `attributes.brainsynth`",
    write=_write,
)
