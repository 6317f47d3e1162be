"""Copies among strangers: the statistic, its calibration, the verdict, and planted copies on invented brains."""

import numpy as np
import pytest
from scipy import ndimage, stats

from brainsynth.audit.memorisation import Closeness, CopyDetector, Null, judge_copies, log_ratio
from brainsynth.errors import UserError
from brainsynth.instruments.alignment import Aligner, VoxelDescriptor, fit_frame
from brainsynth.records import from_dict, to_dict
from tests.instruments.heads import SPACING, heads, moved

NAMES = {i: f"person-{i}" for i in range(1000)}


def rows(n: int, seed: int, views: int = 1, d: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, views, d)).astype(np.float32)


def detector(train: int = 80, held: int = 60, seed: int = 0) -> CopyDetector:
    return CopyDetector(
        {"voxels": rows(train, seed)},
        np.arange(train),
        {"voxels": rows(held, seed + 1)},
        np.arange(train, train + held),
    )


def closeness(statistic: np.ndarray) -> Closeness:
    return Closeness(statistic=statistic, log_ratios=statistic[:, None], subjects=np.zeros(len(statistic), np.int64))


def judged(found: CopyDetector, volumes: np.ndarray, **options):
    scored = found.score({"voxels": volumes})
    return judge_copies(found.null, scored, [f"v{i}" for i in range(len(volumes))], NAMES, **options)


