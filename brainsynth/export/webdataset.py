"""WebDataset: tar files of several subjects, for each `<id>.t1w.npy` and `<id>.json`."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from brainsynth.export.file_format import ExportedVolume, FileFormat


def _write(path: Path, volumes: Iterable[ExportedVolume]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for volume in volumes:
            buffer = io.BytesIO()
            np.save(buffer, volume.stored if volume.stored.dtype.kind == "f" else volume.image, allow_pickle=False)
            facts = {"affine": volume.grid.affine.tolist(), **volume.facts}
            for name, data in (
                (f"{volume.sample_id}.t1w.npy", buffer.getvalue()),
                (f"{volume.sample_id}.json", json.dumps(facts, sort_keys=True).encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(data), 0o644
                tar.addfile(member, io.BytesIO(data))


FORMAT = FileFormat(
    path="shard-{unit:06d}.tar",
    about="`shard-NNNNNN.tar`: WebDataset, `<id>.t1w.npy` (X, Y, Z) and `<id>.json` (covariates, affine)",
    write=_write,
    subjects_per_file=32,
)
