"""What one covariate does to one brain: volumes of one noise in which it alone moves, and what a ruler reads on them."""

from __future__ import annotations

import copy
import dataclasses
import re

import numpy as np
import numpy.typing as npt
import pandas as pd

from brainsynth.bundle.spec import BundleSpec
from brainsynth.config.evaluation import EvaluateConfig, TrajectoryConfig
from brainsynth.covariates.sweep import usual_values
from brainsynth.errors import UserError
from brainsynth.evaluation.adherence import adherence
from brainsynth.instruments.measured import Measured
from brainsynth.reading.dataset import SyntheticDataset
from brainsynth.records import record
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import open_store

F64 = npt.NDArray[np.float64]
LOW, HIGH = 0.05, 0.95
"""Quantiles of the training distribution between which a covariate moves."""


@record
class Trajectory:
    """One covariate over the points of every noise."""

    covariate: str
    unit: str
    sample_ids: tuple[tuple[str, ...], ...]
    """(seeds, points)"""
    asked: tuple[float, ...]
    """(points,) ascending."""
    measured: tuple[tuple[float, ...], ...] | None
    """(seeds, points) in the unit; None where there is no ruler."""


def trajectory_rows(config: TrajectoryConfig, bundle: BundleSpec) -> pd.DataFrame:
    """The table to generate: `sample_id`, `noise_seed` and every covariate.

    All others stay at their median in training; categories at the first one.

    Raises:
        UserError: a covariate to move is not a continuous covariate of the model; the bundle has no distribution.
    """
    distribution = bundle.distribution
    if distribution is None:
        raise UserError(
            "trajectories.bundle: it has no distribution of covariates, so the range to move them over is not known"
        )
    continuous = [c.name for c in bundle.covariates.covariates if c.kind == "continuous"]
    wrong = [name for name in config.covariates if name not in continuous]
    if wrong:
        raise UserError(
            f"trajectories.covariates: {', '.join(wrong)} is not a continuous covariate of the model; those are "
            f"{', '.join(continuous)}"
        )
    usual = usual_values(bundle.covariates, distribution)
    rows = []
    for name in config.covariates:
        low, high = (distribution.quantile(name, share) for share in (LOW, HIGH))
        for point, value in enumerate(np.linspace(low, high, config.points)):
            for seed in range(config.seeds):
                rows.append({"sample_id": _id(name, seed, point), "noise_seed": seed, **usual, name: float(value)})
    return pd.DataFrame(rows)


def read_trajectories(
    config: EvaluateConfig, options: TrajectoryConfig, made_root: str, real_root: str, dataset: SyntheticDataset
) -> list[Trajectory]:
    """Asked and measured values of the trajectories, with the rulers that judge the dataset; ridge in place of tables."""
    made, real = Measured(made_root), Measured(real_root)
    schema = read_plan(open_store(made_root)).covariates
    config = dataclasses.replace(config, tables={})  # a table of the user's has no rows of these volumes
    known = dataset.table.set_index("sample_id")
    out = []
    for covariate in (c for c in schema.covariates if c.name in options.covariates):
        name = covariate.name
        ids = [[_id(name, seed, point) for point in range(options.points)] for seed in range(options.seeds)]
        flat = [i for line in ids for i in line]
        lost = [i for i in flat if i not in known.index]
        if lost:
            raise UserError(f"trajectories: {', '.join(lost[:5])} could not be made; see its dataset's manifest")
        part = copy.copy(made)
        rows = np.flatnonzero(made.table["sample_id"].isin(flat))
        part.table, part.tissue = made.table.iloc[rows].reset_index(drop=True), made.tissue[rows]
        one = dataclasses.replace(schema, covariates=(covariate,))
        _, scatters = adherence(config, one, part, real, real.split("train"), real.split("validation"))
        readings = dict(zip(scatters[0].sample_ids, scatters[0].measured, strict=True)) if scatters else None
        out.append(
            Trajectory(
                covariate=name,
                unit=covariate.unit,
                sample_ids=tuple(map(tuple, ids)),
                asked=tuple(float(value) for value in known.loc[ids[0], name]),
                measured=None if readings is None else _in_order(readings, ids),
            )
        )
    return out


def _in_order(readings: dict[str, float], ids: list[list[str]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(readings.get(i, float("nan")) for i in line) for line in ids)


def _id(name: str, seed: int, point: int) -> str:
    return f"{re.sub('[^A-Za-z0-9]', '', name)[:40]}seed{seed}point{point:02d}"
