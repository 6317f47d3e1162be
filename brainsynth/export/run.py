"""Write the volumes of an export, unit by unit in any order and process, then what stands beside them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from brainsynth.errors import UserError
from brainsynth.export.formats import tar_ids, write_nifti, write_ome_zarr, write_tar
from brainsynth.export.plan import EXPORT_KEY, ExportPlan, ExportRecord, Subject
from brainsynth.export.tables import about, tables
from brainsynth.manifest import stored_sha256
from brainsynth.reading.stored_array import StoredArray
from brainsynth.records import seal
from brainsynth.storage.filesystem import sweep

log = logging.getLogger(__name__)
_NAMES = {
    "nifti": "sub-{0}_T1w.nii.gz",
    "bids": "sub-{0}/anat/sub-{0}_T1w.nii.gz",
    "ome-zarr": "sub-{0}_T1w.ome.zarr",
}


def export_unit(export: ExportPlan, number: int, subjects: list[Subject], partial: bool) -> list[str]:
    """Write what is not there yet of a unit; returns the ids of damaged volumes, which have no file.

    Raises:
        UserError: a volume is damaged, and `partial` is not set; or the disk is full.
    """
    stored = StoredArray(export.uri, export.plan.arrays[0].name)
    if export.record.format == "webdataset":
        return _tar(export, stored, number, subjects, partial)
    damaged = []
    for subject in subjects:
        path = Path(export.output, _NAMES[export.record.format].format(subject.sample_id))
        if path.exists():
            continue
        voxels = _checked(export, stored, subject, partial)
        if voxels is None:
            damaged.append(subject.sample_id)
            continue
        image = export.plan.volume.dequantise(voxels)
        if export.record.format == "ome-zarr":
            write_ome_zarr(path, image, export.plan.volume, about(export, subject))
        else:
            write_nifti(path, image, export.plan.volume, export.plan.kind == "generated")
    return damaged


def finish(export: ExportPlan, damaged: list[str]) -> ExportRecord:
    """Tables, then the record that says it is whole; removes what a killed run left half-written."""
    sweep(Path(export.output), below=True)
    gone = set(damaged)
    kept = [subject for subject in export.subjects if subject.sample_id not in gone]
    if not kept:
        raise UserError(f"every chosen volume of {export.uri} is damaged: run `brainsynth verify {export.uri}`")
    for name, data in tables(export, kept).items():
        export.store.write(name, data)
    left_out = tuple(subject.sample_id for subject in export.subjects if subject.sample_id in gone)
    done = dataclasses.replace(export.record, left_out=left_out, finished=True)
    export.store.write(EXPORT_KEY, seal(done))
    return done


def _tar(export: ExportPlan, stored: StoredArray, number: int, subjects: list[Subject], partial: bool) -> list[str]:
    path = Path(export.output, f"shard-{number:06d}.tar")
    if path.exists() and tar_ids(path) == {subject.sample_id for subject in subjects}:
        return []  # one that a `--partial` export left somebody out of is tried again
    damaged: list[str] = []

    def samples() -> Iterator[tuple[str, npt.NDArray[Any], dict[str, Any]]]:
        for subject in subjects:
            voxels = _checked(export, stored, subject, partial)
            if voxels is None:
                damaged.append(subject.sample_id)
                continue
            facts = {"affine": export.plan.volume.affine.tolist(), **about(export, subject)}
            image = voxels if voxels.dtype.kind == "f" else export.plan.volume.dequantise(voxels)
            yield subject.sample_id, image, facts

    write_tar(path, samples())
    return damaged


def _checked(
    export: ExportPlan, stored: StoredArray, subject: Subject, partial: bool
) -> npt.NDArray[np.generic] | None:
    """A volume whose voxels are those of its commit record; None for another one where `partial` is set."""
    try:
        voxels = stored.read(subject.row, stored.box())
        if stored_sha256([voxels]) == subject.voxel_sha256:
            return voxels
        why = f"{export.uri}: the voxels of {subject.sample_id} (row {subject.row}) are not those that were committed"
    except UserError:
        raise
    except ValueError as error:
        why = str(error)
    if not partial:
        raise UserError(
            f"{why}; mend it with `brainsynth verify {export.uri} --repair` and the job that made it, or leave it out with "
            "--partial; what is exported so far is whole, and the same command goes on"
        )
    log.warning("left out: %s", why)
    return None
