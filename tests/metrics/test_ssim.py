"""MS-SSIM against MONAI, 4-G-R-SSIM against loops, faults in order, and pairs that never repeat."""

import itertools
import math

import numpy as np
import pytest
import torch
from monai.metrics.regression import MultiScaleSSIMMetric, SSIMMetric
from scipy.ndimage import gaussian_filter

from brainsynth.errors import UserError
from brainsynth.metrics.ssim import MS_SSIM_WEIGHTS, four_g_r_ssim, ms_ssim, pair_indices


def heads(shape: tuple[int, int, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two smooth volumes in [0, 1] with structure, noise and an empty margin."""
    rng = np.random.default_rng(seed)
    smooth = [gaussian_filter(rng.normal(size=shape), 2.5) for _ in range(3)]
    common, one, two = (s / s.std() for s in smooth)
    pair = []
    for part in (one, two):
        volume = 0.5 + 0.15 * (common + 0.6 * part) + 0.02 * rng.normal(size=shape)
        volume[:3] = 0
        pair.append(np.clip(volume, 0, 1).astype(np.float32))
    return pair[0], pair[1]


def batch(volume: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(volume)[None, None]


def ssim(first: np.ndarray, second: np.ndarray, data_range: float = 1.0, window: int = 11) -> torch.Tensor:
    """SSIM is MS-SSIM of one scale, but for means below 0."""
    return ms_ssim(first, second, data_range, window, weights=[1.0])


@pytest.mark.parametrize(("window", "data_range"), [(11, 1.0), (7, 1.0), (11, 2.5)])
def test_ssim_is_that_of_monai(window, data_range):
    x, y = heads((24, 31, 20))
    expected = float(SSIMMetric(3, data_range=data_range, win_size=window)(batch(x), batch(y)))
    assert float(ssim(x, y, data_range, window)) == pytest.approx(expected, rel=1e-5)
    assert 0.05 < expected < 0.95


@pytest.mark.parametrize(
    ("shape", "window", "scales"), [((44, 48, 46), 11, 3), ((48, 53, 50), 3, 5), ((81, 80, 84), 5, 5)]
)
def test_ms_ssim_is_that_of_monai(shape, window, scales):
    x, y = heads(shape)
    weights = [w * sum(MS_SSIM_WEIGHTS) / sum(MS_SSIM_WEIGHTS[:scales]) for w in MS_SSIM_WEIGHTS[:scales]]
    expected = float(MultiScaleSSIMMetric(3, kernel_size=window, weights=weights)(batch(x), batch(y)))
    assert float(ms_ssim(x, y, window=window, scales=scales)) == pytest.approx(expected, rel=1e-5)
    assert 0.05 < expected < 0.95


@pytest.mark.slow
def test_ms_ssim_as_published_is_that_of_monai():
    x, y = heads((176, 176, 176))
    expected = float(MultiScaleSSIMMetric(3)(batch(x), batch(y)))
    assert float(ms_ssim(x, y)) == pytest.approx(expected, rel=1e-5)


def test_identical_volumes_are_one_opposite_contrast_is_not_and_batches_are_pairs():
    x, y = heads((24, 25, 26))
    for score in (ssim, four_g_r_ssim):
        assert float(score(x, x)) == pytest.approx(1, abs=1e-6)
    assert float(ms_ssim(x, x, scales=2)) == pytest.approx(1, abs=1e-6)
    assert float(ssim(x, 1 - x)) < 0.3
    both = ssim(np.stack([x, x]), np.stack([x, y]))
    assert both.shape == (2,)
    assert both.dtype == torch.float64
    assert float(both[1]) == pytest.approx(float(ssim(y, x)), rel=1e-6)
    assert four_g_r_ssim(np.stack([x, x]), np.stack([x, y])).shape == (2,)


def test_all_fall_with_blur_noise_and_shift():
    x, _ = heads((30, 32, 34))
    noise = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    faults = {
        "blur": [gaussian_filter(x, s) for s in (0.0, 0.5, 1.0, 2.0)],
        "noise": [x + s * noise for s in (0.0, 0.02, 0.05, 0.2)],
        "shift": [np.roll(x, s, axis=1) for s in (0, 1, 2, 4)],
    }
    for series in faults.values():
        for score in (ssim, lambda a, b: ms_ssim(a, b, scales=2), four_g_r_ssim):
            values = [float(score(x, y)) for y in series]
            assert values == sorted(values, reverse=True)
            assert values[-1] < 0.9


def test_volumes_too_small_are_refused_with_the_way_out():
    x = np.zeros((160, 224, 160), np.float32)
    with pytest.raises(UserError, match=r"160×224×160 .* 5 scales .* 11: the smallest side must be 176 .* scales=4"):
        ms_ssim(x, x)
    with pytest.raises(UserError, match="smallest side must be 13 or more"):
        four_g_r_ssim(x[:12], x[:12])
    with pytest.raises(UserError, match="smallest side must be 11 or more"):
        ssim(x[:10], x[:10])
    with pytest.raises(UserError, match="scales = 6"):
        ms_ssim(x, x, scales=6)


def test_what_is_no_pair_of_volumes_is_refused():
    x, _ = heads((16, 16, 16))
    bad = x.copy()
    bad[5, 5, 5] = np.nan
    for score in (ssim, four_g_r_ssim, lambda a, b: ms_ssim(a, b, scales=1)):
        with pytest.raises(UserError, match="NaN"):
            score(x, bad)
        with pytest.raises(UserError, match="of one shape"):
            score(x, x[1:])
    with pytest.raises(UserError, match="odd"):
        ssim(x, x, window=4)


def naive_gradient(volume: np.ndarray) -> np.ndarray:
    smooth = {-1: 1.0, 0: 2.0, 1: 1.0}
    out = np.zeros([side - 2 for side in volume.shape])
    for centre in itertools.product(*(range(1, side - 1) for side in volume.shape)):
        for axis in range(3):
            total = 0.0
            for offset in itertools.product((-1, 0, 1), repeat=3):
                weight = float(offset[axis])
                for other in range(3):
                    weight *= 1.0 if other == axis else smooth[offset[other]]
                total += weight * float(volume[tuple(c + o for c, o in zip(centre, offset, strict=True))])
            out[tuple(c - 1 for c in centre)] += abs(total)
    return out


def naive_four_g_r(x: np.ndarray, y: np.ndarray, window: int) -> tuple[float, dict[str, int]]:
    gx, gy = naive_gradient(x), naive_gradient(y)
    t, u, flat = 0.12 * gx.max(), 0.06 * gx.max(), 1e-6 * max(gx.max(), gy.max())
    half = window // 2
    line = [math.exp(-((i - half) ** 2) / (2 * 1.5**2)) for i in range(window)]
    weights = np.array([[[a * b * c for c in line] for b in line] for a in line]) / sum(line) ** 3
    both_flat = 0
    regions: dict[str, list[float]] = {"preserved": [], "changed": [], "smooth": [], "texture": []}
    for i, j, k in itertools.product(*(range(half, side - half) for side in gx.shape)):
        part = np.s_[i - half : i + half + 1, j - half : j + half + 1, k - half : k + half + 1]
        a, b = gx[part] - (weights * gx[part]).sum(), gy[part] - (weights * gy[part]).sum()
        sx, sy = math.sqrt((weights * a * a).sum()), math.sqrt((weights * b * b).sum())
        if sx <= flat and sy <= flat:
            both_flat += 1
            r = 1.0
        elif sx <= flat or sy <= flat:
            r = 0.0
        else:
            r = float((weights * a * b).sum()) / (sx * sy)
        p, q = gx[i, j, k], gy[i, j, k]
        if p > t and q > t:
            regions["preserved"].append(r)
        elif p > t or q > t:
            regions["changed"].append(r)
        elif p < u:
            regions["smooth"].append(r)
        else:
            regions["texture"].append(r)
    filled = [np.mean(values) for values in regions.values() if values]
    return float(np.mean(filled)), {"both flat": both_flat} | {name: len(v) for name, v in regions.items()}


@pytest.mark.parametrize(("window", "seed"), [(11, 0), (5, 1), (3, 2)])
def test_four_g_r_ssim_is_a_loop(window, seed):
    rng = np.random.default_rng(seed)
    field, other = (gaussian_filter(rng.normal(size=(19, 17, 18)), 1.2) for _ in range(2))
    x = np.where(np.arange(19)[:, None, None] < 12, field, 0.02 * field).astype(np.float32)
    y = (1.3 * x + 0.4 * np.where(np.arange(17)[:, None] < 9, other, 0)).astype(np.float32)
    x[:, :, 11:] = y[:9, :, 11:] = 0.25  # flat in both, and elsewhere in one
    expected, sizes = naive_four_g_r(x, y, window)
    assert float(four_g_r_ssim(x, y, window)) == pytest.approx(expected, rel=1e-9)
    if window == 3:
        assert min(sizes.values()) > 20  # every region and rule is put to the test


def test_four_g_r_ssim_handles_flat_volumes_and_ignores_scale():
    x, y = heads((20, 20, 20))
    flat = np.full_like(x, 0.3)
    assert float(four_g_r_ssim(flat, flat)) == 1
    assert float(four_g_r_ssim(flat, x)) == 0
    assert float(four_g_r_ssim(x, flat)) == 0
    assert float(four_g_r_ssim(x * 0.5, y * 0.5)) == pytest.approx(float(four_g_r_ssim(x, y)), rel=1e-9)


def test_pairs_are_different_reproducible_and_cover_all():
    pairs = pair_indices(1000, 5000, seed=3)
    assert pairs.shape == (5000, 2)
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert pairs.min() >= 0
    assert pairs.max() < 1000
    assert len(np.unique(pairs, axis=0)) == 5000
    assert (pairs == pair_indices(1000, 5000, seed=3)).all()
    assert (pairs != pair_indices(1000, 5000, seed=4)).any()
    every = pair_indices(37, 37 * 36 // 2, seed=0)
    assert {tuple(p) for p in every.tolist()} == set(itertools.combinations(range(37), 2))
    counts = np.bincount(pair_indices(50, 400, seed=1).ravel(), minlength=50)
    assert 5 <= counts.min() <= counts.max() <= 30


def test_pairs_of_very_many_volumes_are_exact():
    n = 3_000_000
    pairs = pair_indices(n, 1000, seed=0)
    assert (pairs[:, 0] >= 0).all()
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert (pairs[:, 1] < n).all()


def test_more_pairs_than_there_are_is_refused():
    with pytest.raises(UserError, match="there are 6"):
        pair_indices(4, 7, seed=0)
    with pytest.raises(UserError, match="there are 0"):
        pair_indices(1, 1, seed=0)
