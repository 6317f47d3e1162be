"""What judging keeps of a measured set while its shards stream by: the same memory for a hundred volumes as for 100,000."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from brainsynth.errors import UserError
from brainsynth.instruments.measured import measured_shards
from brainsynth.instruments.tissue_features import tissue_volumes
from brainsynth.metrics.finding import LEAST
from brainsynth.metrics.frechet import GaussianStats
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import open_store
from brainsynth.volume import VolumeSpec

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
LIMIT = 10_000
"""Volumes kept at most."""
KEPT = ("histogram", "features")
"""Arrays of which rows are kept. Of the maps, some 20,000 numbers a volume, only what is made of them stays."""
SIDES = "left_right"
"""Column: correlation of a volume's left-right difference with the usual one."""
_SOFT = "soft_tissue_"


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSample:
    """Volumes drawn at random from a measured set, in random order, so that its first n are a random sample, too."""

    count: int
    """Volumes in the whole set."""
    stats: GaussianStats | None
    """Of the features of all; None without features."""
    mean_skew: F64
    """(A,) mean left-right difference of all."""
    table: pd.DataFrame
    """Of the kept volumes: as `measured_shards` has it, soft tissue volumes, and `SIDES` where there is a usual one."""
    arrays: dict[str, F32]
    """(kept, length) each of `KEPT` that was measured."""
    covariates: tuple[str, ...]
    """Columns that were asked for or are known, not measured."""

    @classmethod
    def read(
        cls, root: str, split: str | None = None, *, usual_skew: F64 | None = None, limit: int = LIMIT
    ) -> MeasuredSample:
        """Stream a measured set, or one split of it.

        Every row gets a random key, from its shard's number; the `limit` smallest keys are kept. So what is kept neither
        depends on the order of shards nor on how they are shared out, and two samples could be merged by their keys.

        Args:
            usual_skew: (A,) mean left-right difference of training scans, for `SIDES`.

        Raises:
            UserError: fewer than 8 volumes in that split, or no splits.
        """
        plan = read_plan(open_store(root))
        stats: GaussianStats | None = None
        count, skew = 0, np.zeros(1)
        kept = _Kept([], [], [])
        for index, (every, measured) in enumerate(measured_shards(root, *KEPT, "tissue", "skew")):
            rows, key = _rows_of(every, split), np.random.default_rng([0, index]).random(len(every))
            if not len(rows):
                continue
            arrays = {name: values[rows] for name, values in measured.items()}
            count += len(rows)
            skew = skew + arrays["skew"].sum(axis=0, dtype=np.float64)
            if "features" in arrays:
                stats = stats or GaussianStats(arrays["features"].shape[1])
                stats.update(arrays["features"])
            kept.tables.append(_with_figures(every.iloc[rows], arrays, plan.volume, usual_skew))
            kept.blocks.append({name: arrays[name] for name in KEPT if name in arrays})
            kept.keys.append(key[rows])
            if sum(map(len, kept.keys)) > 2 * limit:
                kept = kept.smallest(limit)
        if count < LEAST:
            where = f"reference: its {split} split" if split else "dataset: it"
            raise UserError(f"{where} has {count} measured volumes; at least {LEAST} are needed")
        kept = kept.smallest(limit)
        return cls(
            count=count, stats=stats, mean_skew=skew / count, table=kept.tables[0].reset_index(drop=True),
            arrays=kept.blocks[0], covariates=plan.covariates.names,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.table)

    @property
    def volumes(self) -> dict[str, F64]:
        """Name → ml of each kept volume: soft tissue volumes, and what a segmentation measured (NaN where it failed)."""
        volumes = {}
        for column in (str(c) for c in self.table if str(c).endswith("_ml") and c not in self.covariates):
            soft = column.startswith(_SOFT)
            name = column.removeprefix(_SOFT).removesuffix("_ml").replace("_", " ")
            volumes[f"{name} (tissue maps)" if soft else name] = self.table[column].to_numpy(np.float64)
        return volumes


def _rows_of(table: pd.DataFrame, split: str | None) -> npt.NDArray[np.intp]:
    if split is None:
        return np.arange(len(table))
    if "split" not in table:
        raise UserError("reference: it has no splits; give a cohort made by `brainsynth prepare-cohort`")
    return np.flatnonzero(table["split"] == split)


def _with_figures(
    table: pd.DataFrame, arrays: dict[str, F32], grid: VolumeSpec, usual_skew: F64 | None
) -> pd.DataFrame:
    """The table, and what the maps say: ml of each tissue, and the correlation with the usual left-right difference."""
    soft = tissue_volumes(arrays["tissue"], grid)
    table = table.assign(**{f"{_SOFT}{name}_ml": ml for name, ml in soft.items()})
    if usual_skew is None:
        return table
    lengths = np.linalg.norm(arrays["skew"].astype(np.float64), axis=1) * np.linalg.norm(usual_skew)
    return table.assign(**{SIDES: arrays["skew"] @ usual_skew / np.maximum(lengths, 1e-12)})


@dataclass(slots=True)
class _Kept:
    """Parts of equal meaning, row by row."""

    tables: list[pd.DataFrame]
    blocks: list[dict[str, F32]]
    keys: list[F64]

    def smallest(self, limit: int) -> _Kept:
        """One part instead of many: the rows of the `limit` smallest keys, smallest first."""
        keys = np.concatenate(self.keys)
        chosen = np.argsort(keys, kind="stable")[:limit]
        arrays = {name: np.concatenate([b[name] for b in self.blocks])[chosen] for name in self.blocks[0]}
        return _Kept([pd.concat(self.tables, ignore_index=True).iloc[chosen]], [arrays], [keys[chosen]])
