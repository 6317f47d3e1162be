"""Read everything back and compare: names each missing, corrupt or unexpected object."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np

from brainsynth.errors import UserError
from brainsynth.manifest import DatasetManifest, ShardManifest, describe_sample
from brainsynth.plan import Plan
from brainsynth.records import record, unseal
from brainsynth.storage.arrays import decode_shard, metadata_keys, shard_key
from brainsynth.storage.commit import PLAN_KEY, SAMPLES_KEY, commit_key, read_commit, read_plan, read_samples
from brainsynth.storage.filesystem import Store
from brainsynth.storage.finalise import DATASET_KEY

_BESIDE = ("latents.json", "report.html", "report.json", "config.json", "bundle.json")


@record
class Problem:
    """One object that is not as it should be."""

    kind: Literal["missing", "corrupt", "unexpected"]
    key: str
    detail: str


@record
class VerifyReport:
    """What verify read and what it found."""

    shards: int
    samples_ok: int
    samples_rejected: int
    samples_failed: int
    size_bytes: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """True when nothing is missing, corrupt or unexpected."""
        return not self.problems

    def summary(self) -> str:
        """One line, and one more per problem."""
        head = (
            f"{'ok' if self.ok else 'NOT ok'}: {self.shards} shards, {self.samples_ok} volumes ok, "
            f"{self.samples_rejected} rejected, {self.samples_failed} failed, {self.size_bytes / 1e6:.1f} MB read"
        )
        return "\n".join([head, *(f"  {p.kind}: {p.key}: {p.detail}" for p in self.problems)])


def verify_dataset(store: Store, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Re-digest every object, record, table and volume of a dataset.

    Raises:
        UserError: when there is no dataset, or its plan is damaged, so that nothing can be compared.
    """
    plan = read_plan(store)
    present = {key for key, _ in store.list()}
    problems: list[Problem] = []
    try:
        sample_ids = list(read_samples(store, plan)["sample_id"])
    except UserError as error:
        kind: Literal["missing", "corrupt"] = "corrupt" if SAMPLES_KEY in present else "missing"
        problems.append(Problem(kind=kind, key=SAMPLES_KEY, detail=str(error)))
        sample_ids = []
    counts = {"ok": 0, "rejected": 0, "failed": 0}
    size_bytes, expected, shards = 0, {PLAN_KEY, SAMPLES_KEY, DATASET_KEY, *metadata_keys(plan), *_BESIDE}, 0
    for index in range(plan.num_shards):
        expected.update([commit_key(index), *(shard_key(array, index) for array in plan.arrays)])
        try:
            commit = read_commit(store, plan, index)
        except FileNotFoundError:
            problems.append(Problem(kind="missing", key=commit_key(index), detail="the shard is not committed"))
            continue
        except UserError as error:
            problems.append(Problem(kind="corrupt", key=commit_key(index), detail=str(error)))
            continue
        shards += 1
        size_bytes += sum(o.size_bytes for o in commit.objects)
        for sample in commit.samples:
            counts[sample.status] += 1
        shard = plan.shard(index)
        if sample_ids and [s.sample_id for s in commit.samples] != sample_ids[shard.start : shard.stop]:
            problems.append(
                Problem(kind="corrupt", key=commit_key(index), detail="its samples are not the planned ones")
            )
        problems += _verify_shard(store, plan, commit)
        if progress:
            progress(index + 1, plan.num_shards)
    problems += _verify_manifest(store, plan, expected)
    named = {problem.key for problem in problems}
    problems += [
        Problem(kind="missing", key=key, detail="array metadata")
        for key in metadata_keys(plan)
        if key not in present | named
    ]
    problems += [
        Problem(kind="unexpected", key=key, detail="no record refers to it") for key in sorted(present - expected)
    ]
    return VerifyReport(
        shards=shards,
        samples_ok=counts["ok"],
        samples_rejected=counts["rejected"],
        samples_failed=counts["failed"],
        size_bytes=size_bytes,
        problems=tuple(problems),
    )


def _verify_shard(store: Store, plan: Plan, commit: ShardManifest) -> Iterator[Problem]:
    """Objects by digest, then every volume by its own."""
    decoded = []
    for spec, stored in zip(plan.arrays, commit.objects, strict=True):
        try:
            data = store.read(stored.key)
        except FileNotFoundError:
            yield Problem(kind="missing", key=stored.key, detail=f"shard {commit.shard}: {_named(commit)}")
            return
        if hashlib.sha256(data).hexdigest() != stored.sha256:
            yield Problem(
                kind="corrupt", key=stored.key, detail=f"sha256 differs; shard {commit.shard}: {_named(commit)}"
            )
            return
        try:
            decoded.append(decode_shard(plan, spec, plan.shard(commit.shard), data))
        except ValueError as error:
            yield Problem(kind="corrupt", key=stored.key, detail=str(error))
            return
    for index, sample in enumerate(commit.samples):
        volumes = [array[index] for array in decoded]
        if sample.status == "ok":
            if describe_sample(sample.sample_id, sample.row, volumes).voxel_sha256 != sample.voxel_sha256:
                yield Problem(kind="corrupt", key=commit.objects[0].key, detail=f"voxels of {sample.sample_id} differ")
        elif any(v.dtype.kind == "f" and not np.isnan(v).all() for v in volumes):
            yield Problem(
                kind="corrupt",
                key=commit.objects[0].key,
                detail=f"{sample.sample_id} is {sample.status} but holds data",
            )


def _named(commit: ShardManifest) -> str:
    return f"{commit.samples[0].sample_id} … {commit.samples[-1].sample_id}"


def _verify_manifest(store: Store, plan: Plan, expected: set[str]) -> Iterator[Problem]:
    """dataset.json and the tables that it names; adds those tables to `expected`."""
    try:
        manifest = unseal(DatasetManifest, store.read(DATASET_KEY), DATASET_KEY)
    except FileNotFoundError:
        yield Problem(kind="missing", key=DATASET_KEY, detail="the dataset is not finalised; run its job again")
        return
    except UserError as error:
        yield Problem(kind="corrupt", key=DATASET_KEY, detail=str(error))
        return
    if manifest.plan_fingerprint != plan.fingerprint:
        yield Problem(kind="corrupt", key=DATASET_KEY, detail="it belongs to another plan")
    for key, sha in manifest.files.items():
        expected.add(key)
        try:
            data = store.read(key)
        except FileNotFoundError:
            yield Problem(kind="missing", key=key, detail="named by dataset.json")
            continue
        if hashlib.sha256(data).hexdigest() != sha:
            yield Problem(kind="corrupt", key=key, detail="sha256 differs from dataset.json's")
