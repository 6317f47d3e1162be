"""Effect sizes of structures at equal covariates: known differences are found, covariates explain themselves away."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.evaluation.structures import structure_columns, structure_effects
from brainsynth.metrics.finding import Finding

SCHEMA = CovariateSchema(
    covariates=(
        Covariate(name="age", kind="continuous", unit="years", low=18.0, high=96.0),
        Covariate(name="volume", kind="continuous", unit="ml", low=2.0, high=155.0, scale="log"),
        Covariate(name="site", kind="categorical", categories=("a", "b", "c")),
    )
)
COLUMNS = {"hippocampus": "hippocampus_ml"}
SD = 0.4


def people(count: int, seed: int, ages: tuple[float, float] = (20, 90), shift: float = 0.0) -> pd.DataFrame:
    """Volumes that depend on all covariates, with an SD of 0.4 ml around."""
    rng = np.random.default_rng(seed)
    age, volume, site = rng.uniform(*ages, count), np.exp(rng.normal(3, 0.6, count)), rng.choice(list("abc"), count)
    clean = (
        9
        - 0.03 * age
        - 0.0002 * (age - 50) ** 2
        + 0.5 * np.log(volume)
        + np.select([site == "b", site == "c"], [1, -2])
    )
    names = [f"{seed}x{i}" for i in range(count)]
    ml = clean + SD * (shift + rng.normal(0, 1, count))
    table = {"sample_id": names, "subject": names, "age": age, "volume": volume, "site": site, "hippocampus_ml": ml}
    return pd.DataFrame(table)


def effect(made: pd.DataFrame, train: pd.DataFrame | None = None, held: pd.DataFrame | None = None) -> Finding:
    train = people(300, 1) if train is None else train
    (found,) = structure_effects(COLUMNS, SCHEMA, made, train, people(80, 2) if held is None else held)
    return found


@pytest.mark.parametrize("shift", [0.0, 0.6, -1.5])
def test_a_known_difference_is_found_in_standard_deviations(shift: float) -> None:
    found = effect(people(200, 6, shift=shift))
    assert found.value == pytest.approx(shift, abs=0.2)
    assert found.low < shift < found.high
    assert found.as_real == (shift == 0)
    assert found.unit == "SD"
    assert abs(found.real) < 0.3


def test_other_ages_and_sites_are_no_difference() -> None:
    """Of people of 60 to 90 the raw mean is far lower: that is the covariate, not the model."""
    old = people(200, 4, ages=(60, 90))
    old = old[old["site"] == "c"].reset_index(drop=True)
    train = people(300, 1)
    raw = (old["hippocampus_ml"].mean() - train["hippocampus_ml"].mean()) / train["hippocampus_ml"].std()
    assert raw < -1
    assert abs(effect(old, train).value) < 0.3


def test_the_interval_covers_in_repeated_sampling() -> None:
    inside = 0
    for seed in range(40):
        found = effect(people(60, 100 + seed, shift=0.5), people(120, 200 + seed), people(40, 300 + seed))
        inside += found.low <= 0.5 <= found.high
    assert 33 <= inside <= 40


def test_people_with_several_scans_are_drawn_together() -> None:
    """Ten copies of each scan are no more people: the interval does not shrink."""
    train, held, made = people(120, 1), people(40, 2), people(60, 3)
    once = effect(made, train, held)
    many = effect(made, pd.concat([train] * 10, ignore_index=True), pd.concat([held] * 10, ignore_index=True))
    assert many.high - many.low == pytest.approx(once.high - once.low, rel=0.25)
    assert many.real_high - many.real_low == pytest.approx(once.real_high - once.real_low, rel=0.25)


def test_unknown_values_are_left_out_and_too_few_rows_give_no_figure() -> None:
    made, whole = people(100, 3), effect(people(100, 3)).value
    made.loc[:4, "age"] = np.nan
    made.loc[5:9, "hippocampus_ml"] = np.nan
    made.loc[10:14, "site"] = ""
    found = effect(made)
    assert found.n == 85
    assert found.value == pytest.approx(whole, abs=0.1)
    assert structure_effects(COLUMNS, SCHEMA, made, people(30, 1), people(80, 2)) == []
    assert structure_effects(COLUMNS, SCHEMA, made.iloc[20:26], people(300, 1), people(80, 2)) == []


def test_counted_volumes_are_taken_before_segmented_ones_and_only_what_both_have() -> None:
    counted = pd.DataFrame(columns=["label_volume_brain_stem", "label_volume_cortex", "hippocampus_ml", "age"])
    real = pd.DataFrame(columns=["label_volume_brain_stem", "hippocampus_ml", "thalamus_ml"])
    assert structure_columns(counted, real) == {"brain stem": "label_volume_brain_stem"}
    assert structure_columns(counted.drop(columns="label_volume_brain_stem"), real) == {"hippocampus": "hippocampus_ml"}
