"""Compile the manifest of a finished dataset from its commit records: a pure fold, repeated at will."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from brainsynth.errors import UserError
from brainsynth.manifest import DatasetManifest, ShardManifest
from brainsynth.plan import Plan
from brainsynth.records import seal, to_dict
from brainsynth.storage import attempts
from brainsynth.storage.arrays import GROUP, metadata_keys
from brainsynth.storage.commit import commit_key, each_commit, read_samples
from brainsynth.storage.filesystem import Store
from brainsynth.storage.leftovers import COMMITS, is_temporary
from brainsynth.storage.tsv import tsv_text

DATASET_KEY = "dataset.json"
SUBJECTS_KEY = "manifest/subjects.parquet"
SHARDS_KEY = "manifest/shards.parquet"
REJECTS_KEY = "rejects.tsv"
DSEG_KEY = "dseg.tsv"
_TABLES = (
    SUBJECTS_KEY,
    SHARDS_KEY,
    REJECTS_KEY,
    DSEG_KEY,
    "participants.tsv",
    "participants.json",
    "dataset_description.json",
    "README.md",
)
BLOCK_ROWS = 8192
_FIGURES = ("minimum", "maximum", "mean", "std", "p01", "p99", "zero_fraction")
_SUBJECT_FIELDS = [
    pa.field("row", pa.int64()),
    *(pa.field(name, pa.string()) for name in ("status", "reason", "voxel_sha256")),
    *(pa.field(name, pa.float64()) for name in _FIGURES),
    pa.field("extra", pa.string()),
    pa.field("shard", pa.int64()),
]
_GATE_FIELDS = [
    pa.field("gate_attempts", pa.int64()),
    pa.field("gate_score", pa.float64()),
    pa.field("gate_check", pa.string()),
    pa.field("gate_refused", pa.string()),
]
_SHARD_FIELDS = [
    pa.field("shard", pa.int64()),
    pa.field("array", pa.string()),
    pa.field("key", pa.string()),
    pa.field("size_bytes", pa.int64()),
    pa.field("sha256", pa.string()),
    pa.field("runtime", pa.string()),
]


def finalise(store: Store, plan: Plan, progress: Callable[[int, int], None] | None = None) -> DatasetManifest:
    """Write the manifest tables, BIDS tables, card and last dataset.json.

    The records are folded one by one: apart from the tables themselves, memory does not grow with the dataset.

    Raises:
        UserError: when shards are still missing, or planned ≠ ok + rejected + failed.
    """
    fold = _Fold(store, plan, read_samples(store, plan))
    for shard, read in each_commit(store, plan):
        try:
            fold.add(read())
        except FileNotFoundError:
            raise UserError(
                f"{store.uri} is not finished: {commit_key(shard)} is missing; run the same command again to resume"
            ) from None
        if progress:
            progress(shard + 1, plan.num_shards)
    fold.flush()
    counts = fold.counts
    if sum(counts.values()) != plan.num_samples:
        raise UserError(f"{store.uri}: {plan.num_samples} planned, but {counts} accounted for; run verify")
    _sweep(store)
    files = {
        SUBJECTS_KEY: fold.subjects.close(),
        SHARDS_KEY: fold.shards.close(),
        "participants.tsv": fold.participants.getvalue().encode(),
        "participants.json": pretty_json(participants_sidecar(plan)),
        "dataset_description.json": pretty_json(_bids_description(plan)),
        "README.md": _card(plan, counts).encode(),
    }
    if plan.labels is not None:
        files[DSEG_KEY] = plan.labels.tsv()
    if fold.rejects.tell():
        files[REJECTS_KEY] = fold.rejects.getvalue().encode()
    else:
        store.delete(REJECTS_KEY)  # of a time when there were some
    for key, data in files.items():
        store.write(key, data)
    for key in metadata_keys(plan):
        files[key] = store.read(key)
    manifest = DatasetManifest(
        **planned_facts(plan),
        num_ok=counts["ok"],
        num_rejected=counts["rejected"],
        num_failed=counts["failed"],
        shards_digest=fold.digest.hexdigest(),
        files={key: hashlib.sha256(data).hexdigest() for key, data in files.items()},
    )
    store.write(DATASET_KEY, seal(manifest))
    return manifest


def planned_facts(plan: Plan) -> dict[str, Any]:
    """The fields of a dataset's manifest that its plan determines."""
    return {
        "kind": plan.kind,
        "plan_fingerprint": plan.fingerprint,
        "num_samples": plan.num_samples,
        "arrays": tuple(array.name for array in plan.arrays),
        "covariates": plan.covariates.names,
        "kinds": {c.name: c.kind for c in plan.covariates.covariates},
        "units": {c.name: c.unit for c in plan.covariates.covariates},
        "affine": tuple(tuple(float(v) for v in row) for row in plan.volume.affine),
        "spacing_mm": plan.volume.spacing_mm,
        "dtype": plan.volume.dtype,
        "facts": plan.identity,
        "synthetic": plan.kind == "generated",
        **({} if plan.labels is None else {"labels": plan.labels}),
        **({"derived_from_person": True} if plan.derived_from_person else {}),
    }


