"""Classifier two-sample test (1610.06545): can a small network tell generated volumes from scans that it was not trained on?

Cross-validated by person. The floor is the same network on two halves of the scans, by person: about 0.5.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from brainsynth.config.evaluation import EvaluateConfig, TwoSampleConfig
from brainsynth.errors import UserError
from brainsynth.instruments.measured import measured_table
from brainsynth.metrics.finding import LEAST, Finding, finding
from brainsynth.metrics.intervals import ConfidenceInterval, bootstrap_interval
from brainsynth.models.device import choose_device, set_threads
from brainsynth.progress import in_minutes
from brainsynth.reading.dataset import SyntheticDataset
from brainsynth.usefulness.budgeted_training import Source, TrainingBudget, VolumeRows, train_and_predict
from brainsynth.usefulness.tasks import DatasetVolumes

log = logging.getLogger(__name__)
Places = npt.NDArray[np.intp]
METRIC = "two-sample test: accuracy of a classifier, generated against scans"


def check_two_sample(config: EvaluateConfig, dataset: SyntheticDataset, reference: SyntheticDataset) -> None:
    """Is there enough for every fold, before anything is measured? Raises UserError."""
    options = config.two_sample
    if options is None:
        return
    least = max(LEAST, 2 * options.folds, options.batch_size)
    if len(dataset) < least or len(reference) < 2 * least:
        raise UserError(
            f"two_sample: needed are {least} volumes and {2 * least} scans; there are {len(dataset)} and {len(reference)}"
        )


def two_sample_findings(
    config: EvaluateConfig, made_root: str, real_root: str, dataset: SyntheticDataset, reference: SyntheticDataset
) -> list[Finding]:
    """The accuracy, at as many generated volumes as scans, next to that between halves of the scans.

    Args:
        made_root: measurements of `dataset`; `real_root` those of `reference`.
    """
    options = config.two_sample
    if options is None:
        return []
    set_threads(config.runtime.threads_per_worker, 1)
    device, rng = choose_device(config.runtime.gpus_per_worker > 0), np.random.default_rng(0)
    made, real = measured_table(made_root), measured_table(real_root)
    people, places = real["subject"].to_numpy(), real["row"].to_numpy()
    halves = _halves(people, rng)
    n = min(len(made), len(real), options.volumes)
    generated = rng.permutation(made["row"].to_numpy())[:n]
    scans = rng.permutation(len(real))[:n]
    mine = accuracy(
        (DatasetVolumes(dataset, generated), DatasetVolumes(reference, places[scans])),
        (generated, people[scans]), options, device,
    )  # fmt: skip
    size = min(n, *(len(half) for half in halves))
    halves = [rng.permutation(half)[:size] for half in halves]
    theirs = accuracy(
        [DatasetVolumes(reference, places[half]) for half in halves], [people[half] for half in halves], options, device
    )
    return [finding(METRIC, "", mine.figure, 2 * n, theirs.figure, 2 * size, "lower")]


def _halves(people: npt.NDArray[Any], rng: np.random.Generator) -> list[Places]:
    """All scans of a random half of the people, and of the others."""
    names = rng.permutation(np.unique(people))
    first = np.isin(people, names[: len(names) // 2])
    return [np.flatnonzero(first), np.flatnonzero(~first)]


def accuracy(
    sets: Sequence[VolumeRows], people: Sequence[npt.NDArray[Any]], options: TwoSampleConfig, device: torch.device
) -> ConfidenceInterval:
    """Of a network that must say which of two sets of one size a volume of people whom it has not seen is from.

    The interval is over people.
    """
    folds = [_folds(names, options.folds) for names in people]
    right = [np.zeros(len(volumes)) for volumes in sets]
    began = time.monotonic()
    budget = TrainingBudget(options.steps, options.batch_size, options.learning_rate, options.weight_decay)
    for fold in range(options.folds):
        sources = [
            Source(volumes, np.full(len(volumes), label, np.float32), np.flatnonzero(mine != fold))
            for label, (volumes, mine) in enumerate(zip(sets, folds, strict=True))
        ]
        held = [np.flatnonzero(mine == fold) for mine in folds]
        test = _Rows([(volumes, int(row)) for volumes, rows in zip(sets, held, strict=True) for row in rows])
        odds = train_and_predict("binary", sources, test, budget, fold, device)
        right[0][held[0]], right[1][held[1]] = odds[: len(held[0])] < 0, odds[len(held[0]) :] > 0
        left_s = (time.monotonic() - began) / (fold + 1) * (options.folds - fold - 1)
        log.info("two-sample test: network %d/%d trained  ETA %s", fold + 1, options.folds, in_minutes(left_s))
    shares = [
        [float(correct[names == name].mean()) for name in np.unique(names)]
        for correct, names in zip(right, people, strict=True)
    ]
    return bootstrap_interval(lambda a, b: float((a.mean() + b.mean()) / 2), shares, method="percentile")


def _folds(people: npt.NDArray[Any], folds: int) -> npt.NDArray[np.intp]:
    """The fold of each volume; all of one person are in one."""
    names, inverse = np.unique(people, return_inverse=True)
    order = np.random.default_rng(1).permutation(len(names)) % folds
    chosen: npt.NDArray[np.intp] = order[inverse]
    return chosen


class _Rows:
    """Rows of several sources as if they were one array; read when needed."""

    def __init__(self, rows: list[tuple[VolumeRows, int]]) -> None:
        self.rows = rows
        self.shape = (len(rows), *rows[0][0].shape[1:])
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> npt.NDArray[np.float32]:
        if isinstance(place, slice):
            return np.stack([volumes[row] for volumes, row in self.rows[place]])
        volumes, row = self.rows[place]
        return np.asarray(volumes[row], np.float32)
