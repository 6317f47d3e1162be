"""OME-Zarr 0.5: one image, a folder, a volume.

0.5 itself has no orientation: axes carry that of RFC-4, which readers of 0.5 ignore; the RAS+ affine of (x, y, z) and the
facts of the volume are in `attributes.brainsynth`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec

from brainsynth.export.file_format import ExportedVolume, FileFormat
from brainsynth.labels import DSEG

_CHUNK = 64
_TOWARDS = {"x": "left-to-right", "y": "posterior-to-anterior", "z": "inferior-to-superior"}
"""RFC-4's names of the directions of RAS+."""


def _write(path: Path, volumes: Iterable[ExportedVolume]) -> None:
    """One level, float32, axes z, y, x in mm, with scale and translation; the label map in the group `labels`."""
    (volume,) = volumes
    group = write_image(path, volume.image, volume, "T1w")
    if volume.labels is None or volume.label_table is None:
        return
    labels = group.create_group("labels")
    labels.attrs["ome"] = {"version": "0.5", "labels": [DSEG]}
    segmented, table = labels.create_group(DSEG), volume.label_table.labels
    segmented.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [_level(segmented, volume.labels, volume, DSEG)],
        "image-label": {
            "colors": [{"label-value": one.index, "rgba": [*one.rgb, 255]} for one in table],
            "properties": [{"label-value": one.index, "name": one.name} for one in table],
            "source": {"image": "../../"},
        },
    }


def write_image(path: Path, values: npt.NDArray[Any], volume: ExportedVolume, suffix: str) -> zarr.Group:
    """An image of one level; the group that it is, for what else a format puts into it."""
    group = zarr.open_group(str(path), mode="w", zarr_format=3)
    group.attrs["ome"] = {"version": "0.5", "multiscales": [_level(group, values, volume, suffix)]}
    group.attrs["brainsynth"] = {"affine": volume.grid.affine.tolist(), "axes": "RAS+", **volume.facts}
    return group


def _level(group: zarr.Group, values: npt.NDArray[Any], volume: ExportedVolume, suffix: str) -> dict[str, Any]:
    """Store (X, Y, Z) values as the only level of an image; its entry in `multiscales`."""
    turned = np.ascontiguousarray(values.transpose(2, 1, 0))
    chunks = tuple(min(_CHUNK, size) for size in turned.shape)
    array = group.create_array(
        "0",
        shape=turned.shape,
        chunks=chunks,
        shards=tuple(-(-size // chunk) * chunk for size, chunk in zip(turned.shape, chunks, strict=True)),
        dtype=turned.dtype.name,
        compressors=BloscCodec(typesize=turned.dtype.itemsize, cname="zstd", clevel=3, shuffle="shuffle"),
        dimension_names=("z", "y", "x"),
    )
    array[:] = turned
    axes = [
        {
            "name": name,
            "type": "space",
            "unit": "millimeter",
            "orientation": {"type": "anatomical", "value": _TOWARDS[name]},
        }
        for name in "zyx"
    ]
    placed = [
        {"type": "scale", "scale": [float(value) for value in volume.grid.spacing_mm[::-1]]},
        {"type": "translation", "translation": [float(value) for value in volume.grid.origin_mm[::-1]]},
    ]
    level = {"path": "0", "coordinateTransformations": placed}
    return {"name": f"sub-{volume.sample_id}_{suffix}", "axes": axes, "datasets": [level]}


FORMAT = FileFormat(
    path="sub-{id}_T1w.ome.zarr",
    about="`sub-<id>_T1w.ome.zarr`: OME-Zarr 0.5, axes z, y, x with the orientation of RFC-4; the affine of (x, y, z) in "
    "`attributes.brainsynth`",
    write=_write,
)
