"""Read everything back and compare: names each object that is lost, damaged, in the wrong place, or left over."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from brainsynth.errors import OtherVersion, StoreError, UserError
from brainsynth.manifest import LEFT_OUT_KEY, MODEL_KEY, DatasetManifest, SampleRecord, ShardManifest, stored_sha256
from brainsynth.plan import ArraySpec, Plan
from brainsynth.records import record, unseal
from brainsynth.storage import attempts
from brainsynth.storage import measured as quality
from brainsynth.storage.arrays import GROUP, decode_rows, metadata_keys, shard_key
from brainsynth.storage.commit import PLAN_KEY, SAMPLES_KEY, commit_key, each_commit, read_plan, read_samples
from brainsynth.storage.filesystem import Store, open_store
from brainsynth.storage.finalise import DATASET_KEY, is_table
from brainsynth.storage.keys import is_of_desktop
from brainsynth.storage.leftovers import COMMITS, REPAIRS, is_garbage, is_temporary

_BESIDE = ("latents.json", "report.html", "report.json", "config.json", "bundle.json", MODEL_KEY, LEFT_OUT_KEY)
Kind = Literal["missing", "corrupt", "swapped", "duplicated", "orphaned", "unexpected"]


@record
class Problem:
    """One object that is not as it should be.

    `missing`, `corrupt`: data is lost. `swapped`: it holds what belongs elsewhere. `duplicated`: a second copy of an object,
    or two rows with the same voxels. `orphaned`: left by an attempt that died, or of one at work while the dataset is made.
    `unexpected`: not written by brainsynth.
    """

    kind: Kind
    key: str
    detail: str
    shard: int | None = None
    """The shard that must be made again to repair it; None where none needs to be."""
    rows: tuple[int, ...] = ()
    """The rows whose voxels are lost, where that is known."""


@record
class VerifyReport:
    """What verify read and what it found."""

    shards: int
    samples_ok: int
    samples_rejected: int
    samples_failed: int
    samples_redrawn: int
    """Volumes that are ok but not the first of their row: the quality gate refused those before."""
    size_bytes: int
    problems: tuple[Problem, ...]
    harmless: tuple[str, ...] = ()
    """Files of a desktop or file server, such as .DS_Store: not part of the dataset, and not a problem."""

    @property
    def ok(self) -> bool:
        """True when there is no problem."""
        return not self.problems

    def summary(self) -> str:
        """One line, one more per problem, and one for harmless files."""
        head = (
            f"{'ok' if self.ok else 'NOT ok'}: {self.shards} shards, {self.samples_ok} volumes ok, "
            f"{self.samples_rejected} rejected, {self.samples_failed} failed, "
            f"{f'{self.samples_redrawn} redrawn, ' if self.samples_redrawn else ''}{self.size_bytes / 1e6:.1f} MB read"
        )
        shown = ", ".join(self.harmless[:3]) + (f" and {len(self.harmless) - 3} more" if len(self.harmless) > 3 else "")
        note = [f"  harmless, left by a desktop or file server: {shown}"] if self.harmless else []
        return "\n".join([head, *(f"  {p.kind}: {p.key}: {p.detail}" for p in self.problems), *note])


class _Verification:
    """What is gathered while the shards are read one by one."""

    def __init__(self, store: Store, plan: Plan) -> None:
        self.store, self.plan = store, plan
        present = dict(store.list())
        self.harmless = tuple(sorted(key for key in present if is_of_desktop(key)))
        self.present = {key: size for key, size in present.items() if not is_of_desktop(key)}
        self.problems: list[Problem] = []
        self.counts = {"ok": 0, "rejected": 0, "failed": 0}
        self.shards = self.size_bytes = self.redrawn = 0
        self.expected = {PLAN_KEY, SAMPLES_KEY, DATASET_KEY, *metadata_keys(plan), *_BESIDE}
        self.owners: dict[str, str] = {}
        """sha256 → the key that should hold it."""
        self.strays: dict[str, tuple[int, str]] = {}
        """key of a corrupt object → (its place in `problems`, the sha256 that was found)."""
        self.voxels: dict[bytes, int] = {}
        """Start of a volume's sha256 → the first row that has it."""

    def shard(self, index: int, read: Callable[[], ShardManifest], sample_ids: list[str]) -> None:
        """One commit record, as `read` gives it, and what it says is stored."""
        key, plan = commit_key(index), self.plan
        self.expected.update([key, *(shard_key(array, index) for array in plan.arrays)])
        try:
            commit = read()
        except FileNotFoundError:
            self.problems.append(Problem(kind="missing", key=key, detail="the shard is not committed", shard=index))
            for orphan in (shard_key(array, index) for array in plan.arrays):
                if orphan in self.present:
                    detail = "its shard has no commit record; the next run judges it"
                    self.problems.append(Problem(kind="orphaned", key=orphan, detail=detail, shard=index))
            return
        except (OtherVersion, StoreError):
            raise
        except UserError as error:
            self.problems.append(Problem(kind="corrupt", key=key, detail=str(error), shard=index))
            return
        self.shards += 1
        self.size_bytes += sum(o.size_bytes for o in commit.objects)
        for sample in commit.samples:
            self.counts[sample.status] += 1
            self.redrawn += sample.status == "ok" and int(sample.extra.get("gate_attempts", 1)) > 1
        shard = plan.shard(index)
        if sample_ids and [s.sample_id for s in commit.samples] != sample_ids[shard.start : shard.stop]:
            detail = "its samples are not the planned ones"
            self.problems.append(Problem(kind="corrupt", key=key, detail=detail, shard=index))
        self._objects(commit)
        if plan.kind == "generated":
            self._twins(commit)

    def _objects(self, commit: ShardManifest) -> None:
        """Objects by digest, then every volume by its own."""
        decoded, index = [], commit.shard
        for spec, stored in zip(self.plan.arrays, commit.objects, strict=True):
            self.owners[stored.sha256] = stored.key
            named = f"shard {index}: {commit.samples[0].sample_id} … {commit.samples[-1].sample_id}"
            if stored.key != shard_key(spec, index):
                detail = f"it names the object {stored.key!r}, which is not this shard's"
                self.problems.append(Problem(kind="corrupt", key=commit_key(index), detail=detail, shard=index))
                return
            try:
                data = self.store.read(stored.key)
            except FileNotFoundError:
                self.problems.append(Problem(kind="missing", key=stored.key, detail=named, shard=index))
                return
            sha256 = hashlib.sha256(data).hexdigest()
            decoded.append(decode_rows(self.plan, spec, self.plan.shard(index), data))
            if sha256 != stored.sha256:
                rows = tuple(s.row for s, v in zip(commit.samples, decoded[-1], strict=True) if v is None)
                lost = f"; rows {', '.join(map(str, rows))} cannot be decoded" if rows else ""
                self.strays[stored.key] = (len(self.problems), sha256)
                detail = f"sha256 differs; {named}{lost}"
                self.problems.append(Problem(kind="corrupt", key=stored.key, detail=detail, shard=index, rows=rows))
                return
        for offset, sample in enumerate(commit.samples):
            wrong = _wrong_volume(self.plan, sample, [rows[offset] for rows in decoded])
            if wrong:
                key = commit.objects[0].key
                self.problems.append(Problem(kind="corrupt", key=key, detail=wrong, shard=index, rows=(sample.row,)))

    def _twins(self, commit: ShardManifest) -> None:
        """Two generated subjects never have the same voxels: seeds differ."""
        key = commit_key(commit.shard)
        for sample in (sample for sample in commit.samples if sample.status == "ok"):
            first = self.voxels.setdefault(bytes.fromhex(sample.voxel_sha256)[:16], sample.row)
            if first != sample.row:
                detail = f"{sample.sample_id} (row {sample.row}) has the voxels of row {first}"
                self.problems.append(
                    Problem(kind="duplicated", key=key, detail=detail, shard=commit.shard, rows=(sample.row,))
                )

    def name_swaps(self) -> None:
        """A corrupt object that holds what belongs under another key was swapped, not damaged."""
        for key, (place, sha) in self.strays.items():
            if sha in self.owners:
                old = self.problems[place]
                detail = f"it holds what belongs in {self.owners[sha]}; {old.detail.split('; ', 1)[1]}"
                self.problems[place] = Problem(kind="swapped", key=key, detail=detail, shard=old.shard)

    def left_over(self) -> Iterator[Problem]:
        """Keys that nothing refers to, and whether `brainsynth gc` removes them."""
        planned = set(range(self.plan.num_shards))
        done = {shard for shard in planned if commit_key(shard) in self.present}
        for key in sorted(set(self.present) - self.expected):
            removable = is_garbage(key, done, len(planned))
            kind: Kind = "unexpected"
            detail, owner = "no record refers to it", ""
            if is_temporary(key) or key.split("/")[0] in (attempts.FOLDER, REPAIRS):
                kind = "orphaned"
                detail = "left by an attempt that died" if removable else "of an attempt that is at work or died"
            elif key.split("/")[0] in (GROUP, COMMITS):
                owner = self.owners.get(hashlib.sha256(self.store.read(key)).hexdigest(), "")
            if owner:
                kind, detail = "duplicated", f"a copy of {owner}"
            if removable:
                detail += "; `brainsynth gc` removes it"
            elif is_garbage(key, planned, len(planned)):
                detail += "; once every shard is committed `brainsynth gc` removes it"
            yield Problem(kind=kind, key=key, detail=detail)