def test_the_ratio():
    found = log_ratio(np.array([[1.0, 2, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]))
    np.testing.assert_allclose(found, [np.log(0.5), np.log(1e-6), 0])


def test_conformal_p_values_count():
    null = Null.of(np.array([3.0, 1.0]), np.array([2.0, 4.0]))
    np.testing.assert_allclose(null.p_values(np.array([0.5, 1.0, 2.5, 9.0])), [0.2, 0.4, 0.6, 1.0])


def test_strangers_are_flagged_at_the_rate_promised():
    """Over fresh training sets, held-out people and strangers; for few and many volumes per training scan."""
    rng = np.random.default_rng(1)
    flagged, total = 0, 0
    for trial in range(60):
        found = detector(40 + 20 * (trial % 3), 99, seed=10 * trial)
        scored = found.score({"voxels": rate_rows(rng, 60)})
        flagged += int((found.null.p_values(scored.statistic) <= 0.05).sum())
        total += 60
    low, high = stats.beta.ppf([0.0005, 0.9995], 0.05 * total / 3, 0.95 * total / 3)  # a third: draws share a null
    assert low < flagged / total < high


def rate_rows(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.standard_normal((n, 1, 24)).astype(np.float32)


def test_clean_datasets_pass_and_one_copy_fails():
    found = detector()
    strangers = rows(99, 5)
    assert judged(found, strangers).passed
    copy = rows(80, 0)[7:8] + 0.05 * rows(1, 6)
    verdict = judged(found, np.concatenate([strangers, copy]))
    assert not verdict.passed
    assert verdict.outright == 1
    assert "outright" in verdict.reasons[0]
    assert (verdict.worst[0].volume, verdict.worst[0].subject) == ("v99", "person-7")
    assert from_dict(type(verdict), to_dict(verdict), "verdict") == verdict


def test_many_mild_copies_fail_by_their_number():
    found = detector()
    blends = 0.75 * rows(80, 0)[:40] + 0.66 * rows(40, 7)
    verdict = judged(found, np.concatenate([rows(40, 8), blends]), rate=0.05)
    assert verdict.flagged > 2 * verdict.flagged_expected
    assert verdict.flagged_p_value < 0.01
    assert not verdict.passed


def test_the_count_of_flags_knows_that_the_threshold_was_drawn():
    """Simulated: null and volumes from one distribution; the verdict's p value must not be too small too often."""
    rng = np.random.default_rng(9)
    low = []
    for _ in range(400):
        null = Null.of(rng.standard_normal(60), rng.standard_normal(60))
        scored = closeness(rng.standard_normal(500))
        low.append(judge_copies(null, scored, [str(i) for i in range(500)], NAMES, rate=0.05).flagged_p_value < 0.05)
    assert np.mean(low) < 0.08  # a plain binomial gives 0.2
    assert np.mean(low) > 0.01


def test_the_tail_goes_on_where_conformal_values_end():
    null = Null.of(np.random.default_rng(10).standard_normal(300), np.empty(0))
    statistic = np.linspace(-12, 3, 200)
    tail = null.tail_p_values(statistic)
    assert (np.diff(tail) >= -1e-12).all()
    assert tail[0] < 1e-7 < null.p_values(statistic)[0]
    # Below the null's lowest tenth it is no smaller than a Gaussian tail, which is lighter than exponential.
    beyond = statistic < -2.5
    assert (tail[beyond] > stats.norm.cdf(statistic[beyond])).all()


def test_own_scans_and_repeats_are_left_out():
    scans = rows(40, 11)
    twice = np.concatenate([scans, scans + 0.01 * rows(40, 12)])
    found = CopyDetector({"voxels": twice}, np.tile(np.arange(40), 2), {"voxels": rows(60, 13)}, np.arange(40, 100))
    assert found.null.seen == 80
    assert found.null.drift_p > 0.001
    assert found.null.values[0] > -8  # a repeat scan of a person is no null


def test_features_that_know_the_training_scans_are_noticed():
    """As a network would that was trained to tell training scans apart: they are far from each other, others are not."""
    scans = rows(80, 14) * 3
    held = 0.5 * rows(120, 15)
    held[:, 0] += 0.45 * scans[np.arange(120) % 80, 0]
    found = CopyDetector({"voxels": scans}, np.arange(80), {"voxels": held}, np.arange(80, 200))
    assert found.null.drift_p < 0.001
    assert (found.null.seen, found.null.unseen) == (0, 120)


def test_the_view_or_space_that_shows_a_copy_decides():
    def two(n: int, seed: int) -> dict[str, np.ndarray]:
        return {"voxels": rows(n, seed, views=2), "embedding": rows(n, seed + 50, d=8)}

    found = CopyDetector(two(80, 16), np.arange(80), two(60, 17), np.arange(80, 140))
    mirrored, embedded = two(1, 18), two(1, 19)
    mirrored["voxels"][0, 1] = two(80, 16)["voxels"][4, 0]
    embedded["embedding"] = two(80, 16)["embedding"][9:10]
    for volume, person in ((mirrored, 4), (embedded, 9)):
        scored = found.score(volume)
        assert scored.statistic[0] < found.null.values[0] - 10
        assert scored.subjects[0] == person


def test_scores_do_not_depend_on_the_rest_of_the_dataset():
    found, volumes = detector(), rows(30, 20)
    whole = found.score({"voxels": volumes}).statistic
    parts = [found.score({"voxels": volumes[i : i + 7]}).statistic for i in range(0, 30, 7)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_planted_copies_of_invented_brains():
    """Exact and under seven changes, from volumes to flags."""
    scans = heads(130, 21)
    frame = fit_frame(scans[:60], SPACING)
    aligner, descriptor = Aligner(frame), VoxelDescriptor(frame)

    def describe(volumes: np.ndarray) -> dict[str, np.ndarray]:
        return {"voxels": descriptor.describe(aligner.align(volumes).volumes)}

    found = CopyDetector(describe(scans[:60]), np.arange(60), describe(scans[60:110]), np.arange(60, 110))
    rng, one = np.random.default_rng(22), scans[17]
    bend = np.stack([ndimage.gaussian_filter(rng.standard_normal(one.shape), 2.0) for _ in range(3)])
    bend *= 0.5 / np.abs(bend).max()
    copies = [
        one,
        moved(one, (0, 0, 0), (6.0, -8.0, 4.0)),
        moved(one, (6, -5, 4), (0, 0, 0)),
        one[::-1],
        np.clip(one + rng.normal(0, 0.05, one.shape), 0, 1),
        ndimage.gaussian_filter(one, 0.32),
        one**0.7,
        ndimage.map_coordinates(one, np.indices(one.shape) + bend, order=1),
    ]
    scored = found.score(describe(np.stack(copies).astype(np.float32)))
    assert scored.subjects.tolist() == [17] * 8
    assert (found.null.p_values(scored.statistic) <= 0.01).all()
    strangers = found.score(describe(scans[110:]))
    assert (found.null.p_values(strangers.statistic) <= 0.01).mean() < 0.15


def test_mistakes_are_explained():
    scans = {"voxels": rows(20, 23)}
    with pytest.raises(UserError, match="split by subject"):
        CopyDetector(scans, np.arange(20), scans, np.arange(19, 39))
    with pytest.raises(UserError, match="at least 7 training subjects"):
        CopyDetector(scans, np.arange(20) % 6, {"voxels": rows(0, 0)}, [])
    with pytest.raises(UserError, match="give the same"):
        CopyDetector(scans, np.arange(20), {"other": rows(2, 0)}, [20, 21])
    few = CopyDetector(scans, np.arange(20), {"voxels": rows(0, 0)}, [])
    with pytest.raises(UserError, match="at least 99 scans"):
        judged(few, rows(5, 24))
    assert judged(few, rows(5, 24), rate=0.1).passed
    with pytest.raises(UserError, match="one id for each"):
        judge_copies(few.null, few.score({"voxels": rows(2, 25)}), ["a"], NAMES, rate=0.1)
