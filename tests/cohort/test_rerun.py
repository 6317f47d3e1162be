"""The same command a second time: late scans are read, changed ones are named, and a cohort without a scan is a failure."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from brainsynth import open_dataset
from brainsynth.config.schema import PrepareConfig, RuntimeConfig, SourceConfig
from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.errors import UserError
from brainsynth.stages import prepare_cohort
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.verify import verify_dataset
from tests.cohort.scans import BRAIN, GRID, head, store

AGE = Covariate(name="age", kind="continuous", unit="years", low=1.0, high=100.0)


@pytest.fixture
def bids(tmp_path: Path) -> Path:
    """Three people; the scan of the second is a git-annex link without content, the third has no folder at all."""
    folder = tmp_path / "bids"
    store(scan_of(folder, 1), head(1).astype(np.int16))
    scan_of(folder, 2).parent.mkdir(parents=True)
    os.symlink("../../.git/annex/objects/x.nii.gz", scan_of(folder, 2))
    (folder / "participants.tsv").write_text("participant_id\tage\nsub-01\t41\nsub-02\t42\nsub-03\t43\n")
    return folder


def scan_of(folder: Path, number: int) -> Path:
    return folder / f"sub-0{number}" / "anat" / f"sub-0{number}_T1w.nii.gz"


def prepare(source: Path, output: Path, **changes: Any) -> Path:
    config = PrepareConfig(
        source=SourceConfig(path=str(source)),
        output=str(output),
        covariates=CovariateSchema(covariates=(AGE,)),
        volume=GRID,
        runtime=RuntimeConfig(workers=0),
        **changes,
    )
    prepare_cohort.run(config)
    return output


def reasons(root: Path) -> dict[str, str]:
    if not (root / "rejects.tsv").exists():
        return {}
    table = pd.read_csv(root / "rejects.tsv", sep="\t", dtype=str)
    return dict(zip(table["sample_id"], table["reason"], strict=True))


def test_scans_that_were_missing_are_read_when_they_are_there(bids: Path, tmp_path: Path) -> None:
    root = prepare(bids, tmp_path / "cohort")
    assert open_dataset(str(root)).sample_ids == ["01"]
    assert "git-annex link" in reasons(root)["02"]
    assert reasons(root)["03"].startswith("missing file")
    first = open_dataset(str(root))[0]["image"]
    scan_of(bids, 2).unlink()
    store(scan_of(bids, 2), head(2).astype(np.int16))
    prepare(bids, root)
    assert open_dataset(str(root)).sample_ids == ["01", "02"]
    store(scan_of(bids, 3), head(3).astype(np.int16))
    prepare(bids, root)
    dataset = open_dataset(str(root))
    assert dataset.sample_ids == ["01", "02", "03"]
    assert list(dataset.table["age"]) == [41, 42, 43]
    np.testing.assert_array_equal(dataset[0]["image"], first)
    assert reasons(root) == {}
    assert verify_dataset(open_store(str(root))).ok
    fresh = open_dataset(str(prepare(bids, tmp_path / "fresh")))
    np.testing.assert_array_equal(dataset.volumes(), fresh.volumes())


def test_a_pointer_that_is_still_one_is_not_read_again(bids: Path, tmp_path: Path) -> None:
    scan_of(bids, 2).unlink()
    scan_of(bids, 2).write_text("version https://git-lfs.github.com/spec/v1\n")
    root = prepare(bids, tmp_path / "cohort")
    before = sorted(root.glob("commits/*"))[0].read_bytes()
    prepare(bids, root)
    assert sorted(root.glob("commits/*"))[0].read_bytes() == before
    assert "Git LFS pointer" in reasons(root)["02"]


def test_a_broken_scan_that_was_replaced_is_read(bids: Path, tmp_path: Path) -> None:
    scan_of(bids, 2).unlink()
    store(scan_of(bids, 2), BRAIN.astype(np.uint8))
    root = prepare(bids, tmp_path / "cohort")
    assert "label map" in reasons(root)["02"]
    store(scan_of(bids, 2), head(2).astype(np.int16))
    assert open_dataset(str(prepare(bids, root))).sample_ids == ["01", "02"]


def test_a_scan_that_changed_is_named_every_time_and_read_when_asked(
    bids: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = prepare(bids, tmp_path / "cohort")
    before = open_dataset(str(root))[0]["image"]
    store(scan_of(bids, 1), head(9).astype(np.int16))
    for late in (False, True):
        if late:  # another row of the same shard is read again: the change is not forgotten
            scan_of(bids, 2).unlink()
            store(scan_of(bids, 2), head(2).astype(np.int16))
            prepare(bids, root)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            prepare(bids, root)
        assert "1 scans changed on disk" in caplog.text
        assert ": 01; to read them again: the same command with --set reread_changed=true" in caplog.text
        np.testing.assert_array_equal(open_dataset(str(root))[0]["image"], before)
    prepare(bids, root, reread_changed=True)
    assert np.abs(open_dataset(str(root))[0]["image"] - before).mean() > 0.001
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        prepare(bids, root)
    assert "changed on disk" not in caplog.text


def test_a_copy_with_another_time_is_the_same_scan(
    bids: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = prepare(bids, tmp_path / "cohort")
    shutil.copyfile(scan_of(bids, 1), tmp_path / "copy")
    shutil.move(tmp_path / "copy", scan_of(bids, 1))
    with caplog.at_level(logging.WARNING):
        prepare(bids, root)
    assert "changed on disk" not in caplog.text


def test_a_cohort_without_a_single_scan_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("participant_id,image,age\na,none.nii,40\nb,nor.nii,41\n")
    with pytest.raises(UserError, match=r"no scan of the cohort is usable.*rejects.tsv"):
        prepare(tmp_path / "t.csv", tmp_path / "cohort")
    assert set(reasons(tmp_path / "cohort")) == {"a", "b"}
    store(tmp_path / "none.nii", head(1).astype(np.int16))
    store(tmp_path / "nor.nii", head(2).astype(np.int16))
    assert len(open_dataset(str(prepare(tmp_path / "t.csv", tmp_path / "cohort")))) == 2


def test_what_is_in_no_row_is_named_in_a_table_and_the_cohort_is_whole(bids: Path, tmp_path: Path) -> None:
    store(scan_of(bids, 7), head(7).astype(np.int16))
    (scan_of(bids, 1).parent / "._sub-01_T1w.nii.gz").write_bytes(b"\0\5\x16\7")
    root = prepare(bids, tmp_path / "cohort")
    table = pd.read_csv(root / "left_out.tsv", sep="\t")
    assert list(table["path"]) == ["sub-01/anat/._sub-01_T1w.nii.gz", "sub-07"]
    assert open_dataset(str(root)).manifest["num_samples"] == 3
    assert verify_dataset(open_store(str(root))).ok


def test_a_cohort_of_the_former_rule_says_how_to_resume_it(bids: Path, tmp_path: Path) -> None:
    root = prepare(bids, tmp_path / "cohort", intensity_rule="percentiles")
    with pytest.raises(
        UserError, match="(?s)holds another plan.*`intensity_rule: percentiles` in the config resumes it"
    ):
        prepare(bids, root)
    prepare(bids, root, intensity_rule="percentiles")


def test_a_scan_that_two_people_share_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (1, 2, 3):
        store(scan_of(tmp_path / "bids", number), head(min(number, 2)).astype(np.int16))
    (tmp_path / "bids/participants.tsv").write_text("participant_id\tage\nsub-01\t41\nsub-02\t42\nsub-03\t43\n")
    prepare(tmp_path / "bids", tmp_path / "cohort")
    assert (
        "the same scan under more than one name, byte for byte (perhaps on both sides of the split): 02 = 03;"
        in caplog.text
    )


def test_a_corrected_table_is_refused_with_the_rows_that_changed(bids: Path, tmp_path: Path) -> None:
    prepare(bids, tmp_path / "cohort")
    (bids / "participants.tsv").write_text("participant_id\tage\nsub-01\t47\nsub-02\t42\nsub-03\tn/a\n")
    with pytest.raises(UserError, match="another plan") as error:
        prepare(bids, tmp_path / "cohort")
    assert str(error.value).splitlines()[-2:] == ["  01: age was 41.0, is 47.0", "  03: age was 43.0, is nan"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty .* give a new or empty output folder$"):
        prepare(bids, tmp_path / "other")
