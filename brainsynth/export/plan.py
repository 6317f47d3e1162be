"""What an export will write: which subjects of which dataset, in which format, to which folder; and whether it may.

A folder holds one export, as its record says. Whatever is written under its own name is whole, so resuming is to make what
is not there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from typing import Literal

from brainsynth.config.schema import ExportFormat
from brainsynth.errors import UserError, problems_error
from brainsynth.export.formats import FORMATS
from brainsynth.manifest import MODEL_KEY, ModelRecord, SampleRecord
from brainsynth.plan import Plan
from brainsynth.reading.dataset import SyntheticDataset, open_dataset
from brainsynth.reading.query import missing
from brainsynth.records import record, seal, to_dict, unseal
from brainsynth.storage.commit import each_commit, read_plan, read_samples
from brainsynth.storage.filesystem import LocalStore, Store, check_apart, local_folder, open_store, resolve_uri
from brainsynth.storage.keys import is_of_desktop
from brainsynth.storage.whole_file import TEMPORARY_PREFIX

EXPORT_KEY = ".brainsynth-export.json"


@record
class Subject:
    """One volume to export."""

    row: int
    sample_id: str
    split: str
    covariates: dict[str, float | str | None]
    """In physical units; None where missing."""
    voxel_sha256: str
    """Of the stored voxels, from the commit record."""
    label_volumes: dict[str, float]
    """Column of the manifest → ml, of a dataset with label maps."""
    extrapolated: bool | None = None
    """Of a generated row, whether it lies outside the model's training support."""


@record
class ExportRecord:
    """What an output folder holds, or will hold when `finished`."""

    schema_version: Literal[1] = 1
    format: ExportFormat
    plan_fingerprint: str
    where: str
    split: str
    subjects: int
    subjects_digest: str
    """Of ids and voxel digests, in order: two exports with equal records have equal voxels."""
    left_out: tuple[str, ...] = ()
    """Ids of damaged volumes that a `--partial` export did without."""
    finished: bool = False


class ExportPlan:
    """Everything a worker needs, and what the output folder's record is."""

    def __init__(
        self, uri: str, output: str, plan: Plan, model: ModelRecord | None, to: ExportRecord, subjects: list[Subject]
    ) -> None:
        self.uri, self.output, self.plan, self.model, self.record = uri, output, plan, model, to
        self.subjects = subjects

    @property
    def store(self) -> LocalStore:
        """The output folder."""
        return LocalStore(local_folder(self.output, "output"))


def plan_export(
    uri: str, output: str, to: ExportFormat, where: str | None = None, split: str | None = None, partial: bool = False
) -> ExportPlan:
    """Check everything and choose the subjects; writes nothing.

    Raises:
        UserError: there is no dataset of volumes, it is damaged or not finished (and `partial` is not given), nobody is
            chosen, or `output` holds something else.
    """
    _check_library(to)
    uri, folder = resolve_uri(uri, "uri"), str(local_folder(output, "output"))
    check_apart(uri, folder, "output")
    store = open_store(uri)
    plan = read_plan(store)
    if not plan.holds_volumes:
        raise UserError(f"{uri} holds {plan.kind}, not volumes: there is nothing to export")
    dataset = _opened(uri, where, split, partial)
    if not len(dataset):
        raise UserError(f"no volume of {uri} is chosen{f' by {where!r}' if where else ''}")
    subjects = _subjects(store, plan, dataset)
    digests = "\n".join(f"{subject.sample_id} {subject.voxel_sha256}" for subject in subjects)
    wanted = ExportRecord(
        format=to,
        plan_fingerprint=plan.fingerprint,
        where=where or "",
        split=split or "",
        subjects=len(subjects),
        subjects_digest=hashlib.sha256(digests.encode()).hexdigest(),
    )
    made = ExportPlan(uri, folder, plan, read_model(store, plan), wanted, subjects)
    check_output(made)
    return made


