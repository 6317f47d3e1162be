"""The ventricle ruler: its error on held-out phantoms and on real scans, and what it refuses."""

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainsynth.cohort.phantom import make_phantom, phantom_covariates, phantom_grid, subject_seed
from brainsynth.errors import UserError
from brainsynth.instruments.ventricles import VentricleRuler, agreement, ruler_error

GRID = phantom_grid(5.0, (32, 40, 32))
DATA = Path(os.environ.get("BRAINSYNTH_DATA", Path(__file__).resolve().parents[2].parent / "shared" / "data"))
FIT, TEST = slice(0, 64), slice(64, 104)


@pytest.fixture(scope="module")
def heads() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images, intracranial masks, volumes (ml) and the prior of the half to fit on."""
    table = phantom_covariates(TEST.stop, seed=11)
    built = [
        make_phantom(row.age, row.sex, row.ventricular_volume, row.brain_volume, GRID, subject_seed(11, i))
        for i, row in enumerate(table.itertuples())
    ]
    inside = [p.fractions["grey"] + p.fractions["white"] + p.fractions["csf"] + p.fractions["ventricle"] for p in built]
    prior = np.mean([p.fractions["ventricle"] for p in built[FIT]], axis=0)
    return np.stack([p.image for p in built]), np.stack(inside) > 0.5, table.ventricular_volume.to_numpy(), prior


@pytest.fixture(scope="module")
def ruler(heads) -> VentricleRuler:
    images, _, volumes, prior = heads
    return VentricleRuler.fit(images[FIT], volumes[FIT], prior, GRID.voxel_ml)


def test_it_measures_held_out_phantoms(heads, ruler):
    images, _, volumes, _ = heads
    error = ruler_error(ruler.measure(images[TEST]), volumes[TEST])
    assert error.n == 40
    assert error.r >= 0.97
    assert error.r_low <= error.r <= error.r_high
    assert error.mae_ml < 2
    assert 0.9 < error.slope < 1.1
    assert abs(error.bias_ml) < 1


def test_it_follows_the_ventricles_and_not_the_age(ruler):
    """One head, other volumes and ages: a ruler that reads wide sulci as ventricles would fail here."""
    asked = np.array([10.0, 20.0, 40.0, 80.0])
    images = np.stack([make_phantom(50.0, "F", v, 1200.0, GRID, seed=77).image for v in asked])
    assert np.abs(ruler.measure(images) - asked).max() < 5
    young, old = (make_phantom(age, "F", 25.0, 1200.0, GRID, seed=77).image for age in (22.0, 88.0))
    measured = ruler.measure(np.stack([young, old]))
    assert abs(measured[1] - measured[0]) < 4


def test_scale_skull_and_mild_bias_change_little(heads, ruler):
    images, inside, volumes, _ = heads
    plain = ruler.measure(images[TEST])
    np.testing.assert_allclose(ruler.measure(images[TEST] * np.float32(180)), plain, rtol=1e-3, atol=0.05)
    ramp = np.linspace(0.9, 1.1, images.shape[1], dtype=np.float32)[:, None, None]
    for changed in (images[TEST] * inside[TEST], images[TEST] * ramp):
        error = ruler_error(ruler.measure(changed), volumes[TEST])
        assert error.r >= 0.97
        assert error.mae_ml < 2


def test_one_image_is_measured_as_in_a_batch_and_a_blank_is_nan(heads, ruler):
    images = heads[0]
    together = ruler.measure(images[:3])
    np.testing.assert_allclose([ruler.measure(images[i : i + 1])[0] for i in range(3)], together, rtol=1e-5)
    strange = np.stack([np.zeros_like(images[0]), np.full_like(images[0], np.nan), images[0]])
    assert np.isnan(ruler.measure(strange)).tolist() == [True, True, False]


def test_wrong_grids_and_priors_are_refused(heads, ruler):
    images, _, volumes, prior = heads
    with pytest.raises(UserError, match="grid of the ventricle prior"):
        ruler.measure(images[:2, :-1])
    with pytest.raises(UserError, match="grid of the ventricle prior"):
        ruler.measure(images[0])
    with pytest.raises(UserError, match="grid of the ventricle prior"):
        VentricleRuler.fit(images[FIT], volumes[FIT], prior[:-2], GRID.voxel_ml)
    for empty in (np.zeros_like(prior), prior * 300, prior - 0.5):
        with pytest.raises(UserError, match=r"shares in \[0, 1\]"):
            VentricleRuler.fit(images[FIT], volumes[FIT], empty, GRID.voxel_ml)
    with pytest.raises(UserError, match="at least 8 images"):
        VentricleRuler.fit(images[:4], volumes[:4], prior, GRID.voxel_ml)
    with pytest.raises(UserError, match="at least 8 images"):
        VentricleRuler.fit(images[FIT], volumes[:3], prior, GRID.voxel_ml)
    with pytest.raises(UserError, match="voxel_ml"):
        VentricleRuler.fit(images[FIT], volumes[FIT], prior, 0.0)
    with pytest.raises(UserError, match="no white matter"):
        VentricleRuler.fit(np.zeros_like(images[FIT]), volumes[FIT], prior, GRID.voxel_ml)


def test_the_error_record_is_arithmetic_one_can_check():
    true = np.array([10.0, 20.0, 30.0, 40.0, 50.0])
    error = ruler_error(0.5 * true + 10, true)
    assert error.r == pytest.approx(1)
    assert error.slope == pytest.approx(0.5)
    assert error.bias_ml == pytest.approx(-5)
    assert error.mae_ml == pytest.approx(7)
    rng = np.random.default_rng(0)
    x = rng.normal(size=103)
    error = ruler_error(x + rng.normal(size=103), x)
    assert np.arctanh(error.r_high) - np.arctanh(error.r) == pytest.approx(0.196, abs=1e-4)
    assert np.arctanh(error.r) - np.arctanh(error.r_low) == pytest.approx(0.196, abs=1e-4)
    assert agreement(true, 2 * true).slope == pytest.approx(2)


@pytest.mark.parametrize(
    ("measured", "true", "says"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], "at least 4"),
        ([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0], "same length"),
        ([1.0, 2.0, np.nan, 4.0], [1.0, 2.0, 3.0, 4.0], "1 of 4"),
        ([2.0, 2.0, 2.0, 2.0], [1.0, 2.0, 3.0, 4.0], "all the same"),
    ],
)
def test_lists_without_an_error_are_refused(measured, true, says):
    with pytest.raises(UserError, match=says):
        ruler_error(measured, true)


@pytest.mark.real
@pytest.mark.parametrize("factor", [1, 2], ids=["2mm", "4mm"])
def test_it_measures_real_scans_it_was_not_fitted_on(factor):
    folder = DATA / "ixi_2mm"
    if not (folder / "participants.tsv").exists():
        pytest.skip(f"no real scans at {folder}; set BRAINSYNTH_DATA to the folder that holds ixi_2mm")
    table = pd.read_csv(folder / "participants.tsv", sep="\t")
    order = np.random.default_rng(0).permutation(len(table))
    fit, test = order[:63], order[63:]

    def coarse(path: Path, ventricles: bool = False) -> np.ndarray:
        voxels = np.asarray(nib.load(path).dataobj)
        voxels = (np.isin(voxels, (4, 5)) if ventricles else voxels).astype(np.float32)
        x, y, z = (n // factor for n in voxels.shape)
        return voxels.reshape(x, factor, y, factor, z, factor).mean((1, 3, 5))

    images = np.stack([coarse(folder / name) for name in table.t1w])
    prior = np.mean([coarse(folder / table.dseg[i], ventricles=True) for i in fit], axis=0)
    volumes = table.vent_ml.to_numpy(dtype=float)
    ruler = VentricleRuler.fit(images[fit], volumes[fit], prior, 0.008 * factor**3)
    error = ruler_error(ruler.measure(images[test]), volumes[test])
    print(error)
    assert error.n == 62
    assert error.r >= 0.96
    assert error.mae_ml < 2.5
    assert 0.85 < error.slope < 1.15
