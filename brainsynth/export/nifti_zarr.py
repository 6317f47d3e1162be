"""NIfTI-Zarr 1.0: an OME-Zarr image, and the NIfTI header in its array `nifti`, which holds where the two differ."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from brainsynth.export.file_format import ExportedVolume, FileFormat
from brainsynth.export.nifti import HEADER_BYTES, nifti_bytes
from brainsynth.export.ome_zarr import write_image


def _write(path: Path, volumes: Iterable[ExportedVolume]) -> None:
    (volume,) = volumes
    _write_array(path, volume.image, volume, "T1w")


def _write_labels(path: Path, volumes: Iterable[ExportedVolume]) -> None:
    (volume,) = volumes
    assert volume.labels is not None
    _write_array(path, volume.labels, volume, "dseg")


def _write_array(path: Path, values: npt.NDArray[Any], volume: ExportedVolume, suffix: str) -> None:
    group = write_image(path, values, volume, suffix)
    header = nifti_bytes(values, volume.grid, volume.whose)[:HEADER_BYTES]
    stored = group.create_array(
        "nifti", shape=(HEADER_BYTES,), chunks=(HEADER_BYTES,), dtype="uint8", compressors=None, fill_value=0
    )
    stored[:] = np.frombuffer(header, np.uint8)


FORMAT = FileFormat(
    path="sub-{id}_T1w.nii.zarr",
    about="`sub-<id>_T1w.nii.zarr`: NIfTI-Zarr 1.0, an OME-Zarr 0.5 image with the NIfTI header in its array `nifti`",
    write=_write,
    label_path="sub-{id}_dseg.nii.zarr",
    write_labels=_write_labels,
)
