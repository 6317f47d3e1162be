"""jobs/evaluate.py on phantoms with known volumes: sound data passes, planted faults are seen, mistakes are told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter

from brainsynth import open_dataset
from brainsynth.cohort.phantom_cohort import write_phantom_cohort
from brainsynth.config.evaluation import EvaluateConfig
from brainsynth.config.schema import PrepareConfig
from brainsynth.errors import UserError
from brainsynth.evaluation.two_sample import METRIC
from brainsynth.metrics.finding import Finding
from brainsynth.stages import evaluate, prepare_cohort
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.verify import verify_dataset
from tests.line import GRID, Line, as_config

Change = Callable[[Path], None]


def prepared(root: Path, phantoms: Path, name: str, change: Change | None = None) -> str:
    """A cohort of copied phantoms, after something was done to the copy."""
    config = Line(root).prepare()
    folder = root / f"{name}-phantoms"
    shutil.copytree(phantoms, folder)
    if change:
        change(folder)
    config |= {"source": {"path": str(folder)}, "output": str(root / name), "validation_fraction": 0.3}
    prepare_cohort.run(as_config(config, PrepareConfig, root))
    return str(root / name)


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A folder, other phantoms that stand in for generated volumes, and the reference cohort."""
    root = tmp_path_factory.mktemp("evaluate")
    for name, seed in (("reference", 5), ("stand-in", 6)):
        write_phantom_cohort(root / name / "phantoms", 90, seed, GRID)
    return root, root / "stand-in" / "phantoms", prepared(root, root / "reference" / "phantoms", "real")


def judged(cohorts: tuple[Path, Path, str], name: str, change: Change | None = None, **more: Any) -> dict[str, Finding]:
    """The verdicts. The reference is measured, and the embedder trained, once: a second evaluation resumes from there."""
    root, phantoms, reference = cohorts
    dataset = prepared(root, phantoms, name, change)
    output, first = root / f"{name}-evaluation", root / "sound-evaluation"
    if first.exists() and output != first:
        shutil.copytree(first / "measured-reference", output / "measured-reference")
        for file in first.glob("embedder-*.safetensors"):
            shutil.copy(file, output)
    config = config_of(dataset, reference, output, **more)
    return {finding.metric: finding for finding in evaluate.run(as_config(config, EvaluateConfig, root))}


def config_of(dataset: str, reference: str, output: Path, **changes: Any) -> dict[str, Any]:
    runtime = {"workers": 0}
    return {
        "dataset": dataset,
        "reference": reference,
        "output": str(output),
        "pairs": 20,
        "features": {"steps": 10},
        "runtime": runtime,
    } | changes


def shuffle_labels(folder: Path, only: str = "") -> None:
    """Values of everyone, or of one sex, go to others of it."""
    path = folder / "participants.tsv"
    table = pd.read_csv(path, sep="\t")
    rows = np.flatnonzero(table["sex"] == only) if only else np.arange(len(table))
    order = np.random.default_rng(0).permutation(rows)
    columns = [c for c in table.columns if c != "participant_id"]
    table.loc[rows, columns] = table.loc[order, columns].to_numpy()
    table.to_csv(path, sep="\t", index=False)


def blur(folder: Path) -> None:
    for path in sorted(folder.glob("sub-*/anat/*.nii*")):
        image = nib.load(path)
        nib.save(nib.Nifti1Image(gaussian_filter(np.asarray(image.dataobj, np.float32), 1.0), image.affine), path)


def one_brain(folder: Path) -> None:
    """Mode collapse: everyone is the first."""
    paths = sorted(folder.glob("sub-*/anat/*.nii*"))
    for path in paths[1:]:
        shutil.copyfile(paths[0], path)


def enlarge(folder: Path) -> None:
    """Every volume in the head 5 % larger, by another voxel size; the labels stay."""
    scale = 1.05 ** (1 / 3)
    for path in sorted(folder.glob("sub-*/anat/*.nii*")):
        image = nib.load(path)
        affine = image.affine.copy()
        centre = affine @ [*((np.array(image.shape) - 1) / 2), 1]
        affine[:3, :3] *= scale
        affine[:3, 3] = centre[:3] + (affine[:3, 3] - centre[:3]) * scale
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj, np.float32), affine), path)


def flip(folder: Path) -> None:
    for path in sorted(folder.glob("sub-*/anat/*.nii*")):
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj, np.float32)[::-1], image.affine), path)


R, AGE_R = "ventricular_volume: r of measured with asked", "age: r of measured with asked"
SHARP = "sharpness (mean gradient): Cohen's d from training scans"
SIDES = "left-right: correlation with the training scans' mean asymmetry"
FRECHET, KID = "Fréchet distance to training scans", "kernel distance (KID) to training scans"
RECALL = "recall (k = 5)"
TWO_SAMPLE = {"folds": 2, "steps": 40, "learning_rate": 0.01}


