"""What goes over a volume part by part gives what NumPy and SciPy give of the whole; so do the numbers made of it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import fft, ndimage

from brainsynth.gate import features, passes
from brainsynth.gate.passes import Ranked, areas_of, eroded, neighbourhoods, pooled, sums_along

SHAPES = [(9, 12, 7), (20, 3, 5), (1, 30, 30), (33, 24, 40)]
OTHERS = ((1, 2), (0, 2), (0, 1))


@pytest.fixture(autouse=True, params=[700, 150_000])
def _parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many parts of these small volumes, and one."""
    monkeypatch.setattr(passes, "_PART", request.param)


def volume(shape: tuple[int, ...]) -> np.ndarray:
    """Smooth, of order 1, half of it dark."""
    noise = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(shape), 1.5)
    return np.asarray((noise / noise.std()).clip(0, 2) / 2, np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_masks(shape: tuple[int, ...]) -> None:
    mask = ndimage.binary_dilation(np.random.default_rng(0).random(shape) > 0.6, iterations=2)
    for times in (1, 2, 4):
        np.testing.assert_array_equal(eroded(mask, times), ndimage.binary_erosion(mask, iterations=times))
    for found, others in zip(areas_of(mask), OTHERS, strict=True):
        np.testing.assert_array_equal(found, mask.sum(others))


def test_a_slice_may_hold_more_voxels_than_a_byte_counts() -> None:
    assert [int(area[0]) for area in areas_of(np.ones((300, 2, 2), bool))] == [4, 600, 600]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [(1, 2, 3), (4, 4, 4), (8, 3, 1)])
def test_blocks(shape: tuple[int, ...], block: tuple[int, ...]) -> None:
    u = volume(shape)
    whole = np.pad(u, [(0, -n % b) for n, b in zip(shape, block, strict=True)])
    parts = whole.reshape(*(m for n, b in zip(whole.shape, block, strict=True) for m in (n // b, b)))
    np.testing.assert_allclose(pooled(u, block), parts.sum((1, 3, 5)), rtol=1e-5)
    np.testing.assert_array_equal(pooled(u, block, join=np.maximum), parts.max((1, 3, 5)))
    np.testing.assert_array_equal(pooled(u, block, lambda part: part > 0.3), (parts > 0.3).sum((1, 3, 5)))


@pytest.mark.parametrize("mode", ["reflect", "wrap"])
@pytest.mark.parametrize("widths", [(7, 7, 7), (3, 4, 12), (5, 1, 2)])
def test_neighbourhoods(widths: tuple[int, ...], mode: str) -> None:
    u = volume((33, 24, 40))
    short = [(n // 2, n - n // 2 - 1) for n in widths]
    padded = np.pad(u, short, mode="symmetric" if mode == "reflect" else "wrap")
    found = list(neighbourhoods(padded, widths))
    np.testing.assert_allclose(found, ndimage.uniform_filter(u, widths, mode=mode), atol=1e-6)
    padded[0] += 1e10  # float32 would be off by hundreds afterwards
    exact = list(neighbourhoods(padded, widths, np.float64))[widths[0] :]
    np.testing.assert_allclose(exact, found[widths[0] :], atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_sums(shape: tuple[int, ...]) -> None:
    u = volume(shape)
    for found, others in zip(sums_along(u), OTHERS, strict=True):
        np.testing.assert_allclose(found, u.sum(others, dtype=np.float64), rtol=1e-6)
    inner = eroded(u > 0.1, 1)
    summed, between = features._steps(u, inner)
    inside = []
    for axis, found in enumerate(summed):
        step = np.abs(np.diff(u, axis=axis))
        np.testing.assert_allclose(found, step.sum(OTHERS[axis], dtype=np.float64), rtol=1e-5)
        inside.append(step[inner[tuple(slice(n) for n in step.shape)]].sum(dtype=np.float64) / max(1, inner.sum()))
    assert between == pytest.approx(np.mean(inside), rel=1e-5)


def test_places_in_order() -> None:
    values = np.random.default_rng(0).random(1000, np.float32)
    ranked, ordered = Ranked(values.copy()), np.sort(values)
    for place in (900, 17, 900, 901, 0, 999, 500, 950):
        assert ranked[place] == ordered[place]


def test_numbers_of_a_volume_are_those_of_their_plain_definitions() -> None:
    whole = volume((40, 56, 44))
    bright = np.sort(whole[whole > features.DARK])
    u = whole / bright[int(0.9 * len(bright))]
    mask = u > features.FOREGROUND
    inner, mm = ndimage.binary_erosion(mask, iterations=1), (4.0, 4.0, 4.0)
    measured = features.measure(whole, mm)
    assert measured is not None
    numbers = measured.numbers

    def number(of: float, offset: float = 0.0) -> object:
        return pytest.approx(float(np.log(of + offset)), abs=1e-5)

    power = np.abs(fft.rfftn(u.astype(np.float64))) ** 2
    k = np.meshgrid(fft.fftfreq(40), fft.fftfreq(56), fft.rfftfreq(44), indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in k))
    low = power[(radius >= 0.05) & (radius < 0.12)].sum()
    assert numbers["sharpness.band3"] == number(power[(radius >= 0.2) & (radius < 0.3)].sum() / low)
    around = ndimage.uniform_filter(power, 7, mode="wrap") + 1e-9 * low / power.size
    assert numbers["stripes.peak"] == number((power / around)[radius >= 0.12].max())
    assert numbers["sharpness.y"] == number(power.sum((0, 2))[:29][17:].sum() / low, 1e-9)
    assert numbers["sharpness.gyri"] == number((u - ndimage.uniform_filter(u, 3))[inner].std(), 0.005)
    for q in (50, 75, 99):
        ordered = np.sort(u[mask])
        assert numbers[f"contrast.q{q}"] == pytest.approx(ordered[int(q / 100 * (len(ordered) - 1))], rel=1e-6)
    np.testing.assert_allclose(measured.skew, -measured.skew[::-1], atol=1e-6)


@pytest.mark.parametrize("level", [0.25, 0.9])
def test_the_scale_of_a_volume_does_not_matter(level: float) -> None:
    """Below a white level of about 0.29 part of the brain is darker than what the level is made of."""
    u = volume((40, 56, 44)) ** np.float32(0.3)
    found = features.measure(u * np.float32(level), (4.0, 4.0, 4.0))
    assert found is not None
    whole = u * np.float32(level)
    bright = np.sort(whole[whole > features.DARK])
    inside = np.sort((whole / bright[int(0.9 * len(bright))]).ravel())
    inside = inside[inside > features.FOREGROUND]
    assert found.numbers["contrast.q50"] == pytest.approx(inside[int(0.5 * (len(inside) - 1))], rel=1e-6)


def test_holes_keep_their_volume() -> None:
    """Blocks of 8 mm and of 4 mm do not end at the same voxels on this grid."""
    u = np.pad(np.ones((14, 17, 19), np.float32), 4)
    u[9:14, 9:14, 9:14] = 0
    void = features._void(u, (1.6, 1.6, 1.6), (5, 5, 5))
    region = features.pooled(u, (2, 2, 2)) / 8 <= features.SIGNAL
    inside = region[2:-2, 2:-2, 2:-2].repeat(2, 0).repeat(2, 1).repeat(2, 2)
    assert void.sum() * 125 == pytest.approx(inside.sum())