def is_table(key: str, plan: Plan) -> bool:
    """True for the keys that dataset.json may name: a foreign one must not make a reader open other files."""
    return key in (*_TABLES, *metadata_keys(plan))


def _sweep(store: Store) -> None:
    """Remove what writers that were killed left half-written; a live one has lost its race by now and notices."""
    for folder in (GROUP, COMMITS, attempts.FOLDER):
        for key in [key for key, _ in store.list(folder)]:
            if folder == attempts.FOLDER or is_temporary(key):
                store.delete(key)


class _Fold:
    """The tables of a dataset, grown from its commit records in order."""

    def __init__(self, store: Store, plan: Plan, samples: pd.DataFrame) -> None:
        self.store, self.plan, self.samples = store, plan, samples
        self.counts = {"ok": 0, "rejected": 0, "failed": 0}
        self.digest = hashlib.sha256()
        """Over every object's and every sample's digest, in order: equal for equal data, however it was made."""
        planned = pa.Schema.from_pandas(samples, preserve_index=False)
        measured = [*_gate_fields(plan), *_label_fields(plan)]
        self.measured_names = [field.name for field in measured]
        self.subjects = _Parquet(pa.schema([*planned, *_SUBJECT_FIELDS, *measured]))
        self.shards = _Parquet(pa.schema(_SHARD_FIELDS))
        self.participants, self.rejects = io.StringIO(), io.StringIO()
        self._rows: list[dict[str, Any]] = []
        self._objects: list[dict[str, Any]] = []
        self._done = 0

    def add(self, commit: ShardManifest) -> None:
        """One more shard. Raises UserError when it does not hold the planned samples."""
        shard = self.plan.shard(commit.shard)
        planned = self.samples["sample_id"].iloc[shard.start : shard.stop]
        if [sample.sample_id for sample in commit.samples] != list(planned):
            raise UserError(
                f"{self.store.uri}: the commit records do not list the planned samples in order; run verify"
            )
        for stored in commit.objects:
            self.digest.update(f"object {stored.key} {stored.sha256}\n".encode())
            runtime = json.dumps(commit.runtime, sort_keys=True)
            self._objects.append({"shard": commit.shard, **to_dict(stored), "runtime": runtime})
        for sample in commit.samples:
            self.counts[sample.status] += 1
            self.digest.update(f"sample {sample.sample_id} {sample.status} {sample.voxel_sha256}\n".encode())
            row = to_dict(sample)
            row |= {name: sample.extra.get(name) for name in self.measured_names}
            row["extra"] = json.dumps(row["extra"], sort_keys=True)
            self._rows.append({**row, "shard": commit.shard})
        if len(self._rows) >= BLOCK_ROWS:
            self.flush()

    def flush(self) -> None:
        """Turn what has gathered into rows of the tables."""
        if not self._rows:
            return
        planned = self.samples.iloc[self._done : self._done + len(self._rows)].reset_index(drop=True)
        table = pd.concat([planned, pd.DataFrame(self._rows).drop(columns="sample_id")], axis=1)
        first, self._done = self._done == 0, self._done + len(table)
        self.subjects.write(table)
        self.shards.write(pd.DataFrame(self._objects))
        self._rows, self._objects = [], []
        names = list(self.plan.covariates.names)
        participants = pd.DataFrame({"participant_id": "sub-" + table["sample_id"], "row": table["row"]})
        others = ["status", *(["split"] if "split" in table else []), *names]
        others += [field.name for field in _label_fields(self.plan)]
        participants = pd.concat([participants, table[others]], axis=1)
        self.participants.write(tsv_text(participants, header=first))
        rejected = table[table["status"] != "ok"]
        if len(rejected):
            columns = [c for c in ("sample_id", "row", "status", "reason", "image", *names) if c in rejected]
            header = not self.rejects.tell()
            self.rejects.write(tsv_text(rejected[columns], header=header))


