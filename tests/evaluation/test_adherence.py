"""Adherence on invented numbers: what a user's table says is calibrated, judged, and refused where it makes no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from brainsynth.config.evaluation import EvaluateConfig, TableRuler
from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.errors import UserError
from brainsynth.evaluation.adherence import Scatter, adherence, check_rulers, measured_values
from brainsynth.instruments.measured import Measured
from brainsynth.metrics.finding import Finding

SCHEMA = CovariateSchema(
    covariates=(
        Covariate(name="sex", kind="binary", categories=("F", "M")),
        Covariate(name="volume", kind="continuous", unit="ml", low=3.0, high=150.0),
    )
)
TRAIN, HELD, MADE = 60, 40, 100


def measured(count: int, seed: int) -> Measured:
    """As read from a measurement: asked values, nothing measured."""
    rng = np.random.default_rng(seed)
    found = Measured.__new__(Measured)
    ids = [f"s{seed}x{i}" for i in range(count)]
    sex, volume = rng.choice(["F", "M"], count), rng.uniform(10, 60, count)
    found.table = pd.DataFrame({"sample_id": ids, "subject": ids, "sex": sex, "volume": volume})
    return found


def judged(folder: Path, column: str = "volume", **change: Any) -> tuple[dict[str, Finding], pd.DataFrame]:
    """Of both covariates by a table; `change` alters the tool's answers: factor (of the dataset), constant, chance."""
    rng = np.random.default_rng(1)
    paths, both = {}, {}
    for which, n, seed, factor in (
        ("dataset", MADE, 2, change.get("factor", 1.0)),
        ("reference", TRAIN + HELD, 3, 1.0),
    ):
        both[which] = measured(n, seed)
        asked = both[which].table
        tool = 0.8 * factor * asked["volume"] + 4 + rng.normal(0, 1, n)
        if "constant" in change:
            tool[:] = 7.0
        male = np.where(asked["sex"] == "M", 0.9, 0.1) if "chance" not in change else np.full(n, change["chance"])
        paths[which] = str(folder / f"{which}.csv")
        pd.DataFrame({"sample_id": asked["sample_id"], "ml": tool, "p_male": male}).to_csv(paths[which], index=False)
    rulers = {"volume": TableRuler(**paths, columns=("ml",)), "sex": TableRuler(**paths, columns=("p_male",))}
    config = EvaluateConfig(dataset="d", reference="r", output="o", tables=rulers)
    check_rulers(config, SCHEMA, "d")
    rows = np.arange(TRAIN + HELD)
    findings, scatters = adherence(config, SCHEMA, both["dataset"], both["reference"], rows[:TRAIN], rows[TRAIN:])
    return {f.metric: f for f in findings}, measured_values(scatters)


def test_a_sound_table_passes(tmp_path: Path) -> None:
    found, values = judged(tmp_path)
    assert all(finding.as_real for finding in found.values())
    assert found["volume: r of measured with asked"].value > 0.98
    assert abs(found["volume: bias"].value) < 0.5
    assert found["sex: AUC of measured for asked"].value == 1
    assert list(values) == ["sample_id", "measured_sex", "measured_volume"]
    assert values["measured_volume"].mean() == pytest.approx(measured(MADE, 2).table["volume"].mean(), abs=0.5)


def test_volumes_that_are_a_twentieth_too_large_are_seen(tmp_path: Path) -> None:
    found, _ = judged(tmp_path, factor=1.05)
    assert not found["volume: bias"].as_real
    assert found["volume: bias"].value == pytest.approx(0.05 * 35, abs=0.5)
    assert found["volume: r of measured with asked"].as_real


def test_a_tool_that_says_one_thing_of_all_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=f"volume: the ruler cannot be calibrated on {TRAIN} training scans.*all the same"
    ):
        judged(tmp_path, constant=True)


def test_a_category_needs_a_probability(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sex: the ruler must give the probability of M, in \[0, 1\]"):
        judged(tmp_path, chance=1.5)


def test_a_structure_is_no_category() -> None:
    from brainsynth.config.evaluation import SegmentationConfig

    weights = SegmentationConfig(segmenter="w")
    config = EvaluateConfig(
        dataset="d", reference="r", output="o", segmentation=weights, structures={"sex": "brain_ml"}
    )
    with pytest.raises(UserError, match="structures: sex is not a number"):
        check_rulers(config, SCHEMA, "d")


def test_a_covariate_keeps_its_name_whatever_is_in_it_and_parts_of_the_rows_are_one_column() -> None:
    parts = [
        Scatter(
            covariate="age (years)",
            within=f" (cohort {c})",
            unit="",
            ruler="",
            sample_ids=(c,),
            asked=(1.0,),
            measured=(m,),
        )
        for c, m in (("a", 2.0), ("b", 3.0))
    ]
    values = measured_values(parts)
    assert list(values) == ["sample_id", "measured_age (years)"]
    assert values["measured_age (years)"].tolist() == [2.0, 3.0]
    assert parts[1].title == "age (years) (cohort b)"