def test_sound_volumes_pass_and_are_reported(cohorts: tuple[Path, Path, str]) -> None:
    found = judged(cohorts, "sound", two_sample=TWO_SAMPLE)
    assert found[R].value > 0.8
    assert 0.3 < found[METRIC].value < 0.7
    assert found[METRIC].n == 180
    for metric in (R, AGE_R, SHARP):
        assert found[metric].as_real, found[metric]
    output = cohorts[0] / "sound-evaluation"
    page = (output / "report.html").read_text()
    assert page.count("<img") >= 4
    assert "http://" not in page
    assert "https://" not in page
    numbers = json.loads((output / "report.json").read_text())
    assert {line["metric"] for line in numbers["findings"]} == set(found)
    measured = pd.read_csv(output / "measured.tsv", sep="\t")
    for metric in (FRECHET, KID, RECALL, SIDES):
        assert found[metric].as_real
        assert found[FRECHET].n == found[FRECHET].real_n < 90
    dataset = open_dataset(str(cohorts[0] / "sound"))
    assert measured["sample_id"].tolist() == dataset.sample_ids
    known = dataset.table["ventricular_volume"].to_numpy()
    assert np.corrcoef(measured["measured_ventricular_volume"], known)[0, 1] == pytest.approx(found[R].value, abs=1e-6)
    for name in ("measured-dataset", "measured-reference"):
        assert verify_dataset(open_store(str(output / name))).ok


def test_shuffled_labels_are_seen(cohorts: tuple[Path, Path, str]) -> None:
    found = judged(cohorts, "shuffled", shuffle_labels)
    assert abs(found[R].value) < 0.4
    assert not found[R].as_real
    assert not found[AGE_R].as_real
    assert found[SHARP].as_real


def test_within_categories_a_fault_of_one_is_seen_which_the_figure_of_all_blurs(
    cohorts: tuple[Path, Path, str],
) -> None:
    found = judged(cohorts, "women", lambda folder: shuffle_labels(folder, "F"), by="sex")
    women, men = (found[f"ventricular_volume (sex {sex}): r of measured with asked"] for sex in "FM")
    assert not women.as_real
    assert women.value < 0.5
    assert men.as_real
    assert men.value > 0.6  # a ruler that 30 scans calibrate
    assert women.n + men.n == 90
    assert R not in found
    assert "sex: AUC of measured for asked" in found
    assert not any(metric.startswith("sex (sex") for metric in found)
    measured = pd.read_csv(cohorts[0] / "women-evaluation" / "measured.tsv", sep="\t")
    assert measured["measured_ventricular_volume"].notna().all()


@pytest.mark.slow
def test_blurred_volumes_are_seen(cohorts: tuple[Path, Path, str]) -> None:
    found = judged(cohorts, "blurred", blur, two_sample=TWO_SAMPLE)
    assert found[METRIC].value > 0.9
    assert not found[METRIC].as_real
    assert not found[SHARP].as_real
    assert not found["voxel intensity: Wasserstein-1 distance to training scans"].as_real


@pytest.mark.slow
def test_volumes_five_percent_too_large_are_seen(cohorts: tuple[Path, Path, str]) -> None:
    found = judged(cohorts, "enlarged", enlarge)
    bias = found["brain_volume: bias"]
    assert bias.value > 25
    assert not bias.as_real
    assert found["brain_volume: r of measured with asked"].as_real


@pytest.mark.slow
def test_flipped_volumes_are_seen(cohorts: tuple[Path, Path, str]) -> None:
    found = judged(cohorts, "flipped", flip)
    assert found[SIDES].value < 0
    assert [metric for metric, finding in found.items() if not finding.as_real] == [SIDES]


@pytest.mark.slow
def test_mode_collapse_is_seen(cohorts: tuple[Path, Path, str]) -> None:
    found = judged(cohorts, "collapsed", one_brain)
    (pairs,) = (finding for metric, finding in found.items() if metric.startswith("MS-SSIM"))
    assert pairs.value == pytest.approx(1.0)
    assert not pairs.as_real
    assert found[RECALL].value < found[RECALL].real_low
    assert not found[FRECHET].as_real
    spread = found["ventricular_volume: SD measured over SD asked"]
    assert spread.value < 1e-6
    assert not spread.as_real


def test_mistakes_are_told_and_leave_nothing(cohorts: tuple[Path, Path, str], tmp_path: Path) -> None:
    _, _, reference = cohorts
    output = tmp_path / "out"
    for changes, message in (
        ({"dataset": str(tmp_path / "absent")}, "dataset: there is no finished dataset"),
        ({"reference": str(tmp_path / "absent")}, "reference: there is no finished dataset"),
        ({"segmentation": {"segmenter": str(tmp_path / "no.safetensors")}}, "segmenter: there are no weights"),
        ({"structures": {"age": "ventricles_ml"}}, "structures need segmentation"),
        ({"two_sample": {"batch_size": 64}}, "two_sample: needed are 64 volumes and 128 scans; there are "),
    ):
        config = config_of(reference, reference, output) | changes
        with pytest.raises(UserError, match=message):
            evaluate.describe(as_config(config, EvaluateConfig, tmp_path))
    assert not output.exists()
