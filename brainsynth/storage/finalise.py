"""Compile the manifest of a finished dataset from its commit records: a pure fold, repeated at will."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd

from brainsynth.errors import UserError
from brainsynth.manifest import DatasetManifest, ShardManifest
from brainsynth.plan import Plan
from brainsynth.records import canonical_json, seal, to_dict
from brainsynth.storage.arrays import GROUP, metadata_keys
from brainsynth.storage.commit import commit_key, read_commit, read_samples
from brainsynth.storage.filesystem import TEMPORARY_PREFIX, Store

DATASET_KEY = "dataset.json"
SUBJECTS_KEY = "manifest/subjects.parquet"
SHARDS_KEY = "manifest/shards.parquet"


def finalise(store: Store, plan: Plan, progress: Callable[[int, int], None] | None = None) -> DatasetManifest:
    """Write the manifest tables, BIDS tables, card and last dataset.json.

    Raises:
        UserError: when shards are still missing, or planned ≠ ok + rejected + failed.
    """
    samples = read_samples(store, plan)
    subjects, shards = _fold(_commits(store, plan, progress))
    _sweep(store)
    if list(subjects["sample_id"]) != list(samples["sample_id"]):
        raise UserError(f"{store.uri}: the commit records do not list the planned samples in order; run verify")
    counts = {status: int((subjects["status"] == status).sum()) for status in ("ok", "rejected", "failed")}
    if sum(counts.values()) != plan.num_samples:
        raise UserError(f"{store.uri}: {plan.num_samples} planned, but {counts} accounted for; run verify")
    table = pd.concat([samples, subjects.drop(columns="sample_id")], axis=1)
    names = list(plan.covariates.names)
    participants = pd.DataFrame({"participant_id": "sub-" + table["sample_id"], "row": table["row"]})
    participants["status"] = table["status"]
    if "split" in table:
        participants["split"] = table["split"]
    participants = pd.concat([participants, table[names]], axis=1)
    files = {
        SUBJECTS_KEY: _parquet(table),
        SHARDS_KEY: _parquet(shards),
        "participants.tsv": participants.to_csv(sep="\t", index=False, na_rep="n/a").encode(),
        "participants.json": _pretty(_participants_sidecar(plan)),
        "dataset_description.json": _pretty(_bids_description(plan)),
        "README.md": _card(plan, counts).encode(),
    }
    rejected = table[table["status"] != "ok"]
    if len(rejected):
        columns = [c for c in ("sample_id", "row", "status", "reason", "image", *names) if c in rejected]
        files["rejects.tsv"] = rejected[columns].to_csv(sep="\t", index=False, na_rep="n/a").encode()
    for key, data in files.items():
        store.write(key, data)
    for key in metadata_keys(plan):
        files[key] = store.read(key)
    manifest = DatasetManifest(
        kind=plan.kind,
        plan_fingerprint=plan.fingerprint,
        num_samples=plan.num_samples,
        num_ok=counts["ok"],
        num_rejected=counts["rejected"],
        num_failed=counts["failed"],
        arrays=tuple(array.name for array in plan.arrays),
        covariates=plan.covariates.names,
        kinds={c.name: c.kind for c in plan.covariates.covariates},
        units={c.name: c.unit for c in plan.covariates.covariates},
        affine=tuple(tuple(float(v) for v in row) for row in plan.volume.affine),
        spacing_mm=plan.volume.spacing_mm,
        dtype=plan.volume.dtype,
        shards_digest=dataset_digest(shards, subjects),
        files={key: hashlib.sha256(data).hexdigest() for key, data in files.items()},
        facts=plan.identity,
        synthetic=plan.kind == "generated",
    )
    store.write(DATASET_KEY, seal(manifest))
    return manifest


def _sweep(store: Store) -> None:
    """Remove what writers that were killed left half-written; a live one has lost its race by now and notices."""
    for folder in (GROUP, "commits"):
        for key in [key for key, _ in store.list(folder) if key.rsplit("/", 1)[-1].startswith(TEMPORARY_PREFIX)]:
            store.delete(key)


def dataset_digest(shards: pd.DataFrame, subjects: pd.DataFrame) -> str:
    """sha256 over every object's and every sample's digest, in order: equal for equal data, however it was made."""
    body = {
        "objects": shards[["key", "sha256"]].to_numpy().tolist(),
        "samples": subjects[["sample_id", "status", "voxel_sha256"]].to_numpy().tolist(),
    }
    return hashlib.sha256(canonical_json(body)).hexdigest()


def _commits(store: Store, plan: Plan, progress: Callable[[int, int], None] | None) -> Iterator[ShardManifest]:
    for shard in range(plan.num_shards):
        try:
            yield read_commit(store, plan, shard)
        except FileNotFoundError:
            raise UserError(
                f"{store.uri} is not finished: {commit_key(shard)} is missing; run the same command again to resume"
            ) from None
        if progress:
            progress(shard + 1, plan.num_shards)


def _fold(commits: Iterator[ShardManifest]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row a sample, and one row an object."""
    samples: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for commit in commits:
        for sample in commit.samples:
            row = to_dict(sample)
            row["extra"] = json.dumps(row["extra"], sort_keys=True)
            samples.append({**row, "shard": commit.shard})
        for stored in commit.objects:
            objects.append(
                {"shard": commit.shard, **to_dict(stored), "runtime": json.dumps(commit.runtime, sort_keys=True)}
            )
    return pd.DataFrame(samples), pd.DataFrame(objects)


def _parquet(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()


def _pretty(document: Any) -> bytes:
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()


def _participants_sidecar(plan: Plan) -> dict[str, Any]:
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
    return columns


def _bids_description(plan: Plan) -> dict[str, Any]:
    what = {
        "generated": "Synthetic T1w brain MRI",
        "prepared": "Prepared T1w brain MRI",
        "latents": "Latents of T1w MRI",
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
        "Every volume is SYNTHETIC: made by a generative model, of no real person. Not for diagnosis.\n"
        if plan.kind == "generated"
        else "These volumes come from the cohort named in plan.json; its terms apply.\n"
    )
    names = ", ".join(f"{c.name} [{c.unit or '/'.join(c.categories)}]" for c in plan.covariates.covariates)
    return (
        f"# brainsynth dataset ({plan.kind})\n\n{warning}\n"
        f"- {counts['ok']} volumes of {'×'.join(map(str, shape))} at {'×'.join(f'{s:g}' for s in spacing)} mm, axes RAS+, "
        f"intensities in [0, 1]; {counts['rejected']} rejected, {counts['failed']} failed (rejects.tsv)\n"
        f"- covariates: {names}\n- plan {plan.fingerprint}\n\n"
        '```python\nimport brainsynth\ndataset = brainsynth.open_dataset("<this folder>")\n'
        'sample = dataset[0]          # sample["image"]: float32 (X, Y, Z), sample["age"], …\n```\n'
    )
