"""Real scans → prepared cohort: one grid, RAS+, intensities in [0, 1], split by subject; a broken scan is a reject."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import defaultdict
from typing import Any

import numpy.typing as npt
import pandas as pd

from brainsynth.cohort.label_table import read_label_table
from brainsynth.cohort.scan import MISSING_LABELS, ScanRejected, load_labelled_scan, scaled
from brainsynth.cohort.source import Cells, Source, label_folder, not_read, person_of, read_source, source_table
from brainsynth.config.schema import PrepareConfig, SourceConfig
from brainsynth.covariates.distribution import check_distribution
from brainsynth.covariates.schema import Covariate, did_you_mean, is_number, matching, plain
from brainsynth.errors import UserError
from brainsynth.labels import LabelTable
from brainsynth.manifest import SampleRecord, describe_sample
from brainsynth.plan import Plan, ShardSpec, table_digest, volume_arrays
from brainsynth.reading.splits import hashed_place
from brainsynth.records import to_dict
from brainsynth.storage.arrays import empty_arrays
from brainsynth.storage.cells import MISSING
from brainsynth.storage.commit import read_plan, read_samples
from brainsynth.storage.filesystem import open_store, resolve_uri
from brainsynth.storage.work import ShardOutput, Work

_ELSEWHERE = ("session_column", "label_table", "label_source")
"""Of a source, what a plan has elsewhere: sessions in the samples' ids and files, labels in its own table."""
SHOWN = 100
"""Rows, folders and files that are named one by one."""


class CohortWork(Work):
    """A cohort to be prepared, and what its source has that is worth a word."""

    left_out: tuple[tuple[str, str], ...]
    """(path, reason) of folders and files that no row names."""
    late: dict[int, dict[str, str]]
    """Row → `image` and `labels`, of scans that were missing when the cohort was planned."""
    warnings: list[str]
    """Values of `exclude` that match nothing, rows without a scan, folders and files without a row."""


def plan_cohort(config: PrepareConfig) -> CohortWork:
    """What preparation will store: one row a scan, in table order. Raises UserError; reads no image."""
    source = read_source(config.source)
    samples = cohort_samples(source, config)
    labels = cohort_labels(config.source)
    plan = Plan(
        kind="prepared",
        identity={
            "intensity_percentiles": list(config.intensity_percentiles),
            "center": config.center,
            "missing_covariates": config.missing_covariates,
            "max_file_mib": config.max_file_mib,
            "validation_fraction": config.validation_fraction,
            "split_seed": config.split_seed,
            "source": {key: value for key, value in to_dict(config.source).items() if key not in _ELSEWHERE},
            # The rule that came first has no name in a plan: cohorts made by it keep their fingerprint.
            **({} if config.intensity_rule == "percentiles" else {"intensity_rule": config.intensity_rule}),
        },
        volume=config.volume,
        covariates=config.covariates,
        arrays=volume_arrays(config.volume, labels),
        num_samples=len(samples),
        samples_per_shard=config.samples_per_shard,
        samples_digest=table_digest(samples),
        labels=labels,
    )
    root = resolve_uri(config.output, "output")
    plan, samples, late = _with_late_files(root, plan, samples)
    arguments = {"root": root, "plan": plan, "config": config, "late": late}
    subjects = samples.groupby("split")["subject"].nunique().to_dict()
    left_out = [f"{name}: {reason}" for name, reason in not_read(source)]
    more = [f"… and {len(left_out) - SHOWN} more"] if len(left_out) > SHOWN else []
    work = CohortWork(root, plan, samples, CohortPreparer, arguments)
    work.late, work.left_out = late, source.left_out
    work.warnings = [*unmatched_exclusions(source, config.source.exclude), *look_alikes(source)]
    work.warnings += [*left_out[:SHOWN], *more]
    work.warnings += too_few(samples, config)
    work.preview = "\n".join(
        [
            f"subjects: {subjects.get('train', 0)} train, {subjects.get('validation', 0)} validation",
            f"{len({scan.line for scan in source.scans})} rows of {source.where}, {len(source.scans)} scans",
            *([] if labels is None else [f"label maps of {len(labels.labels)} structures, by {labels.source}"]),
            *work.warnings,
        ]
    )
    return work


def cohort_labels(source: SourceConfig) -> LabelTable | None:
    """The label table of a cohort with label maps. Raises UserError."""
    if not source.has_labels:
        return None
    folder = label_folder(source)
    path = source.label_table or str(folder / "dseg.tsv" if folder else "")
    return read_label_table(path, source.label_source or "not given")


