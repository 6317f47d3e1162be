"""A verified, audited dataset → a folder to publish: data, cards, descriptions, checksums. All or nothing."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import io
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from brainsynth.audit.verdict import AUDIT_KEY, AuditRecord, read_audit
from brainsynth.bundle.generator import ModelSpec, model_spec
from brainsynth.cards import pages
from brainsynth.cards.croissant import croissant
from brainsynth.cards.facts import PREVIEW_KEY, AuditSummary, Facts, ReleasedFile
from brainsynth.cards.ro_crate import ro_crate
from brainsynth.config.release import ReleaseConfig
from brainsynth.errors import UserError, problems_error
from brainsynth.evaluation.evaluation_report import JUDGED
from brainsynth.evaluation.evaluation_report import NUMBERS_KEY as EVALUATION_KEY
from brainsynth.export.plan import EXPORT_KEY, plan_export, read_model
from brainsynth.export.preview import preview
from brainsynth.export.run import FILES_FOLDER
from brainsynth.export.tables import tables
from brainsynth.manifest import MODEL_KEY, DatasetManifest, ModelRecord, for_publication
from brainsynth.metrics.finding import Finding
from brainsynth.plan import Plan
from brainsynth.records import from_dict, seal, unseal
from brainsynth.stages.export import run_export
from brainsynth.stages.released import SIGNATURE_KEY, SUMS, ReleaseRecord, signing_key
from brainsynth.stages.verify import RELEASE_KEY
from brainsynth.storage import measured as quality
from brainsynth.storage.arrays import metadata_keys, shard_key
from brainsynth.storage.commit import PLAN_KEY, SAMPLES_KEY, commit_key, read_commits, read_plan
from brainsynth.storage.filesystem import LocalStore, Store, check_apart, local_folder, open_store, resolve_uri
from brainsynth.storage.finalise import DATASET_KEY, SHARDS_KEY, SUBJECTS_KEY, finalise, pretty_json
from brainsynth.storage.keys import only_of_desktop
from brainsynth.storage.verify import VerifyReport, verify_dataset
from brainsynth.storage.whole_file import file_sha256, whole_folder

log = logging.getLogger(__name__)
MAX_FILES, MAX_FOLDER, MAX_BYTES = 100_000, 10_000, 20 << 30
"""What Hugging Face asks of a repository; Zenodo and others are narrower, and docs/publication.md says how to fit them."""
_BIDS_IGNORE = (
    "data\n/data/**\ncroissant.json\nro-crate-metadata.json\nrelease.json\nSHA256SUMS\nMODEL_CARD.md\n"
    f"{SIGNATURE_KEY}\n{PREVIEW_KEY}\n"
)


class Checked(NamedTuple):
    """What a release is made of, once nothing is left to refuse but the data itself."""

    plan: Plan
    manifest: DatasetManifest
    model: ModelRecord
    bundle: ModelSpec
    audit: AuditRecord
    findings: tuple[Finding, ...]


def check_release(config: ReleaseConfig) -> Checked:
    """All that can be refused before the data is read. Raises UserError that lists every problem."""
    output = local_folder(config.output, "output")
    check_apart(resolve_uri(config.dataset, "dataset"), output, "output")
    if output.exists() and any(output.iterdir()):
        desktop = ", ".join(only_of_desktop(output))
        held = f" (it holds only {desktop}, which a desktop left: delete it)" if desktop else ""
        raise UserError(f"output: {output} is not empty{held}; a release goes to a new folder")
    store = open_store(resolve_uri(config.dataset, "dataset"))
    plan = read_plan(store)
    if plan.kind != "generated":
        raise UserError(f"dataset: {config.dataset} holds {plan.kind} data; only generated datasets are released")
    if plan.derived_from_person:
        raise UserError(f"dataset: {config.dataset} is derived from a real person's scan: it is not released")
    try:
        manifest = unseal(DatasetManifest, store.read(DATASET_KEY), f"{store.uri}/{DATASET_KEY}")
    except FileNotFoundError:
        raise UserError(f"dataset: {config.dataset} is not finished; run its job again to finish it") from None
    bundle = model_spec(config.bundle, plan.identity.get("options"))
    audit = read_audit(open_store(resolve_uri(config.audit, "audit")))
    problems = []
    if manifest.plan_fingerprint != plan.fingerprint:
        problems.append("dataset: dataset.json belongs to another plan than plan.json; run `brainsynth verify`")
    if bundle.digest != plan.identity["bundle"]:
        problems.append(f"bundle: {config.bundle} is not the bundle that made {config.dataset}")
    if audit.dataset_shards_digest != manifest.shards_digest:
        problems.append(
            f"audit: {config.audit} judged another dataset, or another state of it; run `brainsynth audit` again"
        )
    elif audit.bundle_digest != plan.identity["bundle"]:
        problems.append(
            f"audit: {config.audit} was made with another bundle; run `brainsynth audit` again with this one"
        )
    if not audit.passed:
        problems.append(f"audit: verdict {audit.verdict}: {'; '.join(audit.reasons)}")
    if not manifest.num_ok:
        problems.append("dataset: it has no volume")
    problems += _too_large(config, plan, manifest)
    model = read_model(store, plan)
    if model is None:
        problems.append(f"dataset: {MODEL_KEY} is missing, so the terms of its model are not known; run its job again")
    if problems or model is None:
        raise problems_error(f"{config.dataset} cannot be released", problems)
    findings = _findings(config, manifest) if config.evaluation else ()
    if config.signing_key:
        signing_key(config.signing_key)
    return Checked(plan, manifest, model, bundle, audit, findings)


def _findings(config: ReleaseConfig, manifest: DatasetManifest) -> tuple[Finding, ...]:
    """The verdict table of an evaluation. Raises UserError where it is not of this state of the dataset."""
    where = f"{config.evaluation}/{EVALUATION_KEY}"
    try:
        report = json.loads(open_store(resolve_uri(config.evaluation, "evaluation")).read(EVALUATION_KEY))
        digest, lines = report["facts"][JUDGED], [dict(line) for line in report["findings"]]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        raise UserError(f"evaluation: {where} is not a report of `brainsynth evaluate`, or an older one") from None
    if digest != manifest.shards_digest:
        raise UserError(f"evaluation: {where} is of another dataset, or another state of it; run it again")
    return tuple(from_dict(Finding, {k: v for k, v in line.items() if k != "as_real"}, where) for line in lines)


def describe(config: ReleaseConfig) -> str:
    """What would be released, as far as it can be known without reading the data."""
    checked = check_release(config)
    return (
        f"{checked.manifest.num_ok} volumes of {config.dataset} (model {checked.bundle.name}) as {config.data}, licence "
        f"{config.licence} → {config.output}\naudit: {checked.audit.verdict}; verify is run before anything is written"
    )


def run(config: ReleaseConfig) -> ReleaseRecord:
    """Verify, then write the release. Raises UserError, with nothing written, where anything is not as it must be."""
    checked = check_release(config)
    uri, output = resolve_uri(config.dataset, "dataset"), local_folder(config.output, "output")
    store = open_store(uri)
    log.info("verify: everything is read back")
    report = verify_dataset(store)
    if not report.ok:
        raise UserError(f"{uri} cannot be released:\n{report.summary()}")
    with whole_folder(output) as folder:
        described = _bids(uri, folder) if config.data == "bids" else _zarr(store, uri, folder, checked)
        # Authors, licence and DOI are in CITATION.cff; BIDS wants them in one place.
        described = {k: v for k, v in described.items() if k != "License"} | {"Name": config.title}
        described["Acknowledgements"] = config.source_terms
        if config.preview:
            (folder / PREVIEW_KEY).write_bytes(preview(uri, config.preview))
        _put(folder, "dataset_description.json", pretty_json(described).decode())
        _put(folder, ".bidsignore", _BIDS_IGNORE)
        facts = _facts(config, store, checked, report, _files(folder))
        _documents(folder, facts)
        files = _files(folder)
        _put(folder, SUMS, "".join(f"{file.sha256}  {file.path}\n" for file in files))
        done = ReleaseRecord(
            config=dataclasses.replace(
                config, dataset="", bundle="", audit="", output="", evaluation="", signing_key=""
            ),
            plan_fingerprint=checked.plan.fingerprint,
            shards_digest=checked.manifest.shards_digest,
            bundle=checked.bundle.digest,
            verified=facts.verified,
            audit=facts.audit,
            files=len(files) + (3 if config.signing_key else 2),
            size_bytes=sum(file.size_bytes for file in files),
            sums_sha256=file_sha256(folder / SUMS),
        )
        sealed = seal(done)
        (folder / RELEASE_KEY).write_bytes(sealed)
        if config.signing_key:
            (folder / SIGNATURE_KEY).write_bytes(signing_key(config.signing_key).sign(sealed))
    print(
        f"{config.output}: {done.files} files, {done.size_bytes / 1e6:.1f} MB; check them with `sha256sum -c SHA256SUMS`"
    )
    return done


def _documents(folder: Path, facts: Facts) -> None:
    _put(folder, "README.md", pages.dataset_card(facts))
    _put(folder, "MODEL_CARD.md", pages.model_card(facts))
    _put(folder, "LICENSE", pages.licence_page(facts))
    _put(folder, "CITATION.cff", pages.citation_file(facts))
    _put(folder, "croissant.json", pretty_json(croissant(facts)).decode())
    _put(folder, "ro-crate-metadata.json", pretty_json(ro_crate(facts)).decode())


def _zarr(store: Store, uri: str, folder: Path, checked: Checked) -> dict[str, Any]:
    """The dataset under data/, and the participants' tables next to it. What describes machines and folders is left out:

    reports whole; in commit records that part, and the tables that are compiled from them are compiled again.
    """
    plan, published = checked.plan, LocalStore(folder / "data")
    for key in _keys(store, plan):
        target = published.path / key
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(store, LocalStore):
            try:
                os.link(store.path / key, target)  # no file of a dataset is ever changed in place
            except OSError:
                shutil.copyfile(store.path / key, target)
        else:
            target.write_bytes(store.read(key))
    for commit in read_commits(store, plan):
        published.write(commit_key(commit.shard), seal(for_publication(commit)))
    if finalise(published, plan).shards_digest != checked.manifest.shards_digest:
        raise UserError(f"{uri} was changed while it was being released; run the same command again")
    export = plan_export(uri, str(folder / "bids"), "bids")  # for its tables; nothing is written there
    bids = tables(export, export.subjects)
    for name in ("participants.tsv", "participants.json"):
        (folder / name).write_bytes(bids[name])
    described: dict[str, Any] = json.loads(bids["dataset_description.json"])
    return described


def _keys(store: Store, plan: Plan) -> Iterator[str]:
    """What is released as it is."""
    yield from (PLAN_KEY, SAMPLES_KEY, MODEL_KEY, *metadata_keys(plan))
    for shard in range(plan.num_shards):
        yield from (shard_key(array, shard) for array in plan.arrays)
    yield from (key for key, _ in store.list(quality.FOLDER) if quality.is_measured(key))


def _bids(uri: str, folder: Path) -> dict[str, Any]:
    """Every volume as NIfTI, with the tables of BIDS."""
    run_export(plan_export(uri, str(folder), "bids"))
    (folder / EXPORT_KEY).unlink()
    shutil.rmtree(folder / FILES_FOLDER)
    described: dict[str, Any] = json.loads((folder / "dataset_description.json").read_bytes())
    return described


def _facts(
    config: ReleaseConfig, store: Store, checked: Checked, report: VerifyReport, files: list[ReleasedFile]
) -> Facts:
    runtime = [json.loads(text) for text in pd.read_parquet(io.BytesIO(store.read(SHARDS_KEY)))["runtime"]]
    times = [float(entry["began_at"]) for entry in runtime if "began_at" in entry] or [0.0]
    subjects = pd.read_parquet(io.BytesIO(store.read(SUBJECTS_KEY)), columns=["extrapolated"])
    return Facts(
        config=config,
        plan=checked.plan,
        manifest=checked.manifest,
        model=checked.model,
        bundle=checked.bundle,
        audit=_summary(config, checked.audit),
        verified=report.summary().splitlines()[0],
        findings=checked.findings,
        extrapolated=int(subjects["extrapolated"].sum()),
        began=_utc(min(times)),
        ended=_utc(max(times)),
        files=tuple(files),
    )


def _summary(config: ReleaseConfig, audit: AuditRecord) -> AuditSummary:
    sealed = open_store(resolve_uri(config.audit, "audit")).read(AUDIT_KEY)
    copies, membership, replay = audit.copies, audit.membership, audit.replay
    return AuditSummary(
        verdict=audit.verdict,
        record_sha256=hashlib.sha256(sealed).hexdigest(),
        volumes=audit.volumes,
        training_people=audit.training_people,
        held_out_people=audit.held_out_people,
        false_alarm_rate=audit.false_alarm_rate,
        level=audit.level,
        flagged=copies.flagged,
        flagged_expected=copies.flagged_expected,
        outright_copies=copies.outright,
        membership_auc=membership.auc.value,
        membership_control=(membership.control_auc_low, membership.control_auc_high),
        membership_p_value=membership.p_value,
        tuples_replayed=replay.training_tuples_replayed,
        training_tuples=replay.training_tuples,
        brainsynth_version=audit.versions.get("brainsynth", ""),
    )


def _too_large(config: ReleaseConfig, plan: Plan, manifest: DatasetManifest) -> list[str]:
    """Why hubs would not take it, by counts that are known beforehand."""
    volumes = config.data == "bids"
    files = manifest.num_ok + 20 if volumes else 2 * plan.num_shards + 40
    folder = manifest.num_ok if volumes else plan.num_shards
    largest = plan.raw_bytes() // (plan.num_samples if volumes else plan.num_shards)
    fix = "release it as zarr" if volumes else "generate it with a larger samples_per_shard"
    problems = []
    if files > MAX_FILES or folder > MAX_FOLDER:
        problems.append(f"about {files} files, {folder} in one folder; hubs take {MAX_FILES} and {MAX_FOLDER}: {fix}")
    if largest > MAX_BYTES:
        problems.append(
            f"objects of up to {largest / 1e9:.0f} GB; hubs take {MAX_BYTES / 1e9:.0f}: use a smaller samples_per_shard"
        )
    return problems


def _files(folder: Path) -> list[ReleasedFile]:
    """Every file there, by path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    counts = Counter(path.parent for path in paths)
    log.info("%d files, at most %d in a folder: digests", len(paths), max(counts.values()))
    return [
        ReleasedFile(path=p.relative_to(folder).as_posix(), size_bytes=p.stat().st_size, sha256=file_sha256(p))
        for p in paths
    ]


def _put(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="utf-8")


def _utc(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
