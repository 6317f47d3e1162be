"""The intensity rule `robust`: one scan, however it was stored, is one volume; what is no T1w scan is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from brainsynth.cohort.intensity import ScanRejected, robust_brightness, robust_white
from brainsynth.cohort.scan import load_scan
from tests.cohort.scans import BRAIN, GRID, SHAPE, Array, head, padded, radius, store, stripped

SMALL = 0.02
KINDS = {"head": head, "stripped": stripped}


def prepared(image: Array, mask: Array | None = None) -> Array:
    """A scan on the grid itself."""
    return robust_white(robust_brightness(image.astype(np.float32), mask).voxels, 99.8)


def loaded(path: Path, center: str = "world", mask: str = "") -> Array:
    return robust_white(load_scan(str(path), mask, GRID, center, 512, "robust")[0], 99.8)


def difference(a: Array, b: Array) -> float:
    return float(np.abs(a - b).mean())


def test_levels_of_a_plain_head() -> None:
    volume = prepared(head(0))
    air, white = radius((0, 0, 0.05), (0.85, 0.92, 0.85)) > 1, radius((0, 0, 0.1), (0.4, 0.45, 0.38)) < 1
    assert np.median(volume[air]) < 0.01
    assert 0.7 < np.median(volume[white & (radius((0, 0, 0.1), (0.25, 0.4, 0.25)) > 1)]) < 0.85
    assert np.median(volume[radius((0, 0, 0.1), (0.1, 0.2, 0.1)) < 1]) == pytest.approx(0.13, abs=0.04)


@pytest.mark.parametrize("kind", KINDS)
def test_any_rescaling_outlier_padding_and_type_of_a_scan_is_the_same_volume(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng([16, len(kind)])
    refused, plain = 0, {seed: prepared(KINDS[kind](seed)) for seed in range(4)}
    for trial in range(100):  # 200 with both kinds
        seed = trial % len(plain)
        image, affine, said = disguised(KINDS[kind](seed), rng)
        try:
            volume = loaded(store(tmp_path / "scan.nii", image, affine))
        except ScanRejected:
            refused += 1
            continue
        assert difference(volume, plain[seed]) < SMALL, said
    assert refused <= 5


def disguised(image: Array, rng: np.random.Generator) -> tuple[Array, Array, str]:
    """The scan as somebody's program writes it: scaled, shifted, with outliers, padded, in some type."""
    dtype = np.dtype(str(rng.choice(["uint8", "int16", "uint16", "int32", "float32", "float64"])))
    if dtype.kind == "f":
        factor, shift = 10 ** rng.uniform(-4, 4), 0.0
        shift = float(rng.uniform(-5, 5)) * 1000 * factor
    else:
        limits = np.iinfo(dtype)
        room = min(float(limits.max) - limits.min, 1e6)
        factor = rng.uniform(0.6, 0.9) * room / image.max()
        shift = max(float(limits.min), -5e5) + rng.uniform(0, 0.1) * room
    values = factor * image + shift
    low, high = (-1e30, 1e30) if dtype.kind == "f" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    outliers = int(rng.integers(6))
    for _ in range(outliers):
        size = float(rng.choice([-1, 1]) * 10 ** rng.uniform(0, 5) * factor * 1000)
        values[tuple(int(rng.integers(n)) for n in SHAPE)] = np.clip(size, low, high)
    before, after = (tuple(int(n) for n in rng.integers(0, 9, 3) * (rng.random(3) < 0.4)) for _ in range(2))
    level = float(rng.choice([0.0, shift, shift - 1000 * factor, shift + 3000 * factor, shift + 300 * factor]))
    values, affine = padded(values, before, after, np.clip(level, low, high))  # type: ignore[arg-type]
    if dtype.kind != "f":
        values = np.rint(values).clip(low, high)
    said = f"{dtype} {factor=:.3g} {shift=:.3g} {outliers=} {before=} {after=} {level=:.3g}"
    return values.astype(dtype), affine, said


def z_scored(image: Array, inside: Array) -> Array:
    """Zero mean and unit variance inside, 0 outside: the commonest preprocessing of a stripped brain."""
    return np.where(inside, (image - image[inside].mean()) / image[inside].std(), 0.0)


def turned(image: Array, degrees: float, fill: float) -> tuple[Array, Array]:
    """The scan in an array with oblique axes, `fill` where it ends; the affine undoes the turn."""
    angle = np.radians(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1.0]])
    size = np.ceil(np.array(SHAPE) * [1.4, 1.4, 1]).astype(int)
    shift = (np.array(SHAPE) - 1) / 2 - turn @ (size - 1) / 2
    affine = GRID.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ shift
    affine[:3, :3] = affine[:3, :3] @ turn
    return ndimage.affine_transform(image, turn, shift, output_shape=tuple(size), order=1, cval=fill), affine


@pytest.mark.parametrize("masked", [False, True])
def test_a_z_scored_brain_keeps_the_order_and_the_levels_of_its_tissue(masked: bool) -> None:
    plain = prepared(stripped(1))
    volume = prepared(z_scored(stripped(1), BRAIN), BRAIN if masked else None)
    assert (volume[~BRAIN] == 0).all()
    assert np.quantile(volume[BRAIN], 0.02) > 0.05
    assert np.corrcoef(volume.ravel(), plain.ravel())[0, 1] > 0.99
    assert difference(volume, plain) < 0.05