def cohort_samples(source: Source, config: PrepareConfig) -> pd.DataFrame:
    """The samples table: sample_id, subject, split, image, mask, labels, excluded, covariates. What is missing stays so.

    Text in place of a number counts as missing too, and `excluded` has the reason.
    """
    table = source_table(source)
    columns = {name: config.source.columns.get(name, name) for name in config.covariates.names}
    absent = [column for column in [*columns.values(), *config.source.exclude] if column not in table.columns]
    if absent:
        raise UserError(
            f"{source.where}: missing column(s) {', '.join(absent)}; the table has {', '.join(source.columns)}"
        )
    # A person is called what the first row says; the split is that of the id as it is written there.
    written: dict[str, str] = {}
    for scan in source.scans:
        written.setdefault(person_of(scan.subject), scan.subject)
    subjects = [written[person_of(scan.subject)] for scan in source.scans]
    samples = pd.DataFrame({"sample_id": sample_ids(source), "subject": subjects})
    samples["split"] = [split_of(s, config.split_seed, config.validation_fraction) for s in subjects]
    samples["image"] = [scan.image for scan in source.scans]
    samples["mask"] = [scan.mask for scan in source.scans]
    if config.source.has_labels:
        samples["labels"] = [scan.labels for scan in source.scans]
    reasons = [_exclusion(scan.cells, config.source.exclude) for scan in source.scans]
    values = {c.name: _typed(c, list(table[columns[c.name]]), reasons) for c in config.covariates.covariates}
    samples["excluded"] = reasons
    for name, column in values.items():
        samples[name] = column
    sides = samples.assign(person=[person_of(s) for s in subjects]).groupby("person")["split"].nunique()
    if (sides > 1).any():
        raise UserError(f"{source.where}: on both sides of the split: {', '.join(sides.index[sides > 1][:10])}")
    return samples


def _typed(covariate: Covariate, cells: list[str | None], reasons: list[str]) -> pd.Series:
    """A column as the schema reads it; what is no number leaves its reason in `reasons` where there is none yet."""
    if covariate.kind != "continuous":
        return pd.Series([c if c is None else covariate.category(c) or c for c in cells], dtype=object)
    for row, cell in enumerate(cells):
        if cell is not None and not is_number(cell):
            (problem,) = covariate.problems(pd.Series([cell], dtype=object), allow_out_of_range=True)
            reasons[row] = reasons[row] or problem.removeprefix("row 0: ")
    numbers = pd.to_numeric(pd.Series([c if c is not None and is_number(c) else None for c in cells], dtype=object))
    return numbers.astype("float64")


def too_few(samples: pd.DataFrame, config: PrepareConfig) -> list[str]:
    """One sentence for each reason why trainings will refuse this cohort, as far as its table says."""
    schema, usable = config.covariates, samples[samples["excluded"] == ""]
    usable = usable[~schema.out_of_range(usable)]
    for c in schema.covariates:
        known = usable[c.name].map(lambda value, c=c: c.kind == "continuous" or c.category(value) is not None)
        unknown = usable[c.name].isna()
        taken = known & ~unknown if config.missing_covariates == "reject" else known | unknown
        usable = usable[taken.astype(bool)]  # of a table without rows `map` gives objects, which would name columns
    found = [
        f"no scan is in the {split} split, so trainings will refuse this cohort: change split_seed or validation_fraction"
        for split in ("train", "validation")
        if not (usable["split"] == split).any()
    ]
    try:
        check_distribution(usable[usable["split"] == "train"], schema, "the training split")
    except UserError as error:
        reasons = "; ".join(line.strip() for line in str(error).split("\n"))
        found.append(f"trainings will refuse this cohort, whatever else it is good for: {reasons}")
    return found


def unmatched_exclusions(source: Source, exclude: dict[str, tuple[str, ...]]) -> list[str]:
    """One sentence for each value of `source.exclude` that no row has, or that some rows write otherwise: they stay."""
    found = []
    for column, values in exclude.items():
        cells = {scan.cells[column] or "n/a" for scan in source.scans}
        kept = {cell for cell in cells if not any(_names(cell, value) for value in values)}
        for value in values:
            alike = sorted(repr(cell) for cell in kept if plain(cell) == plain(value))
            if not any(_names(cell, value) for cell in cells):
                found.append(f"source.exclude: no row has {column} = {value!r}{did_you_mean(value, cells)}")
            elif alike:
                found.append(
                    f"source.exclude: {column} = {value!r} does not exclude {', '.join(alike)}; list each spelling"
                )
    return found


def look_alikes(source: Source) -> list[str]:
    """A sentence where ids differ only in case or leading zeros: a person with two ids may be on both sides of the split."""
    people: dict[str, set[str]] = defaultdict(set)
    for person in {person_of(scan.subject) for scan in source.scans}:
        people[person.casefold().removeprefix("sub-").lstrip("0")].add(person)
    alike = [" and ".join(map(repr, sorted(ids))) for _, ids in sorted(people.items()) if len(ids) > 1]
    more = f", and {len(alike) - 10} more" if len(alike) > 10 else ""
    return [f"read as different people, though the ids look alike: {', '.join(alike[:10])}{more}"] if alike else []


