"""Real scans → prepared cohort: one grid, RAS+, intensities in [0, 1], split by subject; a broken scan is a reject."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pandas as pd

from brainsynth.cohort.intensity import robust_white, scale_intensities
from brainsynth.cohort.scan import ScanRejected, load_scan
from brainsynth.config.schema import PrepareConfig, SourceConfig
from brainsynth.covariates.schema import label
from brainsynth.errors import UserError
from brainsynth.manifest import SampleRecord, describe_sample
from brainsynth.plan import Plan, ShardSpec, table_digest, volume_array
from brainsynth.reading.splits import hashed_place
from brainsynth.records import to_dict
from brainsynth.storage.arrays import empty_arrays
from brainsynth.storage.commit import read_samples
from brainsynth.storage.filesystem import open_store, resolve_uri
from brainsynth.storage.tables import read_table
from brainsynth.storage.work import ShardOutput, Work


def plan_cohort(config: PrepareConfig) -> Work:
    """What preparation will store: one row a scan, in table order. Raises UserError; reads no image."""
    table, where = read_source(config.source)
    samples = cohort_samples(table, config, where)
    plan = Plan(
        kind="prepared",
        identity={
            "intensity_percentiles": list(config.intensity_percentiles),
            "center": config.center,
            "missing_covariates": config.missing_covariates,
            "max_file_mib": config.max_file_mib,
            "validation_fraction": config.validation_fraction,
            "split_seed": config.split_seed,
            "source": to_dict(config.source),
            # The rule that came first has no name in a plan: cohorts made by it keep their fingerprint.
            **({} if config.intensity_rule == "percentiles" else {"intensity_rule": config.intensity_rule}),
        },
        volume=config.volume,
        covariates=config.covariates,
        arrays=(volume_array("t1w", config.volume),),
        num_samples=len(samples),
        samples_per_shard=config.samples_per_shard,
        samples_digest=table_digest(samples),
    )
    root = resolve_uri(config.output, "output")
    arguments = {"root": root, "plan": plan, "config": config}
    subjects = samples.groupby("split")["subject"].nunique().to_dict()
    preview = f"subjects: {subjects.get('train', 0)} train, {subjects.get('validation', 0)} validation"
    return Work(root, plan, samples, CohortPreparer, arguments, preview)


def read_source(source: SourceConfig) -> tuple[pd.DataFrame, str]:
    """The source as a table with an `image` column of absolute paths (and `mask`), and where it came from."""
    path = Path(resolve_uri(source.path, "source.path"))
    if path.is_dir():
        if source.mask_column is not None:
            raise UserError("source.mask_column needs a table: a BIDS folder names no masks; give its rows as a table")
        return _read_bids(path, source), str(path)
    table = read_table(str(path), "source.path", ids=[source.subject_column])
    for column in (source.subject_column, source.image_column, source.mask_column):
        if column is not None and column not in table.columns:
            raise UserError(f"{path}: there is no column {column!r}; it has {', '.join(table.columns)}")
    table["image"] = [str(path.parent / name) if isinstance(name, str) else "" for name in table[source.image_column]]
    if source.mask_column is not None:
        table["mask"] = [str(path.parent / name) if isinstance(name, str) else "" for name in table[source.mask_column]]
    return table, str(path)


def _read_bids(folder: Path, source: SourceConfig) -> pd.DataFrame:
    """participants.tsv joined to every sub-*/[ses-*/]anat/*_T1w.nii[.gz]; a participant without one keeps an empty path."""
    participants = read_table(str(folder / "participants.tsv"), "source.path (BIDS)", ids=[source.subject_column])
    if source.subject_column not in participants.columns:
        raise UserError(f"{folder}/participants.tsv: there is no column {source.subject_column!r}")
    rows: list[dict[str, Any]] = []
    for _, participant in participants.iterrows():
        label = str(participant[source.subject_column])
        label = label if label.startswith("sub-") else f"sub-{label}"
        images = sorted(
            image
            for pattern in ("anat/*_T1w.nii*", "ses-*/anat/*_T1w.nii*")
            for image in (folder / label).glob(pattern)
            # A label that is a path would find scans outside the folder; the table may be anyone's.
            if image.name.endswith((".nii", ".nii.gz")) and Path(label).name == label
        )
        values = {str(name): value for name, value in participant.to_dict().items()}
        for image in images:
            session = next((p.name for p in image.parents if p.name.startswith("ses-")), "")
            rows.append({**values, "image": str(image), "session": session})
        if not images:
            rows.append({**values, "image": "", "session": ""})
    return pd.DataFrame(rows)


def cohort_samples(table: pd.DataFrame, config: PrepareConfig, where: str) -> pd.DataFrame:
    """The samples table: sample_id, subject, split, image, mask, exclusion, covariates. Missing covariates stay missing."""
    if table.empty:
        raise UserError(f"{where}: the table has no rows")
    source = config.source
    columns = {name: source.columns.get(name, name) for name in config.covariates.names}
    absent = [column for column in [*columns.values(), *source.exclude] if column not in table.columns]
    if absent:
        raise UserError(
            f"{where}: missing column(s) {', '.join(absent)}; the table has {', '.join(map(str, table.columns))}"
        )
    unnamed = [row for row, gone in enumerate(table[source.subject_column].isna()) if gone]
    if unnamed:
        raise UserError(f"{where}: rows without {source.subject_column}: {', '.join(map(str, unnamed[:10]))}")
    subjects = table[source.subject_column].astype(str)
    samples = pd.DataFrame({"sample_id": _sample_ids(subjects, table), "subject": subjects.to_numpy()})
    samples["split"] = [split_of(s, config.split_seed, config.validation_fraction) for s in subjects]
    samples["image"] = table["image"].to_numpy()
    samples["mask"] = table["mask"].to_numpy() if "mask" in table else ""
    samples["excluded"] = [_exclusion(row, source.exclude) for _, row in table.iterrows()]
    for covariate in config.covariates.covariates:
        values = table[columns[covariate.name]]
        if covariate.kind != "continuous":
            values = values.map(label, na_action="ignore")
        samples[covariate.name] = values.to_numpy()
    return samples


def _sample_ids(subjects: pd.Series, table: pd.DataFrame) -> list[str]:
    """Letters and digits of subject (and session), unique."""
    sessions = table["session"].fillna("").astype(str) if "session" in table else pd.Series([""] * len(table))
    labels = [
        re.sub(r"[^A-Za-z0-9]", "", subject.removeprefix("sub-") + session)
        for subject, session in zip(subjects, sessions, strict=True)
    ]
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


def _exclusion(row: pd.Series, exclude: dict[str, tuple[str, ...]]) -> str:
    for column, values in exclude.items():
        if label(row[column]) in values:
            return f"excluded: {column} = {label(row[column])}"
    return ""


class CohortPreparer:
    """Makes shards of prepared scans."""

    def __init__(self, root: str, plan: Plan, config: PrepareConfig) -> None:
        self.plan, self.config = plan, config
        self.samples = read_samples(open_store(root), plan)

    def make(self, shard: ShardSpec) -> ShardOutput:
        """Load, check and conform the scans of one shard."""
        (voxels,) = empty_arrays(self.plan, shard)
        records = []
        for offset, row in enumerate(range(shard.start, shard.stop)):
            sample = self.samples.iloc[row]
            records.append(self._sample(sample, row, voxels, offset))
        return ShardOutput([voxels], records)

    def _sample(self, sample: pd.Series, row: int, voxels: npt.NDArray[Any], offset: int) -> SampleRecord:
        try:
            self._check_covariates(sample)
            if self.config.source.mask_column is not None and not sample["mask"]:
                raise ScanRejected("missing mask file")
            config = self.config
            image, facts = load_scan(
                sample["image"],
                sample["mask"],
                config.volume,
                config.center,
                config.max_file_mib,
                config.intensity_rule,
            )
            low, high = config.intensity_percentiles
            robust = config.intensity_rule == "robust"
            scaled = robust_white(image, high) if robust else scale_intensities(image, (low, high))
            voxels[offset] = self.plan.volume.quantise(scaled)
        except ScanRejected as error:
            return SampleRecord(sample_id=sample["sample_id"], row=row, status="rejected", reason=str(error))
        return describe_sample(sample["sample_id"], row, [voxels[offset]], facts)

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