@pytest.mark.parametrize("dtype", ["float32", "int16"])
def test_holes_of_a_z_scored_brain_are_background_too(dtype: str) -> None:
    hole = radius((0.3, 0, 0.1), (0.15, 0.15, 0.15)) < 1
    scored = z_scored(stripped(2), BRAIN & ~hole) * (1 if dtype == "float32" else 200)
    volume = prepared(np.rint(scored) if dtype == "int16" else scored)
    assert (volume[hole] == 0).all()
    assert (volume[BRAIN & ~hole] > 0).mean() > 0.99


@pytest.mark.parametrize("fill", [-5000.0, -100.0, 12.0, 400.0, 4000.0])
def test_padding_of_any_value_around_an_oblique_scan_is_background(tmp_path: Path, fill: float) -> None:
    volumes = [loaded(store(tmp_path / f"{n}.nii", *turned(head(2), 25, value))) for n, value in enumerate((0.0, fill))]
    # The corners of the grid lie outside of the turned scan's array; the interpolated edge of its padding is not looked at.
    assert difference(*volumes) < SMALL
    corner = volumes[1][:2, :2]
    assert float(np.median(corner)) == 0.0


def test_where_the_scan_ends_there_is_background(tmp_path: Path) -> None:
    shifted = 3000 + 2 * head(3)
    affine = GRID.affine.copy()
    affine[2, 3] += 60  # the lowest twelve slices of the grid are not scanned
    volume = loaded(store(tmp_path / "high.nii.gz", shifted[:, :, 12:].astype(np.float32), affine))
    assert (volume[:, :, :12] == 0).all()
    assert difference(volume[:, :, 12:], prepared(head(3))[:, :, 12:]) < SMALL


def test_what_a_mask_leaves_out_is_exactly_background() -> None:
    volume = prepared(head(4) * 0.5 - 90, BRAIN)
    assert (volume[~BRAIN] == 0).all()
    assert difference(volume, np.where(BRAIN, prepared(head(4), BRAIN), 0)) < 1e-3


def test_a_scan_is_centred_by_its_head_whatever_its_outliers_and_offset(tmp_path: Path) -> None:
    image = head(5)
    moved = GRID.affine.copy()
    moved[:3, 3] += [31.0, -17.0, 44.0]
    hot = image - 4000
    hot[2, 3, 4], hot[1, 1, 1] = 1e6, -1e6
    store(tmp_path / "plain.nii", image.astype(np.float32))
    store(tmp_path / "moved.nii", hot.astype(np.float32), moved)
    assert (
        difference(loaded(tmp_path / "plain.nii", "foreground"), loaded(tmp_path / "moved.nii", "foreground")) < SMALL
    )


def _labels() -> Array:
    return np.digitize(ndimage.gaussian_filter(head(6), 1.5), np.linspace(60, 900, 40)) * BRAIN


def _zipper(planes: int) -> Array:
    image = head(9)
    image[12 : 12 + planes, :, 20 if planes < 2 else slice(None)] = 1e5
    return image


def _salted() -> Array:
    image = head(9)
    image[np.random.default_rng(1).random(SHAPE) < 0.03] = 1e5
    return image


REFUSED: dict[str, tuple[Any, str]] = {
    "inverted head": (lambda: 1500 - head(6), "inverted"),
    "inverted brain": (lambda: np.where(BRAIN, 1500 - head(6), 1500), "inverted"),
    "inverted and negative": (lambda: -head(7), "inverted"),
    "inverted brain on black": (lambda: np.where(BRAIN, 1500 - head(6), 0), "darker in its depth"),
    "inverted head on black": (lambda: np.where(head(6) > 60, 1500 - head(6), 0), "darker in its depth"),
    "mask": (lambda: BRAIN * 1.0, "label map"),
    "smooth mask": (lambda: ndimage.gaussian_filter(BRAIN * 1.0, 0.6), "label map"),
    "forty labels": (_labels, "label map"),
    "mask with a little noise": (
        lambda: BRAIN * (1 + 1e-4 * np.random.default_rng(0).random(SHAPE)),
        "nearly constant",
    ),
    "noise": (lambda: np.random.default_rng(0).standard_normal(SHAPE), "noise|hang together|dark"),
    "a few voxels": (lambda: np.pad(np.full((2, 2, 2), 9.0), [(9, n - 11) for n in SHAPE]), "nearly constant"),
    "salt": (_salted, "hang together|noise|dark|constant"),
    "a bright plane": (lambda: _zipper(2), "label map|hang together|dark|constant"),
    "saturated": (lambda: np.minimum(head(8), 60), "label map"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_t1w_scan_is_refused_with_its_reason(kind: str) -> None:
    make, reason = REFUSED[kind]
    with pytest.raises(ScanRejected, match=reason):
        prepared(make())


def test_a_line_of_bright_voxels_leaves_the_tissue_bright() -> None:
    volume, plain = prepared(_zipper(1)), prepared(head(9))
    white = radius((0, 0, 0.1), (0.4, 0.45, 0.38)) < 1
    assert np.median(volume[white]) > 0.6 * np.median(plain[white])
    assert np.corrcoef(volume.ravel(), plain.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("high", [99.0, 99.8, 100.0])
def test_the_brightest_voxels_never_are_the_white(high: float) -> None:
    image = head(10)
    plain = robust_white(robust_brightness(image.astype(np.float32)).voxels, high)
    for number in range(5):
        image[3 * number + 4, 20, 18] = 10.0 ** (number + 3)
    assert difference(robust_white(robust_brightness(image.astype(np.float32)).voxels, high), plain) < SMALL
