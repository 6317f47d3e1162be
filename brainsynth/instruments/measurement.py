"""Measure a dataset: every volume in, one row of small numbers out, stored as a dataset of kind `measurements`.

A measurement has a plan, shards and commit records like any dataset, so measuring 100,000 volumes resumes, runs on every
executor and is verified the same way; judging reads kilobytes per volume, never the volumes again.

Arrays: `histogram` (voxels per intensity bin over [0, 1]), `tissue` (`tissue_features`), `skew` (`left_right_difference`),
with a feature network `features`, and, where the usefulness test asks for labels, `ventricles` (1 where the segmentation
finds them). Scalars, in each sample's `extra`: `gradient` (sharpness: mean absolute difference of neighbouring voxels), with
a segmentation its `table_line`, with a labeller the volume of each structure, and what the user's own functions find.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from brainsynth.config.evaluation import SEGMENTED, VENTRICLES, EvaluateConfig
from brainsynth.errors import UserError
from brainsynth.instruments.counting import StructureCounter, planned_labeller
from brainsynth.instruments.feature_network import FeatureNetwork, features_of
from brainsynth.instruments.measured import BINS
from brainsynth.instruments.own_rulers import call_functions, load_functions
from brainsynth.instruments.segmentation import VENTRICLES as VENTRICLE_NAMES
from brainsynth.instruments.segmentation import SegmentationRuler, table_line
from brainsynth.instruments.tissue_features import left_right_difference, tissue_features
from brainsynth.manifest import describe_sample
from brainsynth.models.device import choose_device, describe, set_threads
from brainsynth.models.segmenter import STRUCTURES
from brainsynth.plan import ArraySpec, Plan, ShardSpec, table_digest
from brainsynth.reading.dataset import SyntheticDataset, open_dataset, open_input
from brainsynth.storage.arrays import empty_arrays
from brainsynth.storage.commit import read_plan, read_samples
from brainsynth.storage.filesystem import open_store, resolve_uri
from brainsynth.storage.whole_file import file_sha256
from brainsynth.storage.work import ShardOutput, Work
from brainsynth.volume import VolumeSpec, resample

F32 = npt.NDArray[np.float32]


def open_volumes(uri: str, where: str, split: str | None = None) -> SyntheticDataset:
    """A finished dataset of volumes. Raises UserError, naming the config's key, where there is none."""
    dataset = open_input(resolve_uri(uri, where), where, split)
    if dataset.array_name != "t1w":
        raise UserError(f"{where}: {uri} holds {dataset.manifest['kind']}, not volumes")
    if not len(dataset):
        raise UserError(f"{where}: {uri} holds no volume that is ok")
    return dataset


def plan_measurement(
    config: EvaluateConfig, uri: str, where: str, name: str, network: FeatureNetwork | None = None
) -> Work:
    """What measuring the volumes of one dataset will store. Raises UserError when dataset or weights are not there."""
    dataset = open_volumes(uri, where)
    grid, first = read_plan(open_store(dataset.uri)).volume, dataset.volume(0)
    lengths = {"histogram": BINS, "tissue": len(tissue_features(first, grid))}
    lengths["skew"] = len(left_right_difference(first, grid))
    identity: dict[str, Any] = {"instruments": ["histogram", "gradient", "tissue", "skew"]}
    if network is not None:
        lengths["features"] = network.width
        identity["features"] = {"network": network.name, "sha256": network.sha256}
    if config.segmentation is not None:
        identity["segmenter"] = file_sha256(Path(weights_file(config.segmentation.segmenter, "segmentation.segmenter")))
        identity["precision"] = config.segmentation.precision
    if config.labeller is not None:
        counted = [structure for structure in config.structures.values() if structure not in SEGMENTED]
        identity["labeller"] = planned_labeller(config.labeller, grid, counted).digest
    if config.functions:
        identity["functions"] = config.functions
    arrays = [vector_array(name, length) for name, length in lengths.items()]
    if config.labels_ventricles:
        shape, names = grid.shape_xyz, ("subject", "x", "y", "z")
        arrays.append(
            ArraySpec(name=VENTRICLES, sample_shape=shape, chunk_shape=shape, dimension_names=names, dtype="uint8")
        )
    plan, samples = measured_plan(dataset, identity, tuple(arrays))
    root = resolve_uri(config.output.rstrip("/") + f"/{name}", "output")
    arguments = {"plan": plan, "uri": dataset.uri, "config": config, "network": network}
    return Work(root, plan, samples, VolumeMeasurer, arguments)


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
    """Raises UserError when the volumes of two datasets are on different grids."""
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


