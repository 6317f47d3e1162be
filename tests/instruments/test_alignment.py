"""Canonical pose and descriptor: known motion is undone, contrast does not matter, a person stays that person."""

import numpy as np
import pytest

from brainsynth.errors import UserError
from brainsynth.instruments.alignment import Aligner, VoxelDescriptor, fit_frame, to_working_grid, working_grid
from brainsynth.volume import VolumeSpec
from tests.instruments.heads import SPACING, heads, moved


@pytest.fixture(scope="module")
def cohort():
    scans = heads(24, 0)
    return scans, fit_frame(scans[:16], SPACING)


def correlation(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> float:
    return float(np.corrcoef(a[where], b[where])[0, 1])


def test_the_frame_is_its_own_mirror_image(cohort):
    _, frame = cohort
    np.testing.assert_array_equal(frame.template, frame.template[::-1])
    np.testing.assert_array_equal(frame.mask, frame.mask[::-1])
    assert 1000 < frame.mask.sum() < 6000


def test_known_motion_is_found(cohort):
    scans, frame = cohort
    aligner = Aligner(frame)
    still = aligner.align(scans[:1])
    for shift in ((8.0, 0.0, 0.0), (0.0, -8.0, 0.0), (0.0, 4.0, 8.0)):
        gone = aligner.align(moved(scans[0], (0, 0, 0), shift)[None])
        np.testing.assert_allclose(gone.shifts_mm[0] - still.shifts_mm[0], shift, atol=1.0)
    turned = aligner.align(moved(scans[0], (8, 0, 0), (0, 0, 0))[None]).rotations[0] @ still.rotations[0].T
    assert np.rad2deg(np.arccos((np.trace(turned) - 1) / 2)) == pytest.approx(8, abs=1.5)


def test_a_moved_scan_lands_where_it_was(cohort):
    scans, frame = cohort
    aligner = Aligner(frame)
    home = aligner.align(scans[3:4]).volumes[0]
    away = moved(scans[3], (6, -5, 7), (6.0, -7.0, 5.0))
    before = correlation(away, home, frame.mask)
    after = correlation(aligner.align(away[None]).volumes[0], home, frame.mask)
    assert before < 0.7
    assert after > 0.85


def test_a_mirrored_scan_lands_on_the_mirror_image(cohort):
    scans, frame = cohort
    aligner = Aligner(frame)
    there, here = (aligner.align(scan[None]).volumes[0] for scan in (scans[5, ::-1], scans[5]))
    # Not to the last bit: the pose is found on every second voxel, and those are not each other's mirror images.
    assert correlation(there, here[::-1], frame.mask) > 0.99
    assert correlation(there, here, frame.mask) < 0.9
    descriptor = VoxelDescriptor(frame)
    plain = descriptor.describe(aligner.align(scans[5:6]).volumes)[0]
    mirror = descriptor.describe(aligner.align(scans[5:6, ::-1]).volumes)[0]
    np.testing.assert_allclose(mirror[1], plain[0], atol=0.02)
    assert np.linalg.norm(plain[0] - plain[1]) > 0.5


def test_a_volume_alone_or_among_others(cohort):
    scans, frame = cohort
    aligner, descriptor = Aligner(frame), VoxelDescriptor(frame)
    together = descriptor.describe(aligner.align(scans[:8]).volumes)
    alone = descriptor.describe(aligner.align(scans[2:3]).volumes)
    np.testing.assert_allclose(alone[0], together[2], atol=1e-4)


@pytest.mark.parametrize("change", [lambda x: 0.5 * x, lambda x: x**0.7, lambda x: x**1.4, lambda x: 0.2 + 0.8 * x])
def test_contrast_does_not_matter(cohort, change):
    scans, frame = cohort
    descriptor = VoxelDescriptor(frame)
    plain, other, changed = (descriptor.describe(x[None])[0, 0] for x in (scans[1], scans[2], change(scans[1])))
    # Ranks ignore any monotone curve.
    assert np.linalg.norm(changed - plain) < 0.02
    assert np.linalg.norm(other - plain) > 0.6


def test_an_empty_or_unalignable_volume_stays_a_number(cohort):
    _, frame = cohort
    odd = np.stack([np.zeros_like(frame.template), np.full_like(frame.template, 0.5)])
    aligned = Aligner(frame).align(odd)
    assert np.isfinite(aligned.volumes).all()
    assert np.isfinite(VoxelDescriptor(frame).describe(aligned.volumes)).all()


def test_a_frame_needs_scans():
    with pytest.raises(UserError, match="finite training scans"):
        fit_frame(np.full((2, 8, 8, 8), np.nan), SPACING)
    with pytest.raises(UserError, match="bright part"):
        fit_frame(np.zeros((2, 8, 8, 8)), SPACING)


def test_the_working_grid_covers_the_same_box_at_4_mm():
    grid = VolumeSpec(shape_xyz=(80, 112, 80), spacing_mm=(2.0, 2.0, 2.0), origin_mm=(-80.0, -128.0, -72.0))
    coarse = working_grid(grid)
    assert coarse.shape_xyz == (40, 56, 40)
    assert coarse.spacing_mm == (4.0, 4.0, 4.0)
    assert coarse.origin_mm == (-79.0, -127.0, -71.0)
    assert working_grid(coarse) is coarse
    ramp = np.broadcast_to(np.arange(80, dtype=np.float32)[:, None, None], grid.shape_xyz)
    small = to_working_grid(ramp, grid)
    assert small.shape == coarse.shape_xyz
    np.testing.assert_allclose(small[5:35, 20, 20], np.arange(10, 70, 2) + 0.5, atol=1e-3)
