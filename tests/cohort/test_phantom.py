"""Phantoms: exact volumes, determinism, contrast, the effects of age and sex, and the BIDS folder."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainsynth.cohort.phantom import (
    TISSUES,
    Phantom,
    make_phantom,
    phantom_covariates,
    phantom_grid,
    subject_seed,
)
from brainsynth.cohort.phantom_cohort import write_phantom_cohort
from brainsynth.errors import UserError

SMALL = phantom_grid(5.0, (32, 40, 32))


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return make_phantom(50.0, "F", 25.0, 1250.0, SMALL, seed=3)


@pytest.mark.parametrize(("mm", "shape"), [(5.0, (32, 40, 32)), (4.0, (40, 56, 40)), (2.0, (80, 112, 80))])
@pytest.mark.parametrize(("vent", "brain"), [(8.0, 1550.0), (30.0, 1250.0), (105.0, 1010.0)])
def test_volumes_are_the_asked_ones_on_every_grid(mm, shape, vent, brain):
    grid = phantom_grid(mm, shape)
    built = make_phantom(63.0, "M", vent, brain, grid, seed=5)
    fractions = built.fractions
    counted_vent = fractions["ventricle"].sum(dtype=float) * mm**3 / 1000
    counted_brain = (fractions["grey"].sum(dtype=float) + fractions["white"].sum(dtype=float)) * mm**3 / 1000
    assert counted_vent == pytest.approx(vent, rel=1e-3)
    assert counted_brain == pytest.approx(brain, rel=1e-3)
    assert built.truth["ventricular_volume"] == pytest.approx(counted_vent, rel=1e-6)
    assert built.truth["brain_volume"] == pytest.approx(counted_brain, rel=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_a_random_subject_gets_its_volumes(seed):
    row = phantom_covariates(1, seed).iloc[0]
    built = make_phantom(row.age, row.sex, row.ventricular_volume, row.brain_volume, SMALL, seed)
    assert built.truth["ventricular_volume"] == pytest.approx(row.ventricular_volume, rel=1e-3)
    assert built.truth["brain_volume"] == pytest.approx(row.brain_volume, rel=1e-3)


def test_fractions_are_a_partition_and_the_image_is_in_range(phantom):
    assert tuple(phantom.fractions) == TISSUES
    total = sum(phantom.fractions.values())
    np.testing.assert_allclose(total, 1, atol=1e-5)
    assert min(f.min() for f in phantom.fractions.values()) >= -1e-6
    assert phantom.image.shape == SMALL.shape_xyz
    assert phantom.image.dtype == np.float32
    assert phantom.image.min() >= 0
    assert phantom.image.max() <= 1


def test_same_arguments_same_bytes_and_another_seed_another_head(phantom):
    again = make_phantom(50.0, "F", 25.0, 1250.0, SMALL, seed=3)
    other = make_phantom(50.0, "F", 25.0, 1250.0, SMALL, seed=4)
    assert again.image.tobytes() == phantom.image.tobytes()
    assert all(again.fractions[t].tobytes() == phantom.fractions[t].tobytes() for t in TISSUES)
    brain = phantom.fractions["white"] + phantom.fractions["grey"] > 0.5
    assert np.abs(other.image - phantom.image)[brain].mean() > 0.03


def test_contrast_is_that_of_a_t1_image():
    built = make_phantom(50.0, "F", 40.0, 1250.0, phantom_grid(2.0, (80, 112, 80)), seed=3)
    median = {t: float(np.median(built.image[built.fractions[t] > 0.95])) for t in TISSUES}
    assert 0.7 < median["white"] < 0.9
    assert 0.45 < median["grey"] < median["white"] - 0.12
    assert max(median["ventricle"], median["csf"]) < 0.3
    assert median["air"] < 0.06
    assert median["scalp"] > 0.4
    noise = built.image[built.fractions["air"] > 0.999].std()
    assert 0.004 < noise < 0.03


def test_ventricles_lie_in_the_middle_and_grow_where_they_are(phantom):
    world = [np.arange(n) * mm + o for n, mm, o in zip(SMALL.shape_xyz, SMALL.spacing_mm, SMALL.origin_mm, strict=True)]
    share = phantom.fractions["ventricle"]
    profiles = (share.sum((1, 2)), share.sum((0, 2)), share.sum((0, 1)))
    centre = [float((profile * w).sum() / share.sum()) for profile, w in zip(profiles, world, strict=True)]
    assert abs(centre[0]) < 4
    assert -35 < centre[1] < -5
    assert 0 < centre[2] < 22
    left, right = share[: SMALL.shape_xyz[0] // 2].sum(), share[SMALL.shape_xyz[0] // 2 :].sum()
    assert 0.7 < left / right < 1.4
    larger = make_phantom(50.0, "F", 60.0, 1250.0, SMALL, seed=3)
    assert larger.image[share > 0.5].mean() <= phantom.image[share > 0.5].mean()
    assert (larger.fractions["ventricle"] > 0.5).sum() > 1.5 * (share > 0.5).sum()


def test_the_image_darkens_monotonically_as_the_ventricles_grow():
    region = make_phantom(60.0, "M", 80.0, 1300.0, SMALL, seed=9).fractions["ventricle"] > 0.2
    means = [make_phantom(60.0, "M", v, 1300.0, SMALL, seed=9).image[region].mean() for v in (10, 20, 40, 80)]
    assert np.all(np.diff(means) < -0.01)


def test_age_and_sex_show_beyond_the_volumes():
    def mean(age: float, sex: str, key: str) -> float:
        return float(np.mean([make_phantom(age, sex, 25.0, 1250.0, SMALL, seed=s).truth[key] for s in range(4)]))

    assert mean(80, "F", "csf") > 1.15 * mean(25, "F", "csf")
    assert mean(50, "M", "skull") > 1.08 * mean(50, "F", "skull")

    def contrast(age: float) -> float:
        built = make_phantom(age, "F", 25.0, 1250.0, phantom_grid(2.0, (80, 112, 80)), seed=1)
        white, grey = (np.median(built.image[built.fractions[t] > 0.95]) for t in ("white", "grey"))
        return float(white - grey)

    assert contrast(85) < contrast(25) - 0.03


def test_covariates_are_realistic():
    table = phantom_covariates(400, seed=0)
    assert list(table.columns) == ["participant_id", "age", "sex", "ventricular_volume", "brain_volume"]
    assert table.participant_id[0] == "phantom-0001"
    assert table.participant_id.is_unique
    assert table.age.between(20, 90).all()
    assert set(table.sex) == {"F", "M"}
    assert table.brain_volume.between(1000, 1600).all()
    assert table.ventricular_volume.min() < 10
    assert table.ventricular_volume.max() > 70
    assert table.ventricular_volume.skew() > 0.8
    assert 0.5 < np.corrcoef(table.age, np.log(table.ventricular_volume))[0, 1] < 0.7
    assert -0.6 < np.corrcoef(table.age, table.brain_volume)[0, 1] < -0.2
    by_sex = table.groupby("sex").brain_volume.mean()
    assert 1.08 < by_sex["M"] / by_sex["F"] < 1.16


def test_a_larger_cohort_begins_with_the_smaller_one():
    pd.testing.assert_frame_equal(phantom_covariates(5, 1), phantom_covariates(9, 1).head(5))
    assert not phantom_covariates(5, 1).equals(phantom_covariates(5, 2))


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"age_years": 200.0}, "age_years = 200"),
        ({"sex": "male"}, "'F' or 'M'"),
        ({"ventricular_volume_ml": -1.0}, "ventricular_volume_ml = -1"),
        ({"ventricular_volume_ml": float("nan")}, "ventricular_volume_ml = nan"),
        ({"brain_volume_ml": 90.0}, "brain_volume_ml = 90"),
        ({"volume": phantom_grid(2.0, (32, 40, 32))}, r"take phantom_grid\(5.0"),
        ({"volume": replace(SMALL, origin_mm=(0.0, 0.0, 0.0))}, "does not hold the brain"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_arguments_that_make_no_head_are_refused(bad, says):
    good = {"age_years": 50.0, "sex": "F", "ventricular_volume_ml": 25.0, "brain_volume_ml": 1250.0, "volume": SMALL}
    with pytest.raises(UserError, match=says):
        make_phantom(**{**good, "seed": 0, **bad})


def test_an_empty_cohort_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least one subject"):
        phantom_covariates(0, 0)
    with pytest.raises(UserError, match="at least one subject"):
        write_phantom_cohort(tmp_path / "none", 0, 0, SMALL)


def _digest(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_cohort_folder_is_bids_and_true_to_the_phantoms(tmp_path):
    seen: list[tuple[int, int]] = []
    folder = write_phantom_cohort(tmp_path / "cohort", 3, 7, SMALL, progress=lambda done, n: seen.append((done, n)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    table = pd.read_csv(folder / "participants.tsv", sep="\t")
    assert list(table.participant_id) == ["sub-phantom0001", "sub-phantom0002", "sub-phantom0003"]
    assert json.loads((folder / "participants.json").read_text())["ventricular_volume"]["Units"] == "ml"
    assert json.loads((folder / "dataset_description.json").read_text())["BIDSVersion"]
    shares = []
    for i, row in enumerate(table.itertuples()):
        image = nib.load(folder / row.participant_id / "anat" / f"{row.participant_id}_T1w.nii.gz")
        np.testing.assert_allclose(image.affine, SMALL.affine)
        assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
        built = make_phantom(row.age, row.sex, row.ventricular_volume, row.brain_volume, SMALL, seed=subject_seed(7, i))
        assert np.abs(np.asarray(image.dataobj) / 255 - built.image).max() <= 0.5 / 255 + 1e-6
        shares.append(built.fractions["ventricle"])
    prior = nib.load(folder / "ventricle_prior.nii.gz")
    assert prior.get_data_dtype() == np.float32
    np.testing.assert_allclose(np.asarray(prior.dataobj), np.mean(shares, axis=0), atol=1e-6)


def test_cohort_does_not_depend_on_the_number_of_workers(tmp_path):
    seen: list[tuple[int, int]] = []
    alone = write_phantom_cohort(tmp_path / "alone", 6, 7, SMALL)
    shared = write_phantom_cohort(tmp_path / "shared", 6, 7, SMALL, lambda done, n: seen.append((done, n)), workers=2)
    assert _digest(shared) == _digest(alone)
    assert seen == [(done, 6) for done in range(1, 7)]
    with pytest.raises(UserError, match="at least one worker"):
        write_phantom_cohort(tmp_path / "none", 6, 7, SMALL, workers=0)


def test_a_mistake_in_a_worker_reads_the_same_as_in_this_process(tmp_path):
    with pytest.raises(UserError, match="does not hold the brain"):
        write_phantom_cohort(tmp_path / "cohort", 3, 7, phantom_grid(2.0, (32, 40, 32)), workers=2)


def test_workers_need_neither_torch_nor_ray():
    code = "import sys, brainsynth.cohort.phantom_cohort; sys.exit(any(m in sys.modules for m in ('torch', 'ray')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_cohort_is_repeatable_resumable_and_never_overwritten(tmp_path):
    folder = write_phantom_cohort(tmp_path / "a", 2, 7, SMALL)
    first = _digest(folder)
    calls: list[int] = []
    write_phantom_cohort(folder, 2, 7, SMALL, progress=lambda done, n: calls.append(done))
    assert calls == [], "a complete cohort is not built again"
    assert _digest(write_phantom_cohort(tmp_path / "b", 2, 7, SMALL)) == first
    (folder / "sub-phantom0002" / "anat" / "sub-phantom0002_T1w.nii.gz").unlink()
    write_phantom_cohort(folder, 2, 7, SMALL)
    assert _digest(folder) == first
    for n, seed, grid in ((3, 7, SMALL), (2, 8, SMALL), (2, 7, phantom_grid(5.0, (34, 42, 34)))):
        with pytest.raises(UserError, match="another phantom cohort"):
            write_phantom_cohort(folder, n, seed, grid)
    assert _digest(folder) == first
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="holds no phantom cohort"):
        write_phantom_cohort(tmp_path / "mine", 2, 7, SMALL)
