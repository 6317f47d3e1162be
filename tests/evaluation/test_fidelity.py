"""Judging measured sets: bounded memory, one n, and what it makes of sets that are alike and that are not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from brainsynth.errors import UserError
from brainsynth.evaluation.feature_distances import feature_distances
from brainsynth.evaluation.fidelity import Fidelity, fidelity
from brainsynth.evaluation.measured_sample import MeasuredSample
from brainsynth.instruments.measured import measured_blocks, measured_table
from brainsynth.metrics.frechet import GaussianStats
from tests.evaluation.noise import write_measurements


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`made` of 300 rows and `real` of 500, of one distribution; `other` of 300 rows of another."""
    root = tmp_path_factory.mktemp("measured")
    for name, rows, seed, usual in (("made", 300, 1, 0), ("real", 500, 2, 0), ("other", 300, 3, 9)):
        write_measurements(root / name, rows, seed, usual)
    return root


def test_what_is_kept_is_bounded_and_statistics_are_of_all(sets: Path) -> None:
    root = str(sets / "made")
    rows = np.concatenate(list(measured_blocks(root, "features")))
    some, every = MeasuredSample.read(root, limit=50), MeasuredSample.read(root)
    assert some.count == every.count == len(every) == 300
    assert len(some) == 50
    assert some.stats is not None
    whole = GaussianStats.of(rows)
    np.testing.assert_allclose(some.stats.mean, whole.mean, rtol=1e-9)
    np.testing.assert_allclose(some.stats.covariance, whole.covariance, rtol=1e-6, atol=1e-12)
    # A smaller sample is the beginning of a larger one, and a row's arrays stay with its line of the table.
    assert some.table["sample_id"].tolist() == every.table["sample_id"].tolist()[:50]
    place = measured_table(root)["sample_id"].tolist().index(some.table["sample_id"][7])
    np.testing.assert_array_equal(some.arrays["features"][7], rows[place])


def test_kept_rows_are_a_random_sample(sets: Path) -> None:
    kept = MeasuredSample.read(str(sets / "made"), limit=120).table["row"].to_numpy()
    assert len(set(kept)) == 120
    assert 60 < np.median(kept[:60]) < 240
    assert abs(np.corrcoef(np.arange(120), kept)[0, 1]) < 0.3


def test_a_split_is_read_alone_and_must_be_there(sets: Path) -> None:
    train, held = (MeasuredSample.read(str(sets / "real"), split) for split in ("train", "validation"))
    assert train.count + held.count == 500
    assert set(held.table["split"]) == {"validation"}
    with pytest.raises(UserError, match="its test split has 0 measured volumes"):
        MeasuredSample.read(str(sets / "real"), "test")


def judged(sets: Path, name: str) -> tuple[Fidelity, dict[str, bool]]:
    found = fidelity(str(sets / name), str(sets / "real"))
    return found, {finding.metric: finding.as_real for finding in found.findings}


def test_equal_distributions_are_as_real_at_one_n(sets: Path) -> None:
    found, verdicts = judged(sets, "made")
    assert all(verdicts.values()), verdicts
    assert len(verdicts) >= 14
    distances = [finding for finding in found.findings if "distance" in finding.metric]
    assert {finding.n for finding in distances} == {finding.real_n for finding in distances} == {len(found.held)}
    assert all(finding.low <= finding.value <= finding.high for finding in found.findings)


def test_a_cohort_that_is_off_shows_within_its_category(sets: Path) -> None:
    def in_cohorts(sample: MeasuredSample, off: float = 0.0) -> MeasuredSample:
        kind = np.array(["ixi", "oasis1", "few"])[np.where(np.arange(len(sample)) < 5, 2, np.arange(len(sample)) % 2)]
        features = sample.arrays["features"] + np.float32(off) * (kind == "oasis1")[:, None]
        return dataclasses.replace(sample, table=sample.table.assign(cohort=kind), arrays={"features": features})

    train, held = (in_cohorts(MeasuredSample.read(str(sets / "real"), split)) for split in ("train", "validation"))
    made = in_cohorts(MeasuredSample.read(str(sets / "made")), 0.5)
    pooled = "Fréchet distance to training scans"
    found, remarks = feature_distances(made, held, train, "cohort")
    verdicts = {f.metric: f.as_real for f in found if "Fréchet" in f.metric}
    assert verdicts == {pooled: False, f"{pooled} (cohort ixi)": True, f"{pooled} (cohort oasis1)": False}
    assert "(cohort few): not judged, as one of the sets has only 5 volumes" in " ".join(remarks)
    assert [f.metric for f in feature_distances(made, held, train)[0] if "Fréchet" in f.metric] == [pooled]


def test_another_distribution_is_not(sets: Path) -> None:
    _, verdicts = judged(sets, "other")
    for metric in (
        "Fréchet distance to training scans",
        "kernel distance (KID) to training scans",
        "precision (k = 5)",
    ):
        assert not verdicts[metric], metric
    assert not verdicts["left-right: correlation with the training scans' mean asymmetry"]
