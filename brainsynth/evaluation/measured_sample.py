"""What judging keeps of a measured set while its shards stream by: the same memory for a hundred volumes as for 100,000."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from brainsynth.errors import UserError
from brainsynth.evaluation.finding import LEAST
from brainsynth.evaluation.frechet import GaussianStats
from brainsynth.evaluation.measurement import measured_shards
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import open_store
from brainsynth.volume import VolumeSpec

F32 = npt.NDArray[np.float32]
LIMIT = 10_000
"""Volumes kept at most."""
ARRAYS = ("histogram", "tissue", "skew", "features")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSample:
    """Volumes drawn at random from a measured set, in random order, so that its first n are a random sample, too."""

    count: int
    """Volumes in the whole set."""
    grid: VolumeSpec
    """Of the volumes."""
    covariates: tuple[str, ...]
    """Names of what was asked for or is known, not measured."""
    stats: GaussianStats | None
    """Of the features of all; None without features."""
    table: pd.DataFrame
    """Of the kept volumes, as `measured_shards` has it."""
    arrays: dict[str, F32]
    """(kept, length) each of `ARRAYS` that was measured."""

    @classmethod
    def read(cls, root: str, split: str | None = None, limit: int = LIMIT) -> MeasuredSample:
        """Stream a measured set.

        Every row gets a random key, from its shard's number; the `limit` smallest keys are kept. So what is kept neither
        depends on the order of shards nor on how they are shared out, and two samples could be merged by their keys.

        Raises:
            UserError: fewer than 8 volumes in that split, or no splits.
        """
        stats: GaussianStats | None = None
        count = 0
        tables: list[pd.DataFrame] = []
        blocks: list[dict[str, F32]] = []
        keys: list[npt.NDArray[np.float64]] = []
        for index, (table, arrays) in enumerate(measured_shards(root, *ARRAYS)):
            key = np.random.default_rng([0, index]).random(len(table))
            if split is not None:
                if "split" not in table:
                    raise UserError("reference: it has no splits; give a cohort made by jobs/prepare_cohort.py")
                mine = np.flatnonzero(table["split"] == split)
                table, key = table.iloc[mine], key[mine]
                arrays = {name: values[mine] for name, values in arrays.items()}
            if not len(table):
                continue
            count += len(table)
            if "features" in arrays:
                stats = stats or GaussianStats(arrays["features"].shape[1])
                stats.update(arrays["features"])
            tables.append(table)
            blocks.append(arrays)
            keys.append(key)
            if sum(map(len, keys)) > 2 * limit:
                tables, blocks, keys = _smallest(tables, blocks, keys, limit)
        if count < LEAST:
            where = f"reference: its {split} split" if split else "dataset: it"
            raise UserError(f"{where} has {count} measured volumes; at least {LEAST} are needed")
        (table,), (arrays,), _ = _smallest(tables, blocks, keys, limit)
        plan = read_plan(open_store(root))
        return cls(
            count=count, grid=plan.volume, covariates=plan.covariates.names, stats=stats,
            table=table.reset_index(drop=True), arrays=arrays,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.table)


def _smallest(
    tables: list[pd.DataFrame], blocks: list[dict[str, F32]], keys: list[npt.NDArray[np.float64]], limit: int
) -> tuple[list[pd.DataFrame], list[dict[str, F32]], list[npt.NDArray[np.float64]]]:
    """One part instead of many: the rows of the `limit` smallest keys, smallest first."""
    every = np.concatenate(keys)
    chosen = np.argsort(every, kind="stable")[:limit]
    arrays = {name: np.concatenate([block[name] for block in blocks])[chosen] for name in blocks[0]}
    return [pd.concat(tables, ignore_index=True).iloc[chosen]], [arrays], [every[chosen]]
