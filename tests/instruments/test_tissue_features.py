"""Tissue features: what they must not notice, what they must, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from brainsynth.cohort.phantom import make_phantom, phantom_grid
from brainsynth.errors import UserError
from brainsynth.instruments import tissue_features as module
from brainsynth.instruments.tissue_features import left_right_difference, tissue_features, tissue_volumes
from brainsynth.volume import VolumeSpec

GRID = phantom_grid(4.0, (40, 52, 40))


@pytest.fixture(scope="module")
def brain() -> np.ndarray:
    phantom = make_phantom(50, "F", 30, 1200, GRID, 1)
    inside = 1 - phantom.fractions["air"] - phantom.fractions["scalp"] - phantom.fractions["skull"]
    return np.asarray(phantom.image * inside, np.float32)


def change(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean())


def test_shape_and_range(brain: np.ndarray) -> None:
    found = tissue_features(brain, GRID)
    assert found.shape == (3 * 10 * 26 * 20,)
    assert found.dtype == np.float32
    assert found.min() >= -1e-6
    assert found.max() <= 1 + 1e-6
    assert found.reshape(3, -1).mean(1).min() > 0.01  # there is something of every tissue


def test_a_block_of_one_tissue_is_all_that_tissue() -> None:
    grid = VolumeSpec(shape_xyz=(32, 32, 32), spacing_mm=(2.0, 2.0, 2.0), origin_mm=(0, 0, 0))
    image = np.full(grid.shape_xyz, 1.0, np.float32)
    image[:, :8], image[:, 8:16] = 0.25, 0.66
    image[:, 24:, 28:] = 0.0
    csf, grey, white = tissue_features(image, grid).reshape(3, 4, 8, 8)
    assert csf[:, 0].min() > 0.95  # 0.25 of white
    assert grey[:, 2].min() > 0.95
    assert white[:, 5].min() > 0.95
    assert max(t[:, 7, 7].max() for t in (csf, grey, white)) < 0.01  # air is no tissue


def test_intensity_scale_and_side_do_not_matter(brain: np.ndarray) -> None:
    found = tissue_features(brain, GRID)
    assert change(tissue_features(brain * np.float32(517), GRID), found) < 1e-5
    assert change(tissue_features(brain[::-1].copy(), GRID), found) < 1e-5


def test_a_slow_field_matters_little_and_anatomy_much(brain: np.ndarray) -> None:
    found = tissue_features(brain, GRID)
    field = np.linspace(0.85, 1.15, GRID.shape_xyz[1], dtype=np.float32)[:, None]
    other = tissue_features(make_phantom(80, "F", 90, 1050, GRID, 1).image, GRID)
    assert change(tissue_features(brain * field, GRID), found) < 0.35 * change(other, found)


def test_more_ventricle_is_more_csf_in_the_middle() -> None:
    small, large = (
        tissue_features(make_phantom(50, "F", ml, 1200, GRID, 1).image, GRID).reshape(3, 10, 26, 20) for ml in (15, 90)
    )
    middle = (slice(5, 10), slice(6, 20), slice(6, 14))
    grown = (large[0][middle] - small[0][middle]).sum() * 2 * 0.512  # two sides, 8 mm blocks of 0.512 ml
    assert 45 < grown < 90  # 75 ml were added; walls that fill part of a block count in part


def test_grids_that_blocks_do_not_fill_are_centred(brain: np.ndarray) -> None:
    odd = VolumeSpec(shape_xyz=(39, 51, 38), spacing_mm=(4.0, 4.0, 4.0), origin_mm=GRID.origin_mm)
    assert tissue_features(brain[:39, :51, :38], odd).shape == (3 * 10 * 25 * 19,)


def test_what_cannot_be_measured_is_refused(brain: np.ndarray) -> None:
    with pytest.raises(UserError, match="blank"):
        tissue_features(np.zeros(GRID.shape_xyz, np.float32), GRID)
    with pytest.raises(UserError, match="is not on the grid"):
        tissue_features(brain[1:], GRID)
    for bad in (np.nan, np.inf):
        spoilt = brain.copy()
        spoilt[0, 0, 0] = bad
        with pytest.raises(ValueError, match="NaN"):
            tissue_features(spoilt, GRID)


@pytest.mark.parametrize("blocks", [4, 5])
def test_tissue_volumes_are_the_shares_times_the_space(blocks: int) -> None:
    """White matter in all of a box but one slab of 8 mm, with an even and an odd number of blocks across the midline."""
    grid = VolumeSpec(shape_xyz=(4 * blocks, 32, 32), spacing_mm=(2.0, 2.0, 2.0), origin_mm=(0, 0, 0))
    shares = np.zeros((3, blocks, 8, 8), np.float32)
    shares[2] = 1.0
    shares[2, :, 0] = 0.0
    shares[0, :, 0] = 0.5
    half = ((shares + shares[:, ::-1]) / 2)[:, : (blocks + 1) // 2]
    found = tissue_volumes(np.stack([half.ravel(), 0 * half.ravel()]), grid)
    assert found["white_matter"] == pytest.approx([blocks * 7 * 8 * 0.512, 0])
    assert found["csf"] == pytest.approx([blocks * 8 * 0.512 / 2, 0])
    assert found["grey_matter"] == pytest.approx([0, 0])


def test_a_flip_turns_the_sign_of_the_left_right_difference(brain: np.ndarray) -> None:
    found = left_right_difference(brain, GRID)
    np.testing.assert_allclose(left_right_difference(brain[::-1], GRID), -found, atol=1e-6)
    assert np.abs(found).max() > 0.01
    assert np.abs(left_right_difference(brain + brain[::-1], GRID)).max() < 1e-6


def test_blocks_are_centred_on_a_grid_that_they_do_not_fill() -> None:
    grid = VolumeSpec(shape_xyz=(20, 90, 170), spacing_mm=(1.0, 1.0, 1.0), origin_mm=(0, 0, 0))
    image = np.random.default_rng(0).random(grid.shape_xyz, np.float32)
    whole = image[2:18, 1:89, 1:169].reshape(2, 8, 11, 8, 21, 8)
    assert len(list(module._tiles(image, grid))) > 2, "no layer is cut"
    expected = (whole - whole[::-1, :]).mean((1, 3, 5))[:1].ravel()
    np.testing.assert_allclose(left_right_difference(image, grid), expected, atol=1e-6)


@pytest.mark.parametrize("count", [100, 101, 4711])
def test_the_bright_end_is_numpys_percentile(count: int) -> None:
    values = np.random.default_rng(count).random(count, np.float32)
    assert module._percentile_99(values) == pytest.approx(float(np.percentile(values, 99)), rel=1e-6)
