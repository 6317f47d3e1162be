"""Is a synthetic dataset useful? Train on synthetic and test on real, against train on real and test on real.

One small standard network per task and one fixed budget of steps, whatever the training set: only the data differ. Four
arms: all real training data; synthetic data alone; few real data; the same few with the synthetic data added, half of
each batch. Every arm is repeated over seeds, and all arms of a seed share the network's first weights and the few.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from brainsynth.config.evaluation import UsefulnessConfig
from brainsynth.errors import UserError
from brainsynth.records import record
from brainsynth.usefulness.budgeted_training import Source, TrainingBudget, VolumeRows, train_and_predict
from brainsynth.usefulness.scores import METRICS, Estimate, Task, estimates, metrics_of, outcome_of, per_seed, resampled
from brainsynth.usefulness.structures import Structures

log = logging.getLogger(__name__)
F64 = npt.NDArray[np.float64]
Labels = npt.ArrayLike | VolumeRows | Callable[[Any], npt.ArrayLike]
_MIN_TEST = 8


@record
class Arm:
    """One training set. Counts are images; those of the few vary a little with the seed, the first one's are given."""

    name: str
    """`real`, `synthetic`, `few_real` or `few_real_and_synthetic`."""
    n_real: int
    n_synthetic: int
    metrics: dict[str, Estimate]


@record
class Difference:
    """One arm's metrics minus another's, paired over seeds and over test people."""

    first: str
    minus: str
    metrics: dict[str, Estimate]


@record
class UsefulnessResult:
    """All arms of one task."""

    task: Task
    config: UsefulnessConfig
    n_test: int
    n_test_people: int
    chance: dict[str, float]
    """Metrics of one constant answer: the median of the real training labels, a coin, an empty segmentation."""
    arms: tuple[Arm, ...]
    differences: tuple[Difference, ...]


def run_usefulness(
    task: Task,
    synthetic: VolumeRows,
    synthetic_labels: Labels,
    real_train: VolumeRows,
    real_train_labels: Labels,
    real_test: VolumeRows,
    real_test_labels: Labels,
    config: UsefulnessConfig | None = None,
    *,
    real_train_groups: npt.ArrayLike | None = None,
    real_test_groups: npt.ArrayLike | None = None,
    device: torch.device | None = None,
    structures: Structures | None = None,
) -> UsefulnessResult:
    """Train and test all arms. With the default budget one arm of one seed takes below a minute on one core at 4 mm.

    Args:
        task: `continuous` (labels (N,) in a unit, such as age in years), `binary` ((N,) of 0 and 1), `segmentation`
            ((N, X, Y, Z) of 0 and 1, such as the lateral ventricles), or `structures` ((N, X, Y, Z) classes, uint8).
        synthetic: (N, X, Y, Z) volumes on one grid, on any intensity scale (each is standardised), as are the others.
        synthetic_labels: the labels, or a callable that makes them from the volumes. For a fair segmentation task label
            synthetic and real volumes with the same ruler.
        config: the budget; the default if None.
        real_train_groups: (N,) subject ids; with `real_test_groups` too, nobody may be in both sets.
        structures: what the classes are, of the task `structures`.
        device: the CPU if None. On a CPU equal arguments give equal results.

    Raises:
        UserError: shapes or labels that do not fit, too few volumes, the same person in training and test.
    """
    config = config or UsefulnessConfig()
    if task not in METRICS:
        raise UserError(f"task = {task!r} must be one of {', '.join(METRICS)}")
    if (task == "structures") != (structures is not None):
        raise UserError("the task `structures`, and no other, needs `structures`: what the classes are")
    spec = (synthetic, synthetic_labels), (real_train, real_train_labels), (real_test, real_test_labels)
    made, train, test = (
        _source(task, volumes, labels, name)
        for (volumes, labels), name in zip(spec, ("synthetic", "real training", "real test"), strict=True)
    )
    people = [_people(g, s) for g, s in ((real_train_groups, train), (real_test_groups, test))]
    _check(config, made, train, test, people, real_train_groups is not None and real_test_groups is not None)
    budget = TrainingBudget(config.steps, config.batch_size, config.learning_rate, config.weight_decay, config.box_xyz)
    device = device or torch.device("cpu")
    outcomes: dict[str, list[F64]] = {}
    counts: dict[str, tuple[int, int]] = {}
    for seed in config.seeds:
        few = train.subset(_few(task, train, people[0], config.few_fraction, seed))
        arms = {"real": [train], "synthetic": [made], "few_real": [few], "few_real_and_synthetic": [few, made]}
        for name, sources in arms.items():
            counts.setdefault(name, (sum(len(s) for s in sources if s is not made), (made in sources) * len(made)))
            predicted = train_and_predict(task, sources, test.volumes, budget, seed, device, structures)
            outcomes.setdefault(name, []).append(outcome_of(task, predicted, test.labels, structures))
            log.info("usefulness, %s: arm %s, seed %d done", task, name, seed)
    names = metrics_of(task, structures)
    return _result(task, config, names, outcomes, counts, people[1], _chance(task, names, train, test))


