"""A cohort's label maps: the same cut as the scan, integers by the table, and every bad one refused with its reason."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainsynth import UserError, open_dataset, verify_dataset
from brainsynth.cohort.label_table import read_label_table
from brainsynth.cohort.phantom import phantom_grid
from brainsynth.cohort.phantom_cohort import DERIVATIVE, write_phantom_cohort
from brainsynth.cohort.prepare import plan_cohort
from brainsynth.cohort.scan import load_labelled_scan
from brainsynth.config.schema import SourceConfig
from brainsynth.stages import prepare_cohort
from tests.cohort.test_prepare import config_of, prepare, rejects, rows_of, save, scan_of
from tests.conftest import GRID

TABLE = (
    "index\tname\tabbreviation\tcolor\n1\tCSF\tCSF\t#3C70C8\n2\tGrey\tn/a\tn/a\n3\tWhite\tWM\tn/a\n4\tVentricles\t\t\n"
)


def map_of(folder: Path, number: int) -> Path:
    name = f"sub-phantom{number:04d}"
    return folder / DERIVATIVE / name / "anat" / f"{name}_dseg.nii.gz"


def voxels(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(nib.load(path).dataobj)


def table_source(folder: Path, rows: pd.DataFrame, table: str = TABLE, **changes: Any) -> SourceConfig:
    folder.mkdir(exist_ok=True)
    (folder / "dseg.tsv").write_text(table)
    rows.to_csv(folder / "scans.csv", index=False)
    labels = {"label_column": "dseg", "label_table": str(folder / "dseg.tsv"), "label_source": "by hand"}
    return SourceConfig(path=str(folder / "scans.csv"), **{**labels, **changes})


def test_a_bids_folder_with_its_derivative(labelled_folder: Path, tmp_path: Path) -> None:
    source = SourceConfig(path=str(labelled_folder), label_folder=DERIVATIVE, label_source="construction")
    prepare(source, tmp_path / "cohort")
    dataset = open_dataset(str(tmp_path / "cohort"))
    assert len(dataset) == 6
    for number, sample in enumerate(dataset, start=1):
        assert sample["labels"].dtype == np.uint8
        np.testing.assert_array_equal(sample["labels"], voxels(map_of(labelled_folder, number)))
    assert [one["name"] for one in dataset.label_table] == ["CSF", "Grey-Matter", "White-Matter", "Ventricles"]
    counted = [(sample["labels"] == 4).sum() * GRID.voxel_ml for sample in dataset]
    np.testing.assert_allclose(dataset.label_volumes["Ventricles"], counted)
    assert verify_dataset(str(tmp_path / "cohort")).ok
    assert "construction" in (tmp_path / "cohort" / "README.md").read_text()


def test_the_label_map_is_cut_as_the_scan_is(labelled_folder: Path, tmp_path: Path) -> None:
    """Another grid, and centred on the head: a label map stays where its image is."""
    table = read_label_table(str(labelled_folder / DERIVATIVE / "dseg.tsv"), "construction")
    other = phantom_grid(5.0, (32, 44, 30))
    scan, labels = scan_of(labelled_folder, 1), map_of(labelled_folder, 1)
    # As an image of 0 and 1 the brain takes the same way as its label map, but trilinearly.
    alone = save((voxels(labels) > 0).astype(np.float32), tmp_path / "alone.nii.gz")
    _, found, _ = load_labelled_scan(str(scan), "", str(labels), table, other, "world", 512, "robust", None)
    brain = load_labelled_scan(alone, "", "", None, other, "world", 512, "percentiles", None)[0] > 0.5
    assert found is not None
    assert set(np.unique(found)) == {0, 1, 2, 3, 4}
    assert 2 * (brain & (found > 0)).sum() > 0.95 * (brain.sum() + (found > 0).sum())
    far = replace(GRID, origin_mm=(GRID.origin_mm[0] + 4000.0, *GRID.origin_mm[1:]))
    shifted = save(voxels(scan), tmp_path / "far.nii.gz", far.affine)
    moved = save(voxels(labels), tmp_path / "far_dseg.nii.gz", far.affine)
    at_home, away = (
        load_labelled_scan(str(a), "", str(b), table, GRID, "foreground", 512, "robust", None)
        for a, b in ((scan, labels), (shifted, moved))
    )
    np.testing.assert_array_equal(at_home[1], away[1])  # type: ignore[arg-type]
    assert at_home[1] is not None
    assert (at_home[1] == 4).any()


def test_a_mask_takes_labels_with_it(labelled_folder: Path, tmp_path: Path) -> None:
    rows = rows_of(labelled_folder).iloc[:1].copy()
    left = np.zeros(GRID.shape_xyz, np.uint8)
    left[:10] = 1
    rows["mask"], rows["dseg"] = save(left, tmp_path / "mask.nii.gz"), str(map_of(labelled_folder, 1))
    prepare(table_source(tmp_path / "in", rows, mask_column="mask"), tmp_path / "cohort")
    (sample,) = open_dataset(str(tmp_path / "cohort"))
    assert not sample["labels"][10:].any()
    assert sample["labels"][:10].any()


def bad_map(kind: str, good: np.ndarray[Any, Any], folder: Path) -> str | None:
    """One wrong label map, by the reason that it must get."""
    path, shifted = folder / f"{kind}.nii.gz", GRID.affine.copy()
    shifted[0, 3] += 8
    if kind == "shape":
        return save(good[:, :, :-1], path)
    if kind == "affine":
        return save(good, path, shifted)
    if kind == "float":
        return save(good * 0.3, path)
    if kind == "nan":
        return save(np.where(good == 4, np.nan, good).astype(np.float32), path)
    if kind == "lost":
        return save(np.where(good == 4, 255, good).astype(np.uint8), path)
    if kind == "freesurfer":
        return save(np.where(good == 2, 2035, good.astype(np.int16)), path)
    if kind == "negative":
        return save(np.where(good == 2, -1, good.astype(np.int16)), path)
    if kind == "empty":
        return save(np.zeros_like(good), path)
    if kind == "text":
        path.write_text("no image")
        return str(path)
    return {"nowhere": str(folder / "nowhere.nii.gz"), "not named": None}[kind]


REASONS = {
    "shape": "label map is on another grid than the image",
    "affine": "label map is on another grid than the image",
    "float": "label map: 0.3 is not a whole number",
    "nan": "label map: NaN or infinite voxels",
    "lost": "label map: the label table lacks 255",
    "freesurfer": "label map: the label table lacks 2035",
    "negative": "label map: the label table lacks -1",
    "empty": "label map: all background",
    "text": "label map: unreadable: neither a NIfTI nor an MGH file",
    "nowhere": "missing label map",
    "not named": "missing label map",
}


def test_every_bad_label_map_is_one_reject_with_its_reason(labelled_folder: Path, tmp_path: Path) -> None:
    good, template = voxels(map_of(labelled_folder, 1)), rows_of(labelled_folder).iloc[0]
    kinds = [*REASONS, "whole floats"]
    rows = pd.DataFrame([dict(template, participant_id=kind) for kind in kinds])
    rows["image"] = [shutil.copy(template["image"], tmp_path / f"scan-{place}.nii.gz") for place in range(len(kinds))]
    rows["dseg"] = [bad_map(kind, good, tmp_path) for kind in REASONS] + [
        save(good.astype(np.float64), tmp_path / "whole.nii.gz")
    ]
    prepare(table_source(tmp_path / "in", rows), tmp_path / "cohort")
    assert rejects(tmp_path / "cohort") == {kind.replace(" ", ""): reason for kind, reason in REASONS.items()}
    (sample,) = open_dataset(str(tmp_path / "cohort"))
    np.testing.assert_array_equal(sample["labels"], good)
    assert verify_dataset(str(tmp_path / "cohort")).ok


def test_integers_of_freesurfer_are_mapped_by_a_column(labelled_folder: Path, tmp_path: Path) -> None:
    good = voxels(map_of(labelled_folder, 1)).astype(np.int16)
    lut = np.array([0, 24, 1035, 2, 4], np.int16)[good]
    lut[good == 1] = np.where(np.arange((good == 1).sum()) % 2, 24, 77)  # 77: hypointensities
    lut[0, 0, 0] = 2035
    rows = rows_of(labelled_folder).iloc[:1].copy()
    rows["dseg"] = save(lut, tmp_path / "aseg.nii.gz")
    table = (
        "index\tname\tvalues\n0\tbackground\t24, 77\n1\tCerebral-Cortex\t1000-1035, 2000-2035\n"
        "2\tWhite-Matter\t2;41\n3\tVentricles\t4;43\n"
    )
    prepare(table_source(tmp_path / "in", rows, table), tmp_path / "cohort")
    (sample,) = open_dataset(str(tmp_path / "cohort"))
    expected = np.array([0, 0, 1, 2, 3])[good]
    expected[0, 0, 0] = 1
    np.testing.assert_array_equal(sample["labels"], expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name\nCSF\n", "missing column"),
        ("index\tname\n2035\tctx\n", "line 2: index 2035 cannot be stored .* put 2035 in `values`"),
        ("index\tname\n255\tlast\n", "255 marks lost data"),
        ("index\tname\n1.5\tx\n", "line 2: index is a whole number, not '1.5'"),
        ("index\tname\n-1\tx\n", "line 2: index is a whole number"),
        ("index\tname\n1\tx\n1\ty\n", "the same index more than once: 1"),
        ("index\tname\n1\tx\n2\tX\n", "the same name more than once: x"),
        ("index\tname\tvalues\n1\tx\t3\n2\ty\t3\n", "the same value more than once: 3"),
        ("index\tname\tvalues\n1\tx\ta few\n", "line 2: values are whole numbers"),
        ("index\tname\tvalues\n1\tx\t9-3\n", "line 2: values are whole numbers"),
        ("index\tname\tvalues\n1\tx\t0-99999999\n", "line 2: values are whole numbers"),
        ("index\tname\tcolor\n1\tx\tred\n", "line 2: label 1 .*color is #rrggbb, not 'red'"),
        ("index\tname\n1\tn/a\n", "line 2: label 1: name and abbreviation are"),
        ("index\tname\n0\tbackground\n", "needs at least one label"),
    ],
)
def test_a_table_that_is_wrong_is_one_error_with_lines(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "dseg.tsv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_label_table(str(tmp_path / "dseg.tsv"), "")


def test_labels_that_are_asked_for_the_wrong_way_are_a_users_mistake(labelled_folder: Path, tmp_path: Path) -> None:
    rows = rows_of(labelled_folder).assign(dseg="x")
    by_table = table_source(tmp_path / "in", rows)
    for source, message in (
        (replace(by_table, label_column="seg"), "there is no column 'seg'"),
        (replace(by_table, label_table=str(tmp_path / "none.tsv")), "source.label_table: there is no table"),
        (replace(by_table, label_column=None, label_folder="x"), "label_folder needs a BIDS folder"),
        (replace(by_table, path=str(labelled_folder)), "label_column needs a table"),
        (SourceConfig(path=str(labelled_folder), label_folder="nowhere"), "label_folder: there is no folder"),
    ):
        with pytest.raises(UserError, match=message):
            plan_cohort(config_of(source, tmp_path / "cohort"))
    with pytest.raises(ValueError, match="label_column needs label_table"):
        SourceConfig(path="x", label_column="dseg")
    with pytest.raises(ValueError, match="need label_column"):
        SourceConfig(path="x", label_table="dseg.tsv")
    assert not (tmp_path / "cohort").exists()


def test_two_label_maps_of_one_scan_are_refused(tmp_path: Path) -> None:
    folder = write_phantom_cohort(tmp_path / "bids", 1, 1, GRID, labels=True)
    first = map_of(folder, 1)
    shutil.copy(first, first.with_name(first.name.replace("_dseg", "_desc-other_dseg")))
    source = SourceConfig(path=str(folder), label_folder=DERIVATIVE)
    with pytest.raises(UserError, match="2 label maps of one scan"):
        plan_cohort(config_of(source, tmp_path / "cohort"))


def test_a_label_map_that_comes_late_is_read_by_the_same_command(tmp_path: Path) -> None:
    folder = write_phantom_cohort(tmp_path / "bids", 2, 1, GRID, labels=True)
    late, aside = map_of(folder, 2), tmp_path / "aside.nii.gz"
    late.rename(aside)
    config = config_of(SourceConfig(path=str(folder), label_folder=DERIVATIVE), tmp_path / "cohort")
    prepare_cohort.run(config)
    assert rejects(tmp_path / "cohort") == {"phantom0002": "missing label map"}
    aside.rename(late)
    prepare_cohort.run(config)
    assert rejects(tmp_path / "cohort") == {}
    assert len(open_dataset(str(tmp_path / "cohort"))) == 2


def test_the_table_is_part_of_the_plan_and_its_path_is_not(labelled_folder: Path, tmp_path: Path) -> None:
    rows = rows_of(labelled_folder).iloc[:2].copy()
    rows["dseg"] = [str(map_of(labelled_folder, n)) for n in (1, 2)]
    source = table_source(tmp_path / "in", rows)
    first = plan_cohort(config_of(source, tmp_path / "cohort")).plan
    shutil.copy(tmp_path / "in" / "dseg.tsv", tmp_path / "other.tsv")
    moved = replace(source, label_table=str(tmp_path / "other.tsv"))
    assert plan_cohort(config_of(moved, tmp_path / "cohort")).plan.fingerprint == first.fingerprint
    (tmp_path / "other.tsv").write_text(TABLE.replace("Ventricles", "Lateral ventricles"))
    assert plan_cohort(config_of(moved, tmp_path / "cohort")).plan.fingerprint != first.fingerprint


def test_phantoms_without_labels_get_them_by_the_same_command(tmp_path: Path) -> None:
    folder = write_phantom_cohort(tmp_path / "bids", 1, 1, GRID)
    before = scan_of(folder, 1).read_bytes()
    assert not (folder / "derivatives").exists()
    write_phantom_cohort(folder, 1, 1, GRID, labels=True)
    assert scan_of(folder, 1).read_bytes() == before
    labels = voxels(map_of(folder, 1))
    assert set(np.unique(labels)) == {0, 1, 2, 3, 4}
