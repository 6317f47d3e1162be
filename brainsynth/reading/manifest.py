"""What a reader knows of a dataset: its manifest and its rows, of a finished dataset or of what is committed so far."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from brainsynth.errors import OtherVersion, other_version
from brainsynth.reading.cache import Cache
from brainsynth.reading.files import read_file
from brainsynth.storage.tsv import tsv_lines
from brainsynth.storage.untrusted import plain_json

if TYPE_CHECKING:
    from brainsynth.manifest import SampleRecord

_SCHEMA = "DatasetManifest/1"
_FIELDS = {"schema_version", "arrays", "affine", "covariates", "kinds", "units", "files"}


def finished(uri: str, cache: str | None = None) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """The manifest of a finished dataset and the lines of its participants.tsv, which the folder `cache` may keep.

    Raises:
        FileNotFoundError: it is not finished.
        ValueError: either is damaged, or of another version (OtherVersion).
    """
    manifest = _read_manifest(uri)
    digest = manifest["files"]["participants.tsv"]
    kept = None if cache is None else Cache(cache, manifest["shards_digest"])
    data = kept.get(digest) if kept else None
    fresh = data is None
    data = read_file(uri, "participants.tsv") if data is None else data
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"{uri}/participants.tsv is not the table that dataset.json names; run the job again")
    if kept and fresh:
        kept.put(digest, data)
    return manifest, tsv_lines(data)


def committed(uri: str) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """The same of the shards that have a commit record now, while others may still be made. Needs pandas and pyarrow.

    Raises UserError where there is no dataset, or a record is damaged.
    """
    from brainsynth.records import to_dict
    from brainsynth.storage.commit import committed_of, read_commits, read_plan, read_samples
    from brainsynth.storage.filesystem import open_store
    from brainsynth.storage.finalise import planned_facts

    store = open_store(uri)
    plan = read_plan(store)
    samples = read_samples(store, plan)
    commits = read_commits(store, plan, sorted(committed_of(store, plan)))
    made: dict[Any, SampleRecord] = {sample.row: sample for commit in commits for sample in commit.samples}
    measured = [label.column for label in plan.structures]
    columns = ["sample_id", *(["split"] if "split" in samples else []), *plan.covariates.names]
    lines = []
    for row, values in samples.loc[sorted(made), columns].iterrows():
        texts = {str(name): "n/a" if value is None or value != value else str(value) for name, value in values.items()}
        texts |= {name: str(made[row].extra.get(name, "n/a")) for name in measured}
        lines.append(
            {"participant_id": f"sub-{texts.pop('sample_id')}", "row": str(row), "status": made[row].status} | texts
        )
    labelled = {} if plan.labels is None else {"labels": to_dict(plan.labels)}
    return planned_facts(plan) | labelled, lines


def _read_manifest(uri: str) -> dict[str, Any]:
    try:
        data = read_file(uri, "dataset.json")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no finished dataset at {uri}: dataset.json is missing (run the job that makes it again to resume; "
            "open_dataset(…, partial=True) reads what is committed so far)"
        ) from None
    try:
        sealed = plain_json(data, "dataset.json")
        record: dict[str, Any] = sealed["record"]
        # As records.digest does, which needs pydantic.
        content = {"record": record, "schema": sealed["schema"]} if "schema" in sealed else record
        body = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
        if hashlib.sha256(body).hexdigest() != sealed["sha256"]:
            raise ValueError("digest")
        if sealed.get("schema", _SCHEMA) != _SCHEMA:
            raise other_version(f"{uri}/dataset.json", sealed["schema"], _SCHEMA)
        if not isinstance(record, dict) or _FIELDS - set(record):
            raise ValueError("fields")
    except OtherVersion:
        raise
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{uri}/dataset.json is damaged; run the job that made it again") from None
    if record.get("schema_version") != 1:
        raise ValueError(f"{uri} has schema version {record.get('schema_version')}; this brainsynth reads version 1")
    return record