def _source(task: Task, volumes: VolumeRows, labels: Labels, name: str) -> Source:
    given: Any = labels(volumes) if callable(labels) else labels
    values = given if task == "structures" else np.asarray(given)  # label maps may be read when they are needed
    shape = volumes.shape if task in ("segmentation", "structures") else volumes.shape[:1]
    if volumes.ndim != 4 or values.shape != shape:
        raise UserError(f"{name}: labels {values.shape} do not fit volumes {volumes.shape} in a {task} task")
    if task == "structures":
        return Source(volumes, values)
    if not np.isfinite(values).all():
        raise UserError(f"{name}: some labels are not finite; leave those volumes out and report how many")
    if task != "continuous" and not np.isin(values, (0, 1)).all():
        raise UserError(f"{name}: labels of a {task} task must be 0 and 1")
    return Source(volumes, values.astype(np.float32))


def _people(groups: npt.ArrayLike | None, source: Source) -> npt.NDArray[Any]:
    names = np.arange(len(source)) if groups is None else np.asarray(groups)
    if names.shape != (len(source),):
        raise UserError(f"groups of shape {names.shape} must name the subject of each of the {len(source)} volumes")
    return names


def _check(
    config: UsefulnessConfig, made: Source, train: Source, test: Source, people: list[npt.NDArray[Any]], named: bool
) -> None:
    if len({source.volumes.shape[1:] for source in (made, train, test)}) > 1:
        raise UserError("synthetic, real training and real test volumes must be on one grid; resample them")
    if named and (both := set(people[0].tolist()) & set(people[1].tolist())):
        raise UserError(f"{len(both)} people are in training and test, {min(both)!r} for one; split by person")
    least = config.batch_size / config.few_fraction
    if len(np.unique(people[0])) < least or len(made) < config.batch_size or len(np.unique(people[1])) < _MIN_TEST:
        raise UserError(
            f"needed: {least:.0f} real training people (few_fraction of them fill one batch), {config.batch_size} "
            f"synthetic volumes, {_MIN_TEST} test people; there are {len(np.unique(people[0]))}, {len(made)} and "
            f"{len(np.unique(people[1]))}"
        )
    for name, source in (("training", train), ("test", test)):
        if isinstance(source.labels, np.ndarray) and float(np.ptp(source.labels)) == 0:
            raise UserError(f"all real {name} labels are the same: there is nothing to learn or to test")


def _few(task: Task, train: Source, people: npt.NDArray[Any], fraction: float, seed: int) -> npt.NDArray[np.intp]:
    """Rows of this share of the people: every so-manieth of them in the order of their labels, from a random start."""
    unit = np.unique(people, return_inverse=True)[1]
    label = train.labels[:] if task in ("continuous", "binary") else np.zeros(len(train))
    rng = np.random.default_rng([seed, 1])
    order = np.lexsort((rng.random(unit.max() + 1), np.bincount(unit, label) / np.bincount(unit)))
    marks = np.floor(np.arange(len(order) + 1) * fraction + rng.random())
    return np.flatnonzero(np.isin(unit, order[np.diff(marks) > 0]))


def _chance(task: Task, names: tuple[str, ...], train: Source, test: Source) -> dict[str, float]:
    if task == "continuous":
        return {"mae": float(np.abs(np.median(train.labels[:]) - test.labels[:]).mean()), "r": 0.0}
    return dict.fromkeys(names, 0.5 if task == "binary" else 0.0)


def _result(
    task: Task,
    config: UsefulnessConfig,
    names: tuple[str, ...],
    outcomes: dict[str, list[F64]],
    counts: dict[str, tuple[int, int]],
    people: npt.NDArray[Any],
    chance: dict[str, float],
) -> UsefulnessResult:
    seeds = {name: per_seed(task, each) for name, each in outcomes.items()}
    drawn = {name: resampled(task, each, people) for name, each in outcomes.items()}
    pairs = (("synthetic", "real"), ("few_real_and_synthetic", "few_real"), ("few_real_and_synthetic", "real"))
    return UsefulnessResult(
        task=task,
        config=config,
        n_test=len(people),
        n_test_people=len(np.unique(people)),
        chance=chance,
        arms=tuple(
            Arm(name=name, n_real=real, n_synthetic=made, metrics=estimates(names, seeds[name], drawn[name]))
            for name, (real, made) in counts.items()
        ),
        differences=tuple(
            Difference(first=a, minus=b, metrics=estimates(names, seeds[a] - seeds[b], drawn[a] - drawn[b], clip=False))
            for a, b in pairs
        ),
    )
