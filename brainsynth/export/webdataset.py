"""WebDataset: tar files of several subjects, for each `<id>.t1w.npy`, `<id>.json` and, with labels, `<id>.dseg.npy`."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from brainsynth.export.file_format import ExportedVolume, FileFormat


def _write(path: Path, volumes: Iterable[ExportedVolume]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for volume in volumes:
            facts = {"affine": volume.grid.affine.tolist(), **volume.facts}
            image = volume.stored if volume.stored.dtype.kind == "f" else volume.image
            members = {"t1w.npy": _npy(image), "json": json.dumps(facts, sort_keys=True).encode()}
            if volume.labels is not None:
                members["dseg.npy"] = _npy(volume.labels)
            for name, data in members.items():
                member = tarfile.TarInfo(f"{volume.sample_id}.{name}")
                member.size, member.mode = len(data), 0o644
                tar.addfile(member, io.BytesIO(data))


def _npy(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


FORMAT = FileFormat(
    path="shard-{unit:06d}.tar",
    about="`shard-NNNNNN.tar`: WebDataset, `<id>.t1w.npy` (X, Y, Z) and `<id>.json` (covariates, affine)",
    write=_write,
    subjects_per_file=32,
)
