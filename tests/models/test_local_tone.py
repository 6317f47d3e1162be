"""Local tone: generated volumes get the local contrast of scans, in each category its own, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from brainsynth.bundle.renderer import LocalTone, ToneCurve
from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.models.local_tone import ToneOf, fit_curves, with_curve

SCHEMA = CovariateSchema(
    covariates=(
        Covariate(name="age", kind="continuous", low=20.0, high=90.0),
        Covariate(name="scanner", kind="categorical", categories=("A", "B", "C")),
        Covariate(name="sex", kind="binary", categories=("F", "M")),
    ),
    missing="indicator",
)


def brain(seed: int, troughs: float) -> np.ndarray:
    """A ball of 0.6 with smooth detail whose dark side is `troughs` times as strong as its bright one."""
    axes = np.meshgrid(*[np.arange(48) - 23.5] * 3, indexing="ij")
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(48, 48, 48)), 1.2)
    noise *= 0.04 / noise.std()
    image = 0.6 + np.where(noise < 0, troughs * noise, noise)
    return np.where(sum(axis**2 for axis in axes) < 20**2, image, 0).clip(0, 1).astype(np.float32)


MADE, SCANS = ([brain(seed, troughs) for seed in seeds] for seeds, troughs in ((range(6), 1.0), (range(6, 12), 1.7)))
CURVES = fit_curves(MADE[:4], SCANS[:4], (3.0,))


def skew(volume: np.ndarray) -> float:
    inner = volume[12:36, 12:36, 12:36]
    values = inner - inner.mean()
    return float((values**3).mean() / values.std() ** 3)


def darkest(volume: np.ndarray) -> float:
    """What is 5 % of the voxels' at most, against their surroundings."""
    return float(np.quantile((volume - ndimage.gaussian_filter(volume, 2))[12:36, 12:36, 12:36], 0.05))


def test_new_volumes_get_the_local_contrast_of_scans() -> None:
    made = MADE[4:]
    changed = [with_curve(volume, CURVES[0]) for volume in made]
    inner = (slice(12, 36),) * 3
    for measure in (skew, darkest):
        before, after, aim = (np.mean([measure(v) for v in group]) for group in (made, changed, SCANS))
        assert abs(after - aim) < 0.5 * abs(before - aim)
    for volume, other in zip(made, changed, strict=True):
        assert other.dtype == np.float32
        np.testing.assert_array_equal(other[volume == 0], 0)
        assert np.corrcoef(other[inner].ravel(), volume[inner].ravel())[0, 1] > 0.9, "folds stay where they are"


def test_a_second_curve_is_of_what_the_first_makes() -> None:
    first, second = fit_curves(MADE[:4], SCANS[:4], (3.0, 1.2))
    assert first == CURVES[0]
    assert (second,) == fit_curves([with_curve(volume, first) for volume in MADE[:4]], SCANS[:4], (1.2,))
    assert (second,) != fit_curves(MADE[:4], SCANS[:4], (1.2,))


def test_a_volume_that_is_like_scans_stays_as_it_is() -> None:
    (curve,) = fit_curves(SCANS[:4], SCANS[:4], (3.0,))
    assert np.abs(with_curve(SCANS[5], curve) - SCANS[5]).mean() < 0.001


def test_each_category_has_its_own_curves_and_an_unknown_one_none() -> None:
    tone = ToneOf(LocalTone(by="scanner", curves={"B": CURVES}), SCHEMA)
    rows = pd.DataFrame({"age": 50.0, "scanner": ["A", "B", "C", None], "sex": ["F", "M", "F", "M"]})
    contexts = SCHEMA.encode(SCHEMA.validate(rows, "rows"))
    assert [SCHEMA.category_in("scanner", c) for c in contexts] == ["A", "B", "C", None]
    assert [SCHEMA.category_in("sex", c) for c in contexts] == ["F", "M", "F", "M"]
    changed = [bool((tone(MADE[5], context) != MADE[5]).any()) for context in contexts]
    assert changed == [False, True, False, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 0.1}, "scale must be between 0.5 and 16 voxels"),
        ({"made": (0.0, 0.0)}, "made must increase"),
        ({"scans": (0.0,)}, "made must increase, and have as many quantiles as scans"),
    ],
)
def test_curves_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ToneCurve(**{"scale": 1.0, "made": (-1.0, 1.0), "scans": (-1.0, 1.0)} | change)  # type: ignore[arg-type]
