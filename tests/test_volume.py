"""Intensities survive storage within the promised tolerance; what cannot be stored is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from brainsynth.models.bundle_generator import quantised
from brainsynth.volume import VolumeSpec, mirrored, voxel_sha256


def spec(dtype: Any = "float16", **changes: Any) -> VolumeSpec:
    values = {"shape_xyz": (4, 5, 6), "spacing_mm": (1.0, 2.0, 3.0), "origin_mm": (-10.0, 20.0, -30.0)}
    return VolumeSpec(**{**values, "dtype": dtype, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint16", "uint8"])
@pytest.mark.parametrize("step", [2.0**-11, 0.0])
def test_quantise_stays_within_the_tolerance(dtype: str, step: float) -> None:
    volume = spec(dtype, step=step)
    x = np.concatenate([np.linspace(0, 1, 100_003), np.random.default_rng(0).random(50_000)]).astype(np.float32)
    stored = volume.quantise(x)
    assert stored.dtype == np.dtype(dtype)
    error = np.abs(volume.dequantise(stored).astype(np.float64) - x)
    assert error.max() <= volume.tolerance * (1 + 1e-3) + 6e-8
    assert error.max() > volume.tolerance / 2 or (dtype == "float32" and step == 0)
    np.testing.assert_array_equal(volume.quantise(volume.dequantise(stored)), stored)


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint16", "uint8"])
@pytest.mark.parametrize("step", [2.0**-11, 0.003, 0.0])
def test_a_device_quantises_to_the_same_bits(dtype: str, step: float) -> None:
    volume, random = spec(dtype, step=step), np.random.default_rng(0)
    halves = (np.arange(4096) + 0.5) * 2.0**-12  # half-way between two stored values
    x = np.concatenate([random.random(200_000), halves, [-0.0, 0.0, 1.0, 1.5, -1e-9, 1e-40]]).astype(np.float32)
    found = quantised(torch.from_numpy(x), volume).numpy()
    expected = volume.quantise(x)
    assert found.dtype == expected.dtype
    assert found.tobytes() == expected.tobytes()


def test_tolerances_are_what_the_page_says() -> None:
    assert spec("float16").tolerance == 2.0**-12
    assert spec("float32").tolerance == 2.0**-12
    assert spec("float32", step=0.0).tolerance == 2.0**-24
    assert spec("uint8").tolerance == 0.5 / 255


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint16", "uint8"])
def test_values_outside_are_clipped(dtype: str) -> None:
    volume = spec(dtype)
    stored = volume.quantise(np.array([-5.0, -1e-9, 0.0, 1.0, 1.0 + 1e-6, 9.0]))
    np.testing.assert_array_equal(volume.dequantise(stored), [0, 0, 0, 1, 1, 1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_what_is_not_finite_is_refused(dtype: str, bad: float) -> None:
    x = np.zeros((4, 5, 6), np.float32)
    x[3, 4, 5] = bad
    with pytest.raises(ValueError, match="NaN or infinite voxels"):
        spec(dtype).quantise(x)


def test_the_affine_takes_voxels_to_the_world() -> None:
    volume = spec()
    np.testing.assert_array_equal(volume.affine @ [0, 0, 0, 1], [-10, 20, -30, 1])
    np.testing.assert_array_equal(volume.affine @ [1, 1, 1, 1], [-9, 22, -27, 1])
    assert volume.voxel_ml == pytest.approx(0.006)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"shape_xyz": (4, 0, 6)}, "shape_xyz must be positive"),
        ({"spacing_mm": (1.0, -2.0, 3.0)}, "spacing_mm must be positive"),
        ({"spacing_mm": (1.0, float("nan"), 3.0)}, "spacing_mm must be positive"),
        ({"step": 0.5}, "step must be in"),
        ({"step": -0.1}, "step must be in"),
    ],
)
def test_impossible_grids_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        spec(**changes)


def test_voxel_digests_depend_on_values_and_type_only() -> None:
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    expected = voxel_sha256(x)
    assert voxel_sha256(np.asfortranarray(x)) == expected
    assert voxel_sha256(x.astype(">f4")) == expected
    assert voxel_sha256(x[:, ::-1]) != expected
    assert voxel_sha256(x.astype(np.float64)) != expected
    assert (
        voxel_sha256(np.array([0, 1, 255], np.uint8))
        == "26a66b061e8f48f39927c312f25293959729eee95978e2892d49d3512a5cc092"
    )


@pytest.mark.parametrize(("shape", "origin"), [(5, -4.0), (6, -5.0), (6, -4.0)])
def test_mirroring_turns_about_the_midline_not_about_the_grid(shape: int, origin: float) -> None:
    grid = spec(shape_xyz=(shape, 2, 2), spacing_mm=(2.0, 2.0, 2.0), origin_mm=(origin, 0.0, 0.0))
    x_mm = origin + 2.0 * np.arange(shape)
    volume = np.broadcast_to(np.abs(x_mm)[:, None, None] + (x_mm > 0)[:, None, None] * 0.5, (shape, 2, 2))
    turned = mirrored(volume, grid)
    for index, x in enumerate(x_mm):
        inside = -x in x_mm
        assert turned[index, 0, 0] == (abs(x) + (0.5 if -x > 0 else 0.0) if inside else 0.0)


def test_a_grid_without_a_midline_does_not_mirror() -> None:
    with pytest.raises(ValueError, match="nothing mirrors"):
        mirrored(np.ones((4, 5, 6)), spec(spacing_mm=(1.0, 1.0, 1.0), origin_mm=(-10.3, 0.0, 0.0)))
