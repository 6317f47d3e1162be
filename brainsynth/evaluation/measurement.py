"""Measure a dataset: every volume in, one row of small numbers out, stored as a dataset of kind `measurements`.

A measurement has a plan, shards and commit records like any dataset, so measuring 100,000 volumes resumes, runs on every
executor and is verified the same way; whoever judges reads kilobytes per volume, never the volumes again.

Arrays: `histogram` (voxels per intensity bin over [0, 1]) and `tissue` (`tissue_features`). Scalars, in each
sample's `extra`: `gradient` (sharpness: mean absolute difference of neighbouring voxels), with a segmentation
its `table_line`, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from brainsynth.config.evaluation import EvaluateConfig
from brainsynth.config.schema import RuntimeConfig
from brainsynth.errors import UserError
from brainsynth.evaluation.segmentation import SegmentationRuler, table_line
from brainsynth.manifest import describe_sample
from brainsynth.models.device import choose_device, describe, set_threads
from brainsynth.models.weights import file_sha256
from brainsynth.plan import ArraySpec, Plan, ShardSpec, table_digest
from brainsynth.quality.tissue_features import tissue_features
from brainsynth.storage.arrays import decode_shard, empty_arrays, shard_key
from brainsynth.storage.commit import read_commit, read_plan, read_samples
from brainsynth.storage.filesystem import open_store, resolve_uri
from brainsynth.storage.reader import SyntheticDataset, open_dataset
from brainsynth.storage.work import Made, Work

F32 = npt.NDArray[np.float32]
BINS = 256


def open_volumes(uri: str, where: str, split: str | None = None) -> SyntheticDataset:
    """A finished dataset of volumes. Raises UserError, naming the config's key, where there is none."""
    try:
        dataset = open_dataset(resolve_uri(uri, where), split=split)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None
    if dataset.array_name != "t1w":
        raise UserError(f"{where}: {uri} holds {dataset.manifest['kind']}, not volumes")
    if not len(dataset):
        raise UserError(f"{where}: {uri} holds no volume that is ok")
    return dataset


def plan_measurement(config: EvaluateConfig, uri: str, where: str, name: str) -> Work:
    """What measuring the volumes of one dataset will store. Raises UserError when dataset or weights are not there."""
    dataset = open_volumes(uri, where)
    grid = read_plan(open_store(dataset.uri)).volume
    length = len(tissue_features(dataset.volume(0), grid))
    identity = {"instruments": ["histogram", "gradient", "tissue"]}
    if config.segmentation is not None:
        for key in ("segmenter", "stripper"):
            path = getattr(config.segmentation, key)
            if path is not None:
                identity[key] = file_sha256(weights_file(path, f"segmentation.{key}"))
        identity["precision"] = config.segmentation.precision
    arrays = (vector_array("histogram", BINS), vector_array("tissue", length))
    plan, samples = measured_plan(dataset, identity, arrays)
    root = resolve_uri(config.output.rstrip("/") + f"/{name}", "output")
    return Work(root, plan, samples, MeasuredShards, {"plan": plan, "uri": dataset.uri, "config": config})


def measured_plan(
    dataset: SyntheticDataset, identity: dict[str, Any], arrays: tuple[ArraySpec, ...]
) -> tuple[Plan, pd.DataFrame]:
    """The plan, and the samples, of one row of numbers per volume of a dataset, in its order and its shards' size."""
    store = open_store(dataset.uri)
    source = read_plan(store)
    samples = read_samples(store, source).iloc[dataset.rows].reset_index(drop=True)
    samples.insert(1, "source_row", dataset.rows)
    plan = Plan(
        kind="measurements",
        identity={"source": dataset.manifest["shards_digest"], **identity},
        volume=source.volume,
        covariates=source.covariates,
        arrays=arrays,
        num_samples=len(samples),
        samples_per_shard=source.samples_per_shard,
        samples_digest=table_digest(samples),
    )
    return plan, samples