class VolumeMeasurer:
    """Measures shards of volumes."""

    def __init__(self, plan: Plan, uri: str, config: EvaluateConfig, network: FeatureNetwork | None) -> None:
        self.plan, runtime = plan, config.runtime
        self.dataset = open_dataset(uri)
        self.ruler: SegmentationRuler | None = None
        self.labels_ventricles = config.labels_ventricles
        set_threads(runtime.threads_per_worker, runtime.workers)
        self.device = choose_device(runtime.gpus_per_worker > 0)
        self.functions = load_functions(config.functions)
        self.counter = StructureCounter(config.labeller, self.device) if config.labeller is not None else None
        if config.segmentation is not None:
            self.ruler = SegmentationRuler.load(config.segmentation, self.device)
        self.network = network.load(self.device) if network is not None else None

    def make(self, shard: ShardSpec) -> ShardOutput:
        """Measure the volumes of one shard."""
        arrays = empty_arrays(self.plan, shard)
        records, ids = [], self.dataset.sample_ids
        for offset, row in enumerate(range(shard.start, shard.stop)):
            measured, extra = self._measure(self.dataset.volume(row))
            for array, values in zip(arrays, measured, strict=True):
                array[offset] = values
            records.append(describe_sample(ids[row], row, [array[offset] for array in arrays], extra))
        return ShardOutput(arrays, records, describe(self.device))

    def _measure(self, volume: F32) -> tuple[list[npt.NDArray[Any]], dict[str, str | int | float]]:
        """One volume's arrays, in the plan's order, and its scalars."""
        grid = self.plan.volume
        measured = [np.histogram(volume, bins=BINS, range=(0.0, 1.0))[0], tissue_features(volume, grid)]
        measured.append(left_right_difference(volume, grid))
        if self.network is not None:
            measured.append(features_of(self.network, volume, grid))
        extra: dict[str, str | int | float] = {"gradient": gradient(volume)}
        if self.ruler is not None:
            volumes, labels, fine = self.ruler.measure_labelled(volume, grid)
            if self.labels_ventricles:
                measured.append(ventricle_mark(labels, fine, grid))
            extra |= {k: v for k, v in table_line(volumes).items() if isinstance(v, str) or math.isfinite(v)}
        if self.counter is not None:
            extra |= self.counter.volumes_ml(volume)
        return measured, extra | call_functions(self.functions, volume, self.dataset.affine)


def ventricle_mark(labels: npt.NDArray[np.uint8], fine: VolumeSpec, grid: VolumeSpec) -> npt.NDArray[np.uint8]:
    """1 where at least half of a voxel of `grid` is ventricle, by the segmentation's labels on the grid `fine`."""
    inside = np.isin(labels, [STRUCTURES.index(name) for name in VENTRICLE_NAMES]).astype(np.float32)
    return (resample(inside, fine.affine, grid) >= 0.5).astype(np.uint8)


def gradient(volume: F32) -> float:
    """Mean absolute difference of neighbouring voxels over the axes, in intensity: it falls when a volume is blurred."""
    return float(np.mean([np.abs(np.diff(volume, axis=axis)).mean() for axis in range(3)]))