def _gate_fields(plan: Plan) -> list[pa.Field]:
    """Columns of a dataset that was made with a quality gate; null where a row has none (it failed)."""
    if "gate" not in plan.identity:
        return []
    measures = [pa.field(f"measured_{name}", pa.float64()) for name in plan.identity["gate"]["measures"]]
    return [*_GATE_FIELDS, *measures]


def _label_fields(plan: Plan) -> list[pa.Field]:
    """Columns of a dataset with label maps: the volume of each structure in ml; null where a row has no label map."""
    return [pa.field(label.column, pa.float64()) for label in plan.structures]


class _Parquet:
    """A Parquet file in memory that grows block by block."""

    def __init__(self, schema: pa.Schema) -> None:
        self.schema, self.buffer = schema, io.BytesIO()
        self.writer = pq.ParquetWriter(self.buffer, schema, compression="zstd")

    def write(self, table: pd.DataFrame) -> None:
        """Append rows."""
        self.writer.write_table(pa.Table.from_pandas(table, schema=self.schema, preserve_index=False))

    def close(self) -> bytes:
        """The finished file."""
        self.writer.close()
        return self.buffer.getvalue()


def pretty_json(document: Any) -> bytes:
    """JSON that a person reads, UTF-8, with a last line feed."""
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()


def participants_sidecar(plan: Plan) -> dict[str, Any]:
    """participants.json: what each column of participants.tsv means, with units."""
    columns: dict[str, Any] = {
        "row": {"Description": "Index of the subject's volume along the first axis of every array"},
        "status": {"Description": "ok: the volume is there; rejected or failed: it is not, see rejects.tsv"},
    }
    for c in plan.covariates.covariates:
        entry: dict[str, Any] = {"Description": c.description or c.name}
        if c.unit:
            entry["Units"] = c.unit
        if c.categories:
            entry["Levels"] = {level: level for level in c.categories}
        else:
            entry["Range"] = [c.low, c.high]
        columns[c.name] = entry
    for label in plan.structures:
        text = f"Volume of {label.name}, its voxels in the label map counted"
        columns[label.column] = {"Description": text, "Units": "ml"}
    return columns


def _bids_description(plan: Plan) -> dict[str, Any]:
    what = {
        "generated": "Synthetic T1w brain MRI",
        "prepared": "Prepared T1w brain MRI",
        "latents": "Latents of T1w MRI",
        "measurements": "Measurements of T1w MRI",
    }
    return {
        "Name": what[plan.kind],
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "brainsynth", "Description": f"plan {plan.fingerprint}"}],
    }


def _card(plan: Plan, counts: dict[str, int]) -> str:
    shape, spacing = plan.arrays[0].sample_shape, plan.volume.spacing_mm
    warning = (
        f"Every volume is SYNTHETIC: made by a generative model, {plan.whose}. Not for diagnosis.\n"
        if plan.kind == "generated"
        else "These volumes come from the cohort named in plan.json; its terms apply.\n"
    )
    names = ", ".join(f"{c.name} [{c.unit or '/'.join(c.categories)}]" for c in plan.covariates.covariates)
    reasons = f" (the reasons: {REJECTS_KEY})" if counts["rejected"] + counts["failed"] else ""
    return (
        f"# brainsynth dataset ({plan.kind})\n\n{warning}\n"
        f"- {counts['ok']} volumes of {'×'.join(map(str, shape))} at {'×'.join(f'{s:g}' for s in spacing)} mm, axes RAS+, "
        f"intensities in [0, 1]; {counts['rejected']} rejected, {counts['failed']} failed{reasons}\n"
        f"- covariates: {names}\n{_labels_line(plan)}- plan {plan.fingerprint}\n\n"
        '```python\nimport brainsynth\ndataset = brainsynth.open_dataset("<this folder>")\n'
        'sample = dataset[0]          # sample["image"]: float32 (X, Y, Z), sample["age"], …\n```\n'
    )


def _labels_line(plan: Plan) -> str:
    if plan.labels is None:
        return ""
    return (
        f"- a label map of each volume, {len(plan.labels.labels)} structures ({DSEG_KEY}), by {plan.labels.source}: "
        '`sample["labels"]`, uint8 (X, Y, Z)\n'
    )