def _check_library(to: ExportFormat) -> None:
    library = FORMATS[to].needs
    if library and importlib.util.find_spec(library) is None:
        raise UserError(f"--to {to} needs {library}, which is not installed: pip install 'brainsynth[{to}]'")


def begin(export: ExportPlan) -> None:
    """Claim the output folder."""
    if not export.store.write_new(EXPORT_KEY, seal(export.record)):
        check_output(export)


def check_output(export: ExportPlan) -> None:
    """Raises UserError when the output folder holds anything but this export, begun or finished."""
    store = export.store
    try:
        begun = unseal(ExportRecord, store.read(EXPORT_KEY), f"{store.uri}/{EXPORT_KEY}")
    except FileNotFoundError:
        keys = (key for key, _ in store.list() if not is_of_desktop(key))
        there = next((key for key in keys if TEMPORARY_PREFIX not in key), None)
        if there is not None:
            raise UserError(
                f"{store.uri} is not empty (it holds {there}) and is not an export: give a new or empty output folder"
            ) from None
        return
    a, b = (to_dict(r) for r in (begun, export.record))
    different = [
        f"{k}: there {a[k]!r}, asked {b[k]!r}" for k in b if k not in ("finished", "left_out") and a[k] != b[k]
    ]
    if different:
        raise problems_error(f"{store.uri} holds another export; give another output folder", different)


def _opened(uri: str, where: str | None, split: str | None, partial: bool) -> SyntheticDataset:
    try:
        return open_dataset(uri, where=where, split=split, partial=partial)
    except FileNotFoundError:
        raise UserError(
            f"{uri} is not finished: run its job again to finish it, or export what is committed so far with --partial"
        ) from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{error}; `brainsynth verify {uri}` says what is damaged") from None


def _subjects(store: Store, plan: Plan, dataset: SyntheticDataset) -> list[Subject]:
    stored: dict[int, SampleRecord] = {}
    shards = sorted({row // plan.samples_per_shard for row in dataset.rows.tolist()})
    for shard, read in each_commit(store, plan, shards):
        try:
            stored |= {sample.row: sample for sample in read().samples}
        except FileNotFoundError:
            raise UserError(
                f"{store.uri}: the commit record of shard {shard} is lost; run `brainsynth verify`"
            ) from None
    planned = read_samples(store, plan)
    subjects = []
    for index, (row, split) in enumerate(zip(dataset.rows.tolist(), dataset.splits, strict=True)):
        facts, sample = dataset.facts(index), stored[row]
        values = {name: None if missing(facts[name]) else facts[name] for name in dataset.covariates}
        if sample.sample_id != facts["sample_id"] or sample.status != "ok":
            raise UserError(
                f"{store.uri}: participants.tsv and the commit records differ in row {row}; run `brainsynth verify`"
            )
        if not re.fullmatch(r"[A-Za-z0-9]{1,64}", sample.sample_id):
            raise UserError(f"{store.uri}: {sample.sample_id!a} is not a sample id of letters and digits")
        subjects.append(
            Subject(
                row=row,
                sample_id=sample.sample_id,
                split=split,
                covariates=values,
                voxel_sha256=sample.voxel_sha256,
                label_volumes={label.column: float(sample.extra[label.column]) for label in plan.structures},
                extrapolated=bool(planned["extrapolated"].iloc[row]) if "extrapolated" in planned else None,
            )
        )
    return subjects


def read_model(store: Store, plan: Plan) -> ModelRecord | None:
    """Which model made a generated dataset, and its licence. Raises UserError when that record is damaged or another's."""
    if plan.kind != "generated":
        return None
    try:
        model = unseal(ModelRecord, store.read(MODEL_KEY), f"{store.uri}/{MODEL_KEY}")
    except FileNotFoundError:
        return None  # made before there was this record
    if model.bundle != plan.identity["bundle"]:
        raise UserError(f"{store.uri}/{MODEL_KEY} names another bundle than plan.json; delete it and generate again")
    return model
