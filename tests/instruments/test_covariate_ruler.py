"""Rulers for covariates: closed form against a plain solver, what phantoms encode, planted faults, real scans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainsynth.cohort.phantom import make_phantom, phantom_covariates, phantom_grid
from brainsynth.errors import UserError
from brainsynth.instruments.covariate_ruler import CovariateRuler, cross_predict
from brainsynth.instruments.tissue_features import tissue_features
from brainsynth.metrics.agreement import agreement, discrimination
from brainsynth.records import from_dict, to_dict
from brainsynth.volume import VolumeSpec, resample

GRID = phantom_grid(8.0, (20, 26, 20))


@pytest.fixture(scope="module")
def phantoms() -> tuple[np.ndarray, pd.DataFrame]:
    table = phantom_covariates(110, 3)
    images = [
        make_phantom(row.age, row.sex, row.ventricular_volume, row.brain_volume, GRID, i).image
        for i, row in enumerate(table.itertuples())
    ]
    return np.stack([tissue_features(image, GRID) for image in images]), table.assign(male=table["sex"] == "M")


def linear(n: int, seed: int, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 12))
    return x.astype(np.float32), 50 + 8 * x[:, 0] - 5 * x[:, 3] + rng.normal(0, noise, n)


def test_weights_are_those_of_ridge_regression() -> None:
    x, y = linear(60, 0, noise=3.0)
    ruler = CovariateRuler.fit(x, y, groups=np.arange(60), own_error=False)
    centred = x.astype(np.float64) - x.mean(0, dtype=np.float64)
    penalty = ruler.alpha * np.square(centred).sum() / 60 * np.eye(12)
    expected = np.linalg.solve(centred.T @ centred + penalty, centred.T @ (y - y.mean()))
    np.testing.assert_allclose(ruler.weights, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ruler.predict(x), centred @ expected + y.mean(), rtol=1e-5)


def test_a_linear_covariate_is_recovered_on_unseen_rows() -> None:
    x, y = linear(200, 1)
    ruler = CovariateRuler.fit(x[:120], y[:120], groups=np.arange(120))
    found = agreement(ruler.predict(x[120:]), y[120:])
    assert found.r > 0.999
    assert found.mae < 0.2
    assert ruler.own_error is not None
    assert ruler.own_error.plain is not None
    assert ruler.own_error.plain.mae == pytest.approx(found.mae, rel=0.5)


def test_the_correction_undoes_shrinkage_without_looking_at_the_truth() -> None:
    x, y = linear(400, 2, noise=8.0)
    noise = np.random.default_rng(3).normal(size=(400, 300)).astype(np.float32)
    x = np.concatenate([x, noise], 1)  # many useless features: a ridge shrinks
    ruler = CovariateRuler.fit(x[:150], y[:150], groups=np.arange(150), own_error=False)
    plain = agreement(ruler.predict(x[150:]), y[150:])
    corrected = agreement(ruler.predict(x[150:], corrected=True), y[150:])
    assert plain.slope < 0.7
    assert abs(corrected.slope - 1) < 0.2
    assert corrected.r == pytest.approx(plain.r)
    assert corrected.mae > plain.mae  # what it costs


def test_phantoms_give_their_covariates_back(phantoms: tuple[np.ndarray, pd.DataFrame]) -> None:
    x, table = phantoms
    for name, least in (("age", 0.8), ("ventricular_volume", 0.8), ("brain_volume", 0.9)):
        ruler = CovariateRuler.fit(x, table[name], groups=table["participant_id"])
        assert ruler.own_error is not None
        assert ruler.own_error.plain is not None
        assert ruler.own_error.plain.r_low > least - 0.05
        assert ruler.own_error.plain.r > least
    sex = CovariateRuler.fit(x, table["male"], groups=table["participant_id"], kind="binary")
    assert sex.own_error is not None
    assert sex.own_error.categories is not None
    assert sex.own_error.categories.auc_low > 0.8
    assert from_dict(type(sex.own_error), to_dict(sex.own_error), "test") == sex.own_error


def test_shuffled_labels_give_nothing(phantoms: tuple[np.ndarray, pd.DataFrame]) -> None:
    x, table = phantoms
    found, odds = [], []
    for seed in range(6):
        shuffled = np.random.default_rng(seed).permutation(len(table))
        age, male = table["age"].to_numpy()[shuffled], table["male"].to_numpy()[shuffled]
        found.append(np.corrcoef(cross_predict(x, age, groups=table["participant_id"], seed=seed)[0], age)[0, 1])
        odds.append(discrimination(cross_predict(x, male, groups=range(110), kind="binary", seed=seed)[0], male).auc)
    assert abs(np.mean(found)) < 0.15
    assert abs(np.mean(odds) - 0.5) < 0.1


def test_sessions_of_one_person_never_stand_on_both_sides() -> None:
    rng = np.random.default_rng(5)
    people = np.repeat(np.arange(40), 3)
    x = rng.normal(size=(40, 80))[people] + 0.01 * rng.normal(size=(120, 80))  # a fingerprint of the person
    y = rng.normal(size=40)[people]
    leaking, _ = cross_predict(x, y, groups=np.arange(120))
    honest, _ = cross_predict(x, y, groups=people)
    assert np.corrcoef(leaking, y)[0, 1] > 0.8
    assert abs(np.corrcoef(honest, y)[0, 1]) < 0.45


def test_probabilities_are_calibrated() -> None:
    rng = np.random.default_rng(6)
    x = rng.normal(size=(1200, 5)).astype(np.float32)
    chance = 1 / (1 + np.exp(-2 * x[:, 0]))
    y = rng.random(1200) < chance
    ruler = CovariateRuler.fit(x[:300], y[:300], groups=np.arange(300), kind="binary", own_error=False)
    found = ruler.predict(x[300:])
    assert found.min() > 0
    assert found.max() < 1
    assert np.abs(found - chance[300:]).mean() < 0.06


def test_same_seed_same_ruler() -> None:
    x, y = linear(50, 7, noise=5.0)
    one, two = (CovariateRuler.fit(x, y, groups=np.arange(50), seed=4) for _ in range(2))
    assert np.array_equal(one.weights, two.weights)
    assert one.own_error == two.own_error


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda x, y, g: (x[:10], y[:10], g[:10]), "at least 20"),
        (lambda x, y, g: (x, y[1:], g), r"must be \(N, F\)"),
        (lambda x, y, g: (x, np.where(g == 3, np.nan, y), g), "not finite"),
        (lambda x, y, g: (x, y * 0, g), "the same"),
        (lambda x, y, g: (x, y, g // 10), "as many people"),
    ],
)
def test_unusable_data_is_refused(spoil: Any, word: str) -> None:
    x, y = linear(40, 8)
    features, values, groups = spoil(x, y, np.arange(40))
    with pytest.raises(UserError, match=word):
        CovariateRuler.fit(features, values, groups=groups)


def test_wrong_kinds_and_features_are_refused() -> None:
    x, y = linear(40, 9)
    with pytest.raises(UserError, match="0 and 1"):
        CovariateRuler.fit(x, y, groups=np.arange(40), kind="binary")
    ruler = CovariateRuler.fit(x, y, groups=np.arange(40), own_error=False)
    with pytest.raises(UserError, match="one grid"):
        ruler.predict(x[:, 1:])
    with pytest.raises(UserError, match="not finite"):
        ruler.predict(np.full_like(x, np.nan))


@pytest.mark.real
def test_real_scans_at_4_mm(data_root: Path) -> None:
    folder = data_root / "ixi_2mm"
    if not (folder / "participants.tsv").is_file():
        pytest.skip(f"no scans of IXI in {data_root}")
    grid = VolumeSpec(shape_xyz=(40, 56, 40), spacing_mm=(4.0, 4.0, 4.0), origin_mm=(-79.0, -127.0, -71.0))
    table = pd.read_csv(folder / "participants.tsv", sep="\t").dropna(subset=["age", "sex"]).iloc[:80]
    found = []
    for row in table.itertuples():
        image: Any = nib.load(folder / str(row.t1w))
        brain = np.asarray(image.dataobj, np.float32) * (np.asarray(nib.load(folder / str(row.dseg)).dataobj) > 0)
        found.append(tissue_features(resample(brain, image.affine, grid), grid))
    age = CovariateRuler.fit(np.stack(found), table["age"], groups=table["participant_id"]).own_error
    sex = CovariateRuler.fit(
        np.stack(found), table["sex"] == "M", groups=table["participant_id"], kind="binary"
    ).own_error
    assert age is not None
    assert sex is not None
    assert age.plain is not None
    assert sex.categories is not None
    assert age.plain.r > 0.65
    assert sex.categories.auc > 0.75
