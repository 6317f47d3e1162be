"""The usefulness test of an evaluation: which tasks, on which volumes, with which labels.

Labels of synthetic volumes are what was asked of them. Ventricles have no asked outline: there the segmentation ruler
labels synthetic and real volumes alike, so that test shows whether synthetic volumes teach to segment as that ruler does.
Structures are those of the stored label maps, of both.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from brainsynth.config.evaluation import ALL_STRUCTURES, VENTRICLES, EvaluateConfig
from brainsynth.covariates.arrays import as_numbers
from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.errors import UserError
from brainsynth.instruments.measured import measured_marks, measured_table
from brainsynth.labels import LabelTable
from brainsynth.metrics.finding import LEAST, Finding, finding
from brainsynth.models.device import choose_device, set_threads
from brainsynth.reading.dataset import SyntheticDataset
from brainsynth.records import digest, left_out_at, record, seal, to_dict, unseal
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import Store, open_store
from brainsynth.usefulness.arms import UsefulnessResult, run_usefulness
from brainsynth.usefulness.scores import METRICS, Task
from brainsynth.usefulness.structures import Structures, shared_structures

log = logging.getLogger(__name__)
CACHE_BYTES = 512 << 20
"""Volumes of one source that are kept in memory; others are read again whenever they are drawn."""


class _Source(NamedTuple):
    """A measured dataset."""

    table: pd.DataFrame
    dataset: SyntheticDataset
    root: str
    """Of its measurements."""


@record
class TaskResult:
    """The usefulness test of one task."""

    name: str
    """A covariate, `ventricles` or `structures`."""
    unit: str
    available: tuple[int, int, int]
    """Volumes with a label: synthetic, real training, real test; at most `volumes` of each were drawn."""
    result: UsefulnessResult
    ventricles: Annotated[tuple[str, ...], left_out_at(())] = ()
    """Structures that are one in `dice_all_ventricles`."""


class DatasetVolumes:
    """Some volumes of a dataset as if they were one (N, X, Y, Z) array; read when needed.

    Args:
        classes: (256,) the class of each stored integer, to have the label maps, as classes, instead.
    """

    def __init__(
        self,
        dataset: SyntheticDataset,
        indices: npt.NDArray[np.intp],
        classes: npt.NDArray[np.uint8] | None = None,
    ) -> None:
        self.dataset, self.indices, self.classes = dataset, indices, classes
        self.shape = (len(indices), *dataset.shape)
        self.ndim = len(self.shape)
        self._kept: dict[int, npt.NDArray[Any]] = {}
        self._room = CACHE_BYTES // ((4 if classes is None else 1) * int(np.prod(self.shape[1:])))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: Any) -> npt.NDArray[Any]:
        if isinstance(place, slice):
            return np.stack([self[index] for index in range(*place.indices(len(self)))])
        index = int(place)
        if index in self._kept:
            return self._kept[index]
        row = int(self.indices[index])
        volume = self.dataset.volume(row) if self.classes is None else self.classes[self.dataset.label_map(row)]
        if len(self._kept) < self._room:
            self._kept[index] = volume
        return volume


def tasks_of(config: EvaluateConfig, covariates: CovariateSchema) -> dict[str, Task]:
    """Name → kind of every task that is asked for. Raises UserError for a name that is not such a task."""
    assert config.usefulness is not None
    kinds: dict[str, Literal["continuous", "binary"]] = {
        c.name: "continuous" if c.kind == "continuous" else "binary"
        for c in covariates.covariates
        if c.kind != "categorical"
    }
    possible: dict[str, Task] = {**kinds, **({VENTRICLES: "segmentation"} if config.labels_ventricles else {})}
    default = tuple(possible)  # without structures, which take longest
    possible = {**possible, ALL_STRUCTURES: possible.get(ALL_STRUCTURES, "structures")}
    wrong = [name for name in config.usefulness.tasks if name not in possible]
    if wrong:
        raise UserError(f"usefulness.tasks: {', '.join(wrong)} is none of {', '.join(possible)}")
    return {name: possible[name] for name in config.usefulness.tasks or default}


def check_usefulness(
    config: EvaluateConfig, dataset: SyntheticDataset, reference: SyntheticDataset, train: int, test: int
) -> None:
    """Is there enough to train and to test on, before anything is measured? `train` and `test` count real scans."""
    if config.usefulness is None:
        return
    if "structures" in tasks_of(config, read_plan(open_store(dataset.uri)).covariates).values():
        _structures(dataset, reference)
    least = int(np.ceil(config.usefulness.batch_size / config.usefulness.few_fraction))
    train = min(train, config.usefulness.volumes)
    if train < least or test < LEAST or len(dataset) < config.usefulness.batch_size:
        raise UserError(
            f"usefulness: needed are {least} real training scans (few_fraction of them fill one batch), {LEAST} in the "
            f"validation split and {config.usefulness.batch_size} volumes; there are {train}, {test} and {len(dataset)}"
        )


def usefulness_results(
    config: EvaluateConfig,
    made_root: str,
    real_root: str,
    dataset: SyntheticDataset,
    reference: SyntheticDataset,
    store: Store,
) -> list[TaskResult]:
    """Every task, trained on the dataset and on the training split and tested on the validation split.

    Args:
        made_root: measurements of `dataset`; `real_root` those of `reference`.
        store: of the evaluation, where a task that is done is kept.

    A task that was done before, with the same budget on the same measurements, is read and not trained again.
    """
    if config.usefulness is None:
        return []
    set_threads(config.runtime.threads_per_worker, 1)
    plans = [read_plan(open_store(root)) for root in (made_root, real_root)]
    made = _Source(measured_table(made_root), dataset, made_root)
    real = _Source(measured_table(real_root), reference, real_root)
    covariates = {c.name: c for c in plans[0].covariates.covariates}
    budget = to_dict(replace(config.usefulness, tasks=()))
    results = []
    for name, task in tasks_of(config, plans[0].covariates).items():
        identity = digest({"task": name, "budget": budget, "measured": [plan.fingerprint for plan in plans]})
        key = f"usefulness/{name}-{identity[:16]}.json"
        done = _finished(store, key)
        if done is None:
            done = _run(config, name, task, covariates.get(name), made, real)
            store.write(key, seal(done))
        results.append(done)
    return results


def _finished(store: Store, key: str) -> TaskResult | None:
    try:
        return unseal(TaskResult, store.read(key), key)
    except FileNotFoundError:
        return None


def _run(
    config: EvaluateConfig, name: str, task: Task, covariate: Covariate | None, made: _Source, real: _Source
) -> TaskResult:
    """One task, on at most `volumes` of each source."""
    budget = config.usefulness
    assert budget is not None
    structures = _structures(made.dataset, real.dataset) if task == "structures" else None
    synthetic, train, test = (
        _labelled(source, split, name, covariate, structures, budget.volumes)
        for source, split in ((made, None), (real, "train"), (real, "validation"))
    )
    result = run_usefulness(
        task,
        synthetic.volumes,
        synthetic.labels,
        train.volumes,
        train.labels,
        test.volumes,
        test.labels,
        budget,
        real_train_groups=train.people,
        real_test_groups=test.people,
        structures=structures,
        device=choose_device(config.runtime.gpus_per_worker > 0),
    )
    unit = covariate.unit if covariate else ""
    available = (synthetic.available, train.available, test.available)
    together = tuple(structures.names[c - 1] for c in structures.ventricles) if structures else ()
    return TaskResult(name=name, unit=unit, available=available, result=result, ventricles=together)


def _structures(dataset: SyntheticDataset, reference: SyntheticDataset) -> Structures:
    """What both hold label maps of. Raises UserError where that is not the same."""
    tables = {f"{where}: {d.uri}": _label_table(d) for where, d in (("dataset", dataset), ("reference", reference))}
    return shared_structures(tables)


def _label_table(dataset: SyntheticDataset) -> LabelTable | None:
    return read_plan(open_store(dataset.uri)).labels


def label_maps(dataset: SyntheticDataset, indices: npt.NDArray[np.intp], structures: Structures) -> DatasetVolumes:
    """The stored label maps of some volumes of a dataset that has these structures, as classes."""
    table = _label_table(dataset)
    assert table is not None
    return DatasetVolumes(dataset, indices, structures.classes(table))


class _Labelled(NamedTuple):
    """Volumes for a task."""

    volumes: DatasetVolumes
    labels: npt.NDArray[Any] | DatasetVolumes
    people: npt.NDArray[Any] | None
    """(n,) subjects of real scans."""
    available: int
    """How many have a label; at most as many as asked for were drawn."""


def _labelled(
    source: _Source,
    split: str | None,
    name: str,
    covariate: Covariate | None,
    structures: Structures | None,
    most: int,
) -> _Labelled:
    """At most `most` volumes of a split that have a label, drawn at random."""
    table = source.table
    inside = np.ones(len(table), bool) if split is None else (table["split"] == split).to_numpy()
    values = as_numbers(table[name], covariate.categories) if covariate else np.zeros(len(table))
    rows = np.flatnonzero(inside & np.isfinite(values))
    if structures is not None:
        rows = np.array([row for row in rows if _has_map(source.dataset, int(table["row"].iloc[row]))], np.intp)
    available = len(rows)
    if available > most:
        rows = np.sort(np.random.default_rng(0).choice(rows, most, replace=False))
    places = table["row"].to_numpy()[rows]
    labels: npt.NDArray[Any] | DatasetVolumes
    if structures is not None:
        labels = label_maps(source.dataset, places, structures)
    else:
        labels = values[rows] if covariate else measured_marks(source.root, places)
    people = None if split is None else table["subject"].to_numpy()[rows]
    return _Labelled(DatasetVolumes(source.dataset, places), labels, people, available)


def _has_map(dataset: SyntheticDataset, place: int) -> bool:
    """False where the stored label map is lost."""
    try:
        dataset.label_map(place)
    except ValueError as error:
        log.warning("usefulness, structures: left out: %s", error)
        return False
    return True


def usefulness_findings(results: list[TaskResult]) -> list[Finding]:
    """What synthetic data lose against real data, and what they add to few: a line each, real data being 0.

    The interval spans the one over seeds and the one over test people.
    """
    lines = []
    for task in results:
        metric = METRICS[task.result.task][0]
        words = ("synthetic instead of real", "synthetic added to few real")
        for difference, what in zip(task.result.differences[:2], words, strict=True):
            e = difference.metrics[metric]
            text = f"usefulness, {task.name}: change of {metric.upper()}, {what}"
            mine = [e.mean, min(e.low, e.people_low), max(e.high, e.people_high)]
            unit, n = task.unit if metric == "mae" else "", task.result.n_test
            lines.append(finding(text, unit, mine, n, [0.0] * 3, n, "lower" if metric == "mae" else "higher"))
    return lines