def check_same_grid(dataset: SyntheticDataset, reference: SyntheticDataset) -> None:
    """Raises UserError when the volumes of two datasets lie on different grids."""
    if dataset.volume(0).shape != reference.volume(0).shape or (dataset.affine != reference.affine).any():
        raise UserError(f"reference: {reference.uri} is on another grid than {dataset.uri}; prepare it on that grid")


def weights_file(path: str, where: str) -> str:
    """The path of a weights file. Raises UserError, naming the config's key, where there is none."""
    file = resolve_uri(path, where)
    try:
        with open(file, "rb"):
            return file
    except OSError as error:
        raise UserError(f"{where}: there are no weights at {path} ({error.strerror})") from None


def vector_array(name: str, length: int) -> ArraySpec:
    """One vector of numbers per volume."""
    return ArraySpec(
        name=name, sample_shape=(length,), chunk_shape=(length,), dimension_names=("subject", name), dtype="float32"
    )


class MeasuredShards:
    """Measures shards of volumes."""

    def __init__(self, plan: Plan, uri: str, config: EvaluateConfig) -> None:
        self.plan, runtime = plan, config.runtime
        self.dataset = open_dataset(uri)
        self.ruler: SegmentationRuler | None = None
        set_threads(runtime.threads_per_worker, runtime.workers)
        self.device = choose_device(_uses_gpu(runtime))
        if config.segmentation is not None:
            self.ruler = SegmentationRuler.load(config.segmentation, self.device)

    def make(self, shard: ShardSpec) -> Made:
        """Measure the volumes of one shard."""
        histograms, tissue = empty_arrays(self.plan, shard)
        records, ids = [], self.dataset.sample_ids
        for offset, row in enumerate(range(shard.start, shard.stop)):
            volume = self.dataset.volume(row)
            histograms[offset] = np.histogram(volume, bins=BINS, range=(0.0, 1.0))[0]
            tissue[offset] = tissue_features(volume, self.plan.volume)
            extra: dict[str, str | int | float] = {"gradient": gradient(volume)}
            if self.ruler is not None:
                found = table_line(self.ruler.measure_one(volume, self.plan.volume))
                extra |= {k: v for k, v in found.items() if isinstance(v, str) or math.isfinite(v)}
            records.append(describe_sample(ids[row], row, [histograms[offset], tissue[offset]], extra))
        return Made([histograms, tissue], records, describe(self.device))


def _uses_gpu(runtime: RuntimeConfig) -> bool:
    return runtime.gpus_per_worker > 0


def gradient(volume: F32) -> float:
    """Mean absolute difference of neighbouring voxels over the axes, in intensity: it falls when a volume is blurred."""
    return float(np.mean([np.abs(np.diff(volume, axis=axis)).mean() for axis in range(3)]))


def measured_table(root: str) -> pd.DataFrame:
    """One line per measured volume: what was planned (sample_id, split, subject, covariates, …) and every scalar found.

    Numbers that could not be measured are NaN. Volumes whose measurement failed are left out.
    """
    store = open_store(root)
    plan = read_plan(store)
    lines = []
    for index in range(plan.num_shards):
        lines += [{"row": s.row, **s.extra} for s in read_commit(store, plan, index).samples if s.status == "ok"]
    found = pd.DataFrame(lines)
    planned = read_samples(store, plan)
    return planned.iloc[found["row"]].reset_index(drop=True).join(found)


def measured_blocks(root: str, name: str) -> Iterator[F32]:
    """(n, …) rows of one array, a shard at a time and in order, without the rows that failed."""
    store = open_store(root)
    plan = read_plan(store)
    array = next(a for a in plan.arrays if a.name == name)
    for index in range(plan.num_shards):
        values = decode_shard(plan, array, plan.shard(index), store.read(shard_key(array, index)))
        yield values[np.isfinite(values).reshape(len(values), -1).all(axis=1)]


def instruments_of(root: str) -> str:
    """What measured a dataset, as text that is equal for equal instruments."""
    identity = read_plan(open_store(root)).identity
    return json.dumps({key: value for key, value in identity.items() if key != "source"}, sort_keys=True)