def sample_ids(source: Source) -> list[str]:
    """Letters and digits of person and session, unique."""
    labels = [re.sub(r"[^A-Za-z0-9]", "", person_of(scan.subject) + scan.session) for scan in source.scans]
    taken: set[str] = set()
    unique = []
    for base in labels:
        candidates = itertools.chain([base], (f"{base}x{count}" for count in itertools.count(2)))
        unique.append(next(candidate for candidate in candidates if candidate and candidate not in taken))
        taken.add(unique[-1])
    return unique


def split_of(subject: str, seed: int, validation_fraction: float) -> str:
    """`train` or `validation` by a hash of the subject: its scans stay together, and adding subjects moves nobody."""
    return "validation" if hashed_place(f"split\0{seed}\0{subject}") < validation_fraction else "train"


def _names(cell: str, value: str) -> bool:
    """True where a cell is the value: its text, or `n/a` and an empty cell, which are one."""
    return matching(cell, (value,)) is not None or (cell == "n/a" and value in MISSING)


def _exclusion(cells: Cells, exclude: dict[str, tuple[str, ...]]) -> str:
    for column, values in exclude.items():
        cell = cells.get(column) or "n/a"
        if any(_names(cell, value) for value in values):
            return f"excluded: {column} = {cell}"
    return ""


def _with_late_files(
    root: str, plan: Plan, samples: pd.DataFrame
) -> tuple[Plan, pd.DataFrame, dict[int, dict[str, str]]]:
    """The plan that the output has, where it differs only in scans that were missing when it was made: row → files."""
    try:
        store = open_store(root)
        stored = read_plan(store)
        before = read_samples(store, stored)
    except UserError:
        return plan, samples, {}
    if stored.fingerprint == plan.fingerprint or len(before) != len(samples) or "image" not in before:
        return plan, samples, {}
    files = ["image", *(["labels"] if plan.labels is not None else [])]
    late = {
        row: {name: str(samples[name][row]) for name in files}
        for row in before.index
        if not before["image"][row] and samples["image"][row]
    }
    merged = samples.copy()
    for row in late:
        merged.loc[row, ["sample_id", *files]] = before.loc[row, ["sample_id", *files]]
    same = dataclasses.replace(plan, samples_digest=table_digest(merged))
    return (same, merged, late) if same.fingerprint == stored.fingerprint else (plan, samples, {})


class CohortPreparer:
    """Makes shards of prepared scans."""

    def __init__(self, root: str, plan: Plan, config: PrepareConfig, late: dict[int, dict[str, str]]) -> None:
        self.plan, self.config, self.late = plan, config, late
        self.samples = read_samples(open_store(root), plan)

    def make(self, shard: ShardSpec) -> ShardOutput:
        """Load, check and conform the scans of one shard."""
        arrays = empty_arrays(self.plan, shard)
        records = []
        for offset, row in enumerate(range(shard.start, shard.stop)):
            records.append(self._sample(self.samples.iloc[row], row, [array[offset] for array in arrays]))
        return ShardOutput(arrays, records)

    def _sample(self, sample: pd.Series, row: int, stored: list[npt.NDArray[Any]]) -> SampleRecord:
        try:
            self._check_covariates(sample)
            if self.config.source.mask_column is not None and not sample["mask"]:
                raise ScanRejected("missing mask file")
            config, files = self.config, {"labels": "", **sample, **self.late.get(row, {})}
            if self.plan.labels is not None and not files["labels"]:
                raise ScanRejected(MISSING_LABELS if files["image"] else "missing file")
            image, labels, facts = load_labelled_scan(
                files["image"],
                files["mask"],
                files["labels"],
                self.plan.labels,
                config.volume,
                config.center,
                config.max_file_mib,
                config.intensity_rule,
                config.source.assume_orientation,
            )
            intensities = scaled(image, config.intensity_rule, config.intensity_percentiles)
            stored[0][...] = self.plan.volume.quantise(intensities)
            if labels is not None:
                stored[1][...] = labels
        except ScanRejected as error:
            return SampleRecord(sample_id=sample["sample_id"], row=row, status="rejected", reason=str(error))
        return describe_sample(sample["sample_id"], row, stored, facts, self.plan)

    def _check_covariates(self, sample: pd.Series) -> None:
        if sample["excluded"]:
            raise ScanRejected(sample["excluded"])
        gone = [name for name in self.config.covariates.names if pd.isna(sample[name])]
        if gone and self.config.missing_covariates == "reject":
            raise ScanRejected(f"missing covariate: {', '.join(gone)}")
        line = pd.DataFrame([sample])
        wrong = [
            p for c in self.config.covariates.covariates for p in c.problems(line[c.name], allow_out_of_range=False)
        ]
        if wrong:
            raise ScanRejected(wrong[0].removeprefix("row 0: "))
