"""Describe volumes for the audit: every volume in, its descriptors out, stored as a dataset of kind `measurements`.

Arrays: `voxels` (2, 512), the descriptor of the aligned volume and of its mirror image; with an embedder `embedding`
(1, 128). Both depend on the template, the mean of the training scans: it is stored with them, once, so that a resumed
run uses the very same, and its digest is part of the plan.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from brainsynth.audit.memorisation import Spaces
from brainsynth.config.schema import RuntimeConfig
from brainsynth.errors import UserError
from brainsynth.instruments.alignment import (
    DIMENSIONS,
    Aligner,
    CanonicalFrame,
    VoxelDescriptor,
    fit_frame,
    to_working_grid,
    working_grid,
)
from brainsynth.instruments.measured import measured_blocks
from brainsynth.instruments.measurement import measured_plan
from brainsynth.manifest import describe_sample
from brainsynth.models.device import choose_device, describe, set_threads
from brainsynth.models.embedder import EMBEDDING_SIZE, load_embedder
from brainsynth.plan import ArraySpec, Plan, ShardSpec
from brainsynth.reading.dataset import SyntheticDataset, open_dataset
from brainsynth.records import digest
from brainsynth.storage.arrays import empty_arrays
from brainsynth.storage.commit import read_commits, read_plan
from brainsynth.storage.filesystem import Store, open_store
from brainsynth.storage.whole_file import file_sha256
from brainsynth.storage.work import ShardOutput, Work
from brainsynth.volume import VolumeSpec, voxel_sha256

F32 = npt.NDArray[np.float32]
VOXELS, EMBEDDING = "voxels", "embedding"
TEMPLATE_SCANS = 300
"""The template is the mean of at most this many training scans, evenly spaced through the split."""
TO_BE_TRAINED = "to be trained"


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruments:
    """What describes a volume: the template's pose, and optionally a trained network."""

    frame: CanonicalFrame
    embedder: str | None = None
    """Its safetensors file, which every worker reaches."""

    @property
    def identity(self) -> dict[str, str | list[str]]:
        """Digests of all that decides the descriptors."""
        identity: dict[str, str | list[str]] = {"instruments": [VOXELS], "template": voxel_sha256(self.frame.template)}
        if self.embedder is not None:
            there = Path(self.embedder).exists()
            identity["instruments"] = [VOXELS, EMBEDDING]
            identity["embedder"] = file_sha256(Path(self.embedder)) if there else TO_BE_TRAINED
        return identity


def template_scans(train: SyntheticDataset, grid: VolumeSpec) -> F32:
    """(n <= 300, X, Y, Z) training scans on the working grid."""
    chosen = np.unique(np.linspace(0, len(train) - 1, min(len(train), TEMPLATE_SCANS)).astype(int))
    return np.stack([to_working_grid(train.volume(int(i)), grid) for i in chosen])


def training_frame(store: Store, train: SyntheticDataset, grid: VolumeSpec, write: bool = True) -> CanonicalFrame:
    """The frame of a training split: the one that is stored already, else fitted now, and stored when `write`.

    Raises:
        UserError: the scans have no common bright part, or the stored template is damaged.
    """
    spacing = working_grid(grid).spacing_mm
    of = digest([train.manifest["plan_fingerprint"], train.manifest["shards_digest"]])
    key = f"template-{of[:16]}.npy"
    try:
        return CanonicalFrame(template=_read_template(store, key, grid), spacing_mm=spacing)
    except FileNotFoundError:
        frame = fit_frame(template_scans(train, grid), spacing)
    if not write:
        return frame
    buffer = io.BytesIO()
    np.save(buffer, frame.template)
    store.write_new(key, buffer.getvalue())
    # Another run may have been first, and may have rounded differently.
    return CanonicalFrame(template=_read_template(store, key, grid), spacing_mm=spacing)


def _read_template(store: Store, key: str, grid: VolumeSpec) -> F32:
    data = store.read(key)
    try:
        template = np.load(io.BytesIO(data))
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{store.uri}/{key} is damaged ({error}): remove the folder and audit again") from None
    if template.shape != working_grid(grid).shape_xyz or template.dtype != np.float32:
        raise UserError(f"{store.uri}/{key} is not a template of this grid: remove the folder and audit again")
    return np.asarray(template)


def description_work(root: str, dataset: SyntheticDataset, instruments: Instruments, runtime: RuntimeConfig) -> Work:
    """What describing the volumes of one dataset will store."""
    arrays = [_views(VOXELS, 2, DIMENSIONS)]
    if instruments.embedder is not None:
        arrays.append(_views(EMBEDDING, 1, EMBEDDING_SIZE))
    plan, samples = measured_plan(dataset, dict(instruments.identity), tuple(arrays))
    arguments = {"plan": plan, "uri": dataset.uri, "instruments": instruments, "runtime": runtime}
    return Work(root, plan, samples, VolumeDescriber, arguments)


def _views(name: str, views: int, length: int) -> ArraySpec:
    return ArraySpec(
        name=name,
        sample_shape=(views, length),
        chunk_shape=(views, length),
        dimension_names=("subject", "view", name),
        dtype="float32",
    )


class VolumeDescriber:
    """Describes shards of volumes."""

    def __init__(self, plan: Plan, uri: str, instruments: Instruments, runtime: RuntimeConfig) -> None:
        self.plan, self.micro_batch = plan, runtime.micro_batch
        self.dataset = open_dataset(uri)
        set_threads(runtime.threads_per_worker, runtime.workers)
        self.device = choose_device(runtime.gpus_per_worker > 0)
        self.aligner, self.voxels = Aligner(instruments.frame), VoxelDescriptor(instruments.frame)
        self.embedder = None
        if instruments.embedder is not None:
            self.embedder = load_embedder(Path(instruments.embedder), self.device)

    def make(self, shard: ShardSpec) -> ShardOutput:
        """Describe the volumes of one shard."""
        arrays = empty_arrays(self.plan, shard)
        for start in range(shard.start, shard.stop, self.micro_batch):
            rows = range(start, min(start + self.micro_batch, shard.stop))
            volumes = [to_working_grid(self.dataset.volume(row), self.plan.volume) for row in rows]
            aligned = self.aligner.align(np.stack(volumes)).volumes
            part = slice(start - shard.start, start - shard.start + len(rows))
            arrays[0][part] = self.voxels.describe(aligned)
            if self.embedder is not None:
                arrays[1][part] = self.embedder.embed(aligned)[:, None]
        ids = self.dataset.sample_ids
        records = [
            describe_sample(ids[row], row, [array[row - shard.start] for array in arrays])
            for row in range(shard.start, shard.stop)
        ]
        return ShardOutput(arrays, records, describe(self.device))


def descriptors(root: str) -> Spaces:
    """Space → (n, views, d) features of every volume that was described, in order.

    Raises:
        UserError: some volume could not be described; an audit that skips volumes vouches for nothing.
    """
    store = open_store(root)
    plan = read_plan(store)
    lost = [sample for commit in read_commits(store, plan) for sample in commit.samples if sample.status != "ok"]
    if lost:
        raise UserError(
            f"{root}: {len(lost)} volumes could not be described, the first {lost[0].sample_id} ({lost[0].reason}); an "
            "audit must see every volume. Fix the cause, re-plan them with "
            f"`brainsynth verify {root} --repair --failed`, and run the same command again"
        )
    return {array.name: np.concatenate(list(measured_blocks(root, array.name))) for array in plan.arrays}
