"""What a measurement found, read back a shard at a time: what judges read instead of volumes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from brainsynth.config.evaluation import VENTRICLES
from brainsynth.errors import UserError
from brainsynth.metrics.finding import LEAST
from brainsynth.storage.arrays import decode_shard, shard_key
from brainsynth.storage.commit import read_commits, read_plan, read_samples
from brainsynth.storage.filesystem import open_store

F32 = npt.NDArray[np.float32]
BINS = 256
"""Of the intensity histogram, over [0, 1]."""


def measured_shards(root: str, *names: str) -> Iterator[tuple[pd.DataFrame, dict[str, F32]]]:
    """A shard at a time, in order: what was planned and every scalar found, and the rows of the named arrays.

    Table and arrays have one line per volume (sample_id, row, split, subject, covariates, …). Numbers that could not be
    measured are NaN. Volumes whose measurement failed are left out.
    """
    store = open_store(root)
    plan = read_plan(store)
    planned = read_samples(store, plan)
    arrays = [array for array in plan.arrays if array.name in names]
    for commit in read_commits(store, plan):
        shard = plan.shard(commit.shard)
        good = [sample for sample in commit.samples if sample.status == "ok"]
        rows = np.array([sample.row for sample in good], np.intp)
        scalars = pd.DataFrame([{"row": sample.row, **sample.extra} for sample in good])
        table = planned.iloc[rows].reset_index(drop=True).join(scalars)
        data = {a.name: decode_shard(plan, a, shard, store.read(shard_key(a, shard.index))) for a in arrays}
        yield table, {name: values[rows - shard.start] for name, values in data.items()}


def measured_table(root: str) -> pd.DataFrame:
    """The table of all measured volumes, as `measured_shards` has it."""
    return pd.concat([table for table, _ in measured_shards(root)], ignore_index=True)


def measured_blocks(root: str, name: str) -> Iterator[F32]:
    """(n, …) rows of one array, a shard at a time and in order, without the rows that failed."""
    return (arrays[name] for _, arrays in measured_shards(root, name))


class Measured:
    """The measurements of a dataset: its table and the matrix of tissue features, row by row."""

    def __init__(self, root: str) -> None:
        self.table = measured_table(root)
        self.tissue = np.concatenate(list(measured_blocks(root, "tissue")))
        assert len(self.table) == len(self.tissue)

    def where(self, covariate: str, category: str) -> Measured:
        """The volumes of one category."""
        rows = np.flatnonzero(self.table[covariate] == category)
        part = Measured.__new__(Measured)
        part.table, part.tissue = self.table.iloc[rows].reset_index(drop=True), self.tissue[rows]
        return part

    def split(self, name: str) -> npt.NDArray[np.intp]:
        """Rows of one split. Raises UserError when there are too few."""
        if "split" not in self.table:
            raise UserError("reference: it has no splits; give a cohort made by `brainsynth prepare-cohort`")
        rows = np.flatnonzero(self.table["split"] == name)
        if len(rows) < LEAST:
            raise UserError(f"reference: {len(rows)} measured scans in its {name} split; at least {LEAST} are needed")
        return rows


def measured_marks(root: str, rows: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint8]:
    """(n, X, Y, Z) ventricles of these rows of a measurement, rows in ascending order."""
    store = open_store(root)
    plan = read_plan(store)
    array = next(a for a in plan.arrays if a.name == VENTRICLES)
    marks = []
    for index in np.unique(rows // plan.samples_per_shard):
        shard = plan.shard(int(index))
        values = decode_shard(plan, array, shard, store.read(shard_key(array, shard.index)))
        marks.append(values[rows[(rows >= shard.start) & (rows < shard.stop)] - shard.start])
    return np.concatenate(marks)


def instruments_of(root: str) -> str:
    """What measured a dataset, as text that is equal for equal instruments."""
    identity = read_plan(open_store(root)).identity
    return json.dumps({key: value for key, value in identity.items() if key != "source"}, sort_keys=True)