def verify_dataset(dataset: Store | str, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Re-digest every object, record, table and volume of a dataset; writes nothing.

    Args:
        dataset: its root folder, a path or an object-store URI.
        progress: called after each shard with how many are done, and of how many.

    Raises:
        UserError: when there is no dataset, or its plan is damaged, so that nothing can be compared; OtherVersion where
            another version of brainsynth wrote a record, StoreError where a file or server cannot be read now: neither is
            damage.
    """
    store = open_store(dataset) if isinstance(dataset, str) else dataset
    plan = read_plan(store)
    verification = _Verification(store, plan)
    try:
        sample_ids = list(read_samples(store, plan)["sample_id"])
    except StoreError:
        raise
    except UserError as error:
        kind: Kind = "corrupt" if SAMPLES_KEY in verification.present else "missing"
        verification.problems.append(Problem(kind=kind, key=SAMPLES_KEY, detail=str(error)))
        sample_ids = []
    for index, read in each_commit(store, plan):
        verification.shard(index, read, sample_ids)
        if progress:
            progress(index + 1, plan.num_shards)
    verification.name_swaps()
    verification.problems += _verify_manifest(store, plan, verification.expected)
    named = {problem.key for problem in verification.problems}
    verification.problems += [
        Problem(kind="missing", key=key, detail="array metadata")
        for key in metadata_keys(plan)
        if key not in verification.present and key not in named
    ]
    verification.problems += verification.left_over()
    return VerifyReport(
        shards=verification.shards,
        samples_ok=verification.counts["ok"],
        samples_rejected=verification.counts["rejected"],
        samples_failed=verification.counts["failed"],
        samples_redrawn=verification.redrawn,
        size_bytes=verification.size_bytes,
        problems=tuple(verification.problems),
        harmless=verification.harmless,
    )


def _wrong_volume(plan: Plan, sample: SampleRecord, volumes: list[npt.NDArray[Any] | None]) -> str:
    """What is wrong with one row's stored voxels; empty when nothing is."""
    whole = [volume for volume in volumes if volume is not None]
    if len(whole) < len(volumes):
        return f"{sample.sample_id} cannot be decoded"
    if sample.status == "ok":
        if stored_sha256(whole) != sample.voxel_sha256:
            return f"voxels of {sample.sample_id} differ"
        volumes_ml = {} if plan.labels is None else plan.labels.volumes_ml(whole[1], plan.volume.voxel_ml)
        differs = [name for name, value in volumes_ml.items() if sample.extra.get(name) != value]
        return f"{differs[0]} of {sample.sample_id} is not that of its label map" if differs else ""
    # Of two attempts at a shard either may have stored an array, and have given up other rows than the other.
    filled = [_holds_data(spec, v) for spec, v in zip(plan.arrays, whole, strict=True) if spec.fill_value != 0]
    return f"{sample.sample_id} is {sample.status} but holds data" if filled and all(filled) else ""


def _holds_data(spec: ArraySpec, stored: npt.NDArray[Any]) -> bool:
    return not (np.isnan(stored) if stored.dtype.kind == "f" else stored == spec.fill).all()


def _verify_manifest(store: Store, plan: Plan, expected: set[str]) -> Iterator[Problem]:
    """dataset.json, the tables that it names and those of measured values; adds the tables to `expected`."""
    try:
        manifest = unseal(DatasetManifest, store.read(DATASET_KEY), DATASET_KEY)
    except FileNotFoundError:
        yield Problem(kind="missing", key=DATASET_KEY, detail="the dataset is not finalised; run its job again")
        return
    except (OtherVersion, StoreError):
        raise
    except UserError as error:
        yield Problem(kind="corrupt", key=DATASET_KEY, detail=str(error))
        return
    if manifest.plan_fingerprint != plan.fingerprint:
        yield Problem(kind="corrupt", key=DATASET_KEY, detail="it belongs to another plan")
    for key, sha in manifest.files.items():
        if not is_table(key, plan):
            yield Problem(kind="corrupt", key=DATASET_KEY, detail=f"it names the file {key!r}, which no dataset has")
            continue
        expected.add(key)
        try:
            data = store.read(key)
        except FileNotFoundError:
            yield Problem(kind="missing", key=key, detail="named by dataset.json")
            continue
        if hashlib.sha256(data).hexdigest() != sha:
            yield Problem(kind="corrupt", key=key, detail="sha256 differs from dataset.json's")
    for key in [key for key, _ in store.list(quality.FOLDER) if quality.is_measured(key)]:
        expected.add(key)
        try:
            quality.read_measured(store.read(key), key, manifest.shards_digest)
        except ValueError as error:
            yield Problem(kind="corrupt", key=key, detail=str(error))
