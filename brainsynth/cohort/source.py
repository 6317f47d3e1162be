"""Where a cohort comes from: a table with one row a scan, or a BIDS folder → one `Source` that accounts for every line.

A person is a subject's id without `sub-`. Cells are text (storage/cells.py); columns that the config does not name are not
read.
"""

from __future__ import annotations

import dataclasses
import glob
import logging
import os
import re
from collections import defaultdict
from pathlib import Path

import pandas as pd

from brainsynth.config.schema import SourceConfig
from brainsynth.errors import UserError, problems_error
from brainsynth.places import user_path
from brainsynth.storage.cells import lines_of, read_cells
from brainsynth.storage.filesystem import resolve_uri

log = logging.getLogger(__name__)
PARTICIPANTS, SESSIONS = "participants.tsv", "sessions.tsv"
_SESSION_ID = "session_id"
Cells = dict[str, str | None]


@dataclasses.dataclass(frozen=True)
class Scan:
    """One row to be: what the table says of it, where its file is, and which visit it is."""

    line: int
    cells: Cells
    subject: str
    session: str
    image: str
    mask: str
    reason: str = ""
    """Why there is no file, where none was looked for or found."""
    labels: str = ""
    """Path of the label map, where the cohort has label maps."""


@dataclasses.dataclass(frozen=True)
class Source:
    """All scans that a source names, and what else is there."""

    where: str
    columns: tuple[str, ...]
    scans: tuple[Scan, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    """(path, reason) of folders and files that no row of the table names."""


def person_of(subject: str) -> str:
    """`sub-01` and `01` are one person."""
    return subject.strip().removeprefix("sub-")


def read_source(source: SourceConfig) -> Source:
    """The scans of a cohort. Raises UserError for a table that cannot be read, or in which people are not told apart."""
    path = Path(resolve_uri(source.path, "source.path"))
    if path.is_dir():
        if source.mask_column is not None:
            raise UserError("source.mask_column needs a table: a BIDS folder names no masks; give its rows as a table")
        if source.label_column is not None:
            raise UserError(
                "source.label_column needs a table: of a BIDS folder, source.label_folder names the label maps"
            )
        return _read_folder(path, source)
    if source.label_folder is not None:
        raise UserError("source.label_folder needs a BIDS folder: of a table, source.label_column names the label maps")
    return _read_table(path, source)


def _rows(path: Path, what: str, wanted: list[str | None]) -> tuple[tuple[str, ...], list[tuple[int, Cells]]]:
    """Columns and rows of a table that has all wanted columns, and an id in each row (the first of `wanted`)."""
    table = read_cells(str(path), what)
    columns = tuple(str(column) for column in table.columns)
    for column in wanted:
        if column is not None and column not in columns:
            raise UserError(f"{path}: there is no column {column!r}; it has {', '.join(columns)}")
    if table.empty:
        raise UserError(f"{path}: the table has no rows")
    rows = [(int(line), dict(zip(columns, cells, strict=True))) for line, *cells in table.itertuples(name=None)]
    unnamed = [line for line, cells in rows if not person_of(cells[str(wanted[0])] or "")]
    if unnamed:
        raise UserError(f"{path}: rows without {wanted[0]}: {lines_of(unnamed)}")
    return columns, rows


def _check_people(path: Path, columns: tuple[str, ...], rows: list[tuple[int, Cells]], source: SourceConfig) -> None:
    """One row a person, or one a visit where the config says which column tells visits apart."""
    lines: dict[tuple[str, str], list[int]] = defaultdict(list)
    for line, cells in rows:
        lines[person_of(str(cells[source.subject_column])), _session(cells, source.session_column)].append(line)
    twice = {key: places for key, places in lines.items() if len(places) > 1}
    if not twice:
        return
    shown = [
        f"{lines_of(places)}: {person}{f', {session}' if session else ''} ({len(places)} rows)"
        for (person, session), places in twice.items()
    ]
    if source.session_column is not None:
        raise problems_error(
            f"{path}: more than one row has this {source.subject_column} and {source.session_column}", shown
        )
    likely = [column for column in columns if column.casefold() in (_SESSION_ID, "session", "ses", "visit", "visit_id")]
    hint = f"here it may be {likely[0]!r}" if likely else "the table seems to have none: add one"
    raise problems_error(
        f"{path}: the same person in more than one row. With one row a visit, source.session_column names the column that "
        f"tells the visits apart ({hint})",
        shown,
    )


def _session(cells: Cells, column: str | None) -> str:
    return "" if column is None else (cells.get(column) or "").strip()


def _read_table(path: Path, source: SourceConfig) -> Source:
    wanted = [
        source.subject_column,
        source.image_column,
        source.mask_column,
        source.session_column,
        source.label_column,
    ]
    columns, rows = _rows(path, "source.path", wanted)
    _check_people(path, columns, rows, source)

    def file_of(cells: Cells, column: str | None) -> str:
        name = cells[column] if column is not None else None
        return str(path.parent / name) if name else ""

    scans = [
        Scan(
            line=line,
            cells=cells,
            subject=str(cells[source.subject_column]),
            session=_session(cells, source.session_column),
            image=file_of(cells, source.image_column),
            mask=file_of(cells, source.mask_column),
            labels=file_of(cells, source.label_column),
        )
        for line, cells in rows
    ]
    _check_scans(path, scans)
    return Source(str(path), columns, tuple(scans))


def _check_scans(path: Path, scans: list[Scan]) -> None:
    """One file is one scan: of two rows that name it, one has the covariates of another person or visit."""
    lines: dict[str, list[int]] = defaultdict(list)
    for scan in scans:
        if scan.image:
            lines[os.path.normpath(scan.image)].append(scan.line)
    twice = [
        f"{lines_of(places)}: {image}" for image, places in lines.items() if len(places) > 1 and os.path.isfile(image)
    ]
    if twice:
        raise problems_error(f"{path}: more than one row names the same scan; correct the paths or delete rows", twice)


def _read_folder(folder: Path, source: SourceConfig) -> Source:
    """participants.tsv joined to every sub-*/[ses-*/]anat/*_T1w.nii[.gz]; a row without one keeps an empty path.

    With `session_column` each row is one visit and takes the scans of its session; without, a person's row takes all,
    and sub-*/sub-*_sessions.tsv, or one sessions.tsv, says what differs from visit to visit.
    """
    path = folder / PARTICIPANTS
    columns, rows = _rows(path, "source.path (BIDS)", [source.subject_column, source.session_column])
    _check_people(path, columns, rows, source)
    visits, maps = _Visits(folder, source), label_folder(source)
    scans: list[Scan] = []
    taken: set[Path] = set()
    several = 0
    for line, cells in rows:
        subject = str(cells[source.subject_column])
        images = _images(folder, person_of(subject))
        if source.session_column is not None:
            wanted = _bare(_session(cells, source.session_column))
            images = {image: session for image, session in images.items() if _bare(session) == wanted}
        several += len(set(images.values())) > 1 and not visits.of(subject)
        taken |= images.keys()
        for image, session in images.items() or [(None, _session(cells, source.session_column))]:
            scans.append(
                Scan(
                    line=line,
                    cells=cells | visits.cells(subject, session),
                    subject=subject,
                    session=session,
                    image=str(image or ""),
                    mask="",
                    reason="" if image else _nothing_there(folder, person_of(subject), session),
                    labels="" if image is None or maps is None else _label_map(maps, folder, image),
                )
            )
    if several:
        log.warning("%d people have several sessions and one row: all their visits get its covariates", several)
    return Source(str(folder), (*columns, *visits.columns), tuple(scans), tuple(_left_out(folder, rows, taken, source)))


def label_folder(source: SourceConfig) -> Path | None:
    """The derivative with the label maps. Raises UserError where it is not a folder."""
    if source.label_folder is None:
        return None
    maps = Path(resolve_uri(source.path, "source.path")) / user_path(source.label_folder, "source.label_folder")
    if not maps.is_dir():
        raise UserError(f"source.label_folder: there is no folder {maps}")
    return maps


def _label_map(maps: Path, folder: Path, image: Path) -> str:
    """The one `*_dseg` file of a scan; the name that it should have where there is none."""
    place, name = maps / image.relative_to(folder).parent, image.name.rpartition("_T1w.nii")[0]
    found = [
        str(path)
        for path in sorted(place.glob(f"{glob.escape(name)}_*dseg.nii*"))
        if path.name.endswith(("_dseg.nii", "_dseg.nii.gz"))
    ]
    if len(found) > 1:
        raise UserError(
            f"source.label_folder: {len(found)} label maps of one scan: {', '.join(found[:3])}; name one of them for each "
            "scan in a table, by source.label_column"
        )
    return found[0] if found else str(place / f"{name}_dseg.nii.gz")


def _bare(session: str) -> str:
    return session.removeprefix("ses-")


def _images(folder: Path, person: str) -> dict[Path, str]:
    """Scans of a person → session folder. A label that is a path would find scans outside; the table may be anyone's."""
    label = f"sub-{person}"
    if Path(label).name != label or not person:
        return {}
    return {
        image: image.parents[1].name if image.parents[1].name.startswith("ses-") else ""
        for pattern in ("anat/*_T1w.nii*", "ses-*/anat/*_T1w.nii*")
        for image in sorted((folder / label).glob(pattern))
        if image.name.endswith((".nii", ".nii.gz")) and not image.name.startswith(".") and not _of_another(image)
    }


def _of_another(image: Path) -> str:
    """How the name of a scan contradicts the folders that it lies in; empty where it does not."""
    for folder in (image.parents[1].name, image.parents[2].name):
        entity = folder[:4]
        said = re.search(rf"(?:^|_)({entity}[^_]+)_", image.name) if entity in ("sub-", "ses-") else None
        if said and said[1] != folder:
            return f"its name says {said[1]}, its folder {folder}"
    return ""


def _nothing_there(folder: Path, person: str, session: str) -> str:
    label = f"sub-{person}"
    if Path(label).name != label or not (folder / label).is_dir():
        return f"missing file: there is no folder {label!r}"
    visit = f"ses-{_bare(session)}/" if session else ""
    return f"missing file: no {label}/{visit}anat/*_T1w.nii or .nii.gz"


def _left_out(
    folder: Path, rows: list[tuple[int, Cells]], taken: set[Path], source: SourceConfig
) -> list[tuple[str, str]]:
    """Folders of people without a row, scans of visits without one, and files that only look like scans."""
    people = {person_of(str(cells[source.subject_column])) for _, cells in rows}
    found = []
    for place in sorted(folder.glob("sub-*")):
        if place.is_dir() and person_of(place.name) not in people:
            found.append((place.name, f"no row of {PARTICIPANTS} names this subject"))
        elif place.is_dir():
            images = {i for pattern in ("anat/*_T1w.nii*", "ses-*/anat/*_T1w.nii*") for i in place.glob(pattern)}
            for image in sorted(images - taken):
                name = str(image.relative_to(folder))
                if image.name.startswith("."):
                    found.append((name, "not a scan: a hidden file (`._…` is metadata of macOS)"))
                elif _of_another(image):
                    found.append((name, _of_another(image)))
                elif image.name.endswith((".nii", ".nii.gz")):
                    found.append((name, f"no row of {PARTICIPANTS} names this session"))
    return found


class _Visits:
    """What BIDS says of single visits: sub-*/sub-*_sessions.tsv, or one sessions.tsv for all people."""

    def __init__(self, folder: Path, source: SourceConfig) -> None:
        self.by_person: dict[str, dict[str, Cells]] = defaultdict(dict)
        self.columns: tuple[str, ...] = ()
        if source.session_column is not None:
            return
        common = folder / SESSIONS
        tables = [(common, "")] if common.is_file() else []
        tables += [(path, path.parent.name) for path in sorted(folder.glob("sub-*/sub-*_sessions.tsv"))]
        for path, person in tables:
            wanted: list[str | None] = [_SESSION_ID] if person else [source.subject_column, _SESSION_ID]
            columns, rows = _rows(path, "source.path (BIDS)", wanted)
            self.columns = tuple(dict.fromkeys([*self.columns, *columns]))
            for line, cells in rows:
                visits = self.by_person[person_of(person or str(cells[source.subject_column]))]
                session = _bare(str(cells[_SESSION_ID]))
                if session in visits:
                    raise UserError(f"{path}, line {line}: session {session} a second time")
                visits[session] = {key: cell for key, cell in cells.items() if key != source.subject_column}

    def of(self, subject: str) -> dict[str, Cells]:
        """The visits of a person, by session."""
        return self.by_person.get(person_of(subject), {})

    def cells(self, subject: str, session: str) -> Cells:
        """What replaces the person's row for one visit; of a visit that is not listed, nothing is known."""
        visits = self.of(subject)
        if not visits or not session:
            return {}
        unknown: Cells = dict.fromkeys(next(iter(visits.values())))
        return visits.get(_bare(session), unknown)


def not_read(source: Source) -> list[tuple[str, str]]:
    """(name, reason) of rows without a scan, and of folders and files without a row."""
    rows = [(f"line {scan.line} ({scan.subject})", scan.reason) for scan in source.scans if scan.reason]
    return [*rows, *source.left_out]


def source_table(source: Source) -> pd.DataFrame:
    """The cells of all scans, indexed by line."""
    index = pd.Index([scan.line for scan in source.scans], name="line")
    return pd.DataFrame(
        [scan.cells for scan in source.scans], index=index, columns=list(dict.fromkeys(source.columns)), dtype=object
    )
