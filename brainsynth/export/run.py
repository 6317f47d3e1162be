"""Write the volumes of an export, unit by unit in any order and process, then the tables next to them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy.typing as npt

from brainsynth.errors import UserError
from brainsynth.export.file_format import ExportedVolume
from brainsynth.export.formats import FORMATS
from brainsynth.export.plan import EXPORT_KEY, ExportPlan, ExportRecord, Subject
from brainsynth.export.tables import about, tables
from brainsynth.manifest import stored_sha256
from brainsynth.reading.stored_array import StoredArray
from brainsynth.records import record, seal, unseal
from brainsynth.storage.whole_file import content_sha256, discard, sweep, whole

log = logging.getLogger(__name__)
SUBJECTS_PER_UNIT = 8
FILES_FOLDER = ".brainsynth-export"


@record
class ExportedFile:
    """A file, or an OME-Zarr folder, that was finished."""

    ids: tuple[str, ...]
    """Who is in it."""
    sha256: str


@record
class ExportedUnit:
    """The finished files of a unit, by path: a later run finds out whether they still are what was written."""

    files: dict[str, ExportedFile]


def units(export: ExportPlan) -> list[tuple[int, list[Subject]]]:
    """Numbered groups of subjects, each written by one worker; a file of several subjects is a unit."""
    size = max(FORMATS[export.record.format].subjects_per_file, SUBJECTS_PER_UNIT)
    starts = range(0, len(export.subjects), size)
    return [(number, export.subjects[start : start + size]) for number, start in enumerate(starts)]


def export_unit(export: ExportPlan, number: int, subjects: list[Subject], partial: bool) -> list[str]:
    """Write what is not there yet of a unit; returns the ids of damaged volumes, which are in no file.

    Raises:
        UserError: a volume is damaged, and `partial` is not set; or the disk is full.
    """
    stored = [StoredArray(export.uri, array.name) for array in export.plan.arrays]
    kind = FORMATS[export.record.format]
    labelled = export.plan.labels is not None
    files = [subjects] if kind.subjects_per_file > 1 else [[subject] for subject in subjects]
    damaged: list[str] = []
    people = {subject.row: subject for subject in subjects}

    @functools.lru_cache(maxsize=1)  # the files of one subject follow each other
    def arrays_of(row: int) -> list[npt.NDArray[Any]] | None:
        return _checked(export, stored, people[row], partial)

    def volumes(group: list[Subject]) -> Iterator[ExportedVolume]:
        for subject in group:
            arrays = arrays_of(subject.row)
            if arrays is None:
                damaged.append(subject.sample_id)
                continue
            labels = arrays[1] if labelled else None
            facts, plan = about(export, subject), export.plan
            yield ExportedVolume(subject.sample_id, arrays[0], plan.volume, facts, labels, plan.labels)

    written = _written(export, number)
    for group, (template, write) in itertools.product(files, kind.files(labelled).items()):
        name = template.format(id=group[0].sample_id, unit=number)
        path, ids = Path(export.output, name), tuple(subject.sample_id for subject in group)
        # Written again: what was cut or changed since, and a file that a `--partial` export left somebody out of.
        if name in written and written[name].ids == ids and written[name].sha256 == content_sha256(path):
            continue
        checked = volumes(group)
        first = next(checked, None)
        if path.is_dir() or first is None:
            discard(path)
        if first is not None:
            with whole(path) as temporary:
                write(temporary, itertools.chain([first], checked))
            ids = tuple(subject.sample_id for subject in group if subject.sample_id not in damaged)
            written[name] = ExportedFile(ids=ids, sha256=content_sha256(path))
            export.store.write(_unit_key(number), seal(ExportedUnit(files=written)))
    return list(dict.fromkeys(damaged))


def _unit_key(number: int) -> str:
    return f"{FILES_FOLDER}/unit-{number:06d}.json"


def _written(export: ExportPlan, number: int) -> dict[str, ExportedFile]:
    """The files of a unit that were finished."""
    try:
        return dict(unseal(ExportedUnit, export.store.read(_unit_key(number)), _unit_key(number)).files)
    except FileNotFoundError:
        return {}
    except UserError as error:
        log.warning("the files of unit %d are written again: %s", number, error)
        return {}


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


def _checked(
    export: ExportPlan, stored: list[StoredArray], subject: Subject, partial: bool
) -> list[npt.NDArray[Any]] | None:
    """A volume and its label map whose voxels are those of its commit record; None for others where `partial` is set."""
    try:
        arrays = [array.read(subject.row, array.box()) for array in stored]
        if stored_sha256(arrays) == subject.voxel_sha256:
            return arrays
        why = f"{export.uri}: the voxels of {subject.sample_id} (row {subject.row}) are not those that were committed"
    except UserError:
        raise
    except ValueError as error:
        why = str(error)
    if not partial:
        raise UserError(
            f"{why}; repair it with `brainsynth verify {export.uri} --repair` and the job that made it, or leave it out "
            "with --partial; what is exported so far is whole, and the same command resumes"
        )
    log.warning("left out: %s", why)
    return None
