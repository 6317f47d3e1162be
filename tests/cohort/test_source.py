"""Tables, people, visits and folders as people have them: each row of a cohort is the right scan with the right facts."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from brainsynth import open_dataset
from brainsynth.cohort.prepare import plan_cohort
from brainsynth.cohort.source import read_source
from brainsynth.config.schema import PrepareConfig, RuntimeConfig, SourceConfig
from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.errors import UserError
from brainsynth.executors.dataset import make_dataset
from brainsynth.storage.cells import read_cells
from tests.cohort.scans import GRID, head, store

AGE = Covariate(name="age", kind="continuous", unit="years", low=1.0, high=100.0)


def categorical(name: str, *categories: str) -> Covariate:
    return Covariate(name=name, kind="categorical", categories=categories)


def config_of(path: Path, *covariates: Covariate, **source: Any) -> PrepareConfig:
    return PrepareConfig(
        source=SourceConfig(path=str(path), **source),
        output=str(path.parent / "cohort"),
        covariates=CovariateSchema(covariates=covariates or (AGE,)),
        volume=GRID,
        runtime=RuntimeConfig(workers=0),
    )


def planned(path: Path, *covariates: Covariate, **source: Any) -> pd.DataFrame:
    return plan_cohort(config_of(path, *covariates, **source)).samples


def table(folder: Path, text: str, name: str = "t.csv") -> Path:
    (folder / name).write_text(text)
    return folder / name


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store(tmp_path_factory.mktemp("scan") / "scan.nii.gz", head(1).astype("int16"))


def folder_of(root: Path, scan: Path, *places: str) -> Path:
    """A BIDS folder with scans at `sub-01`, or `sub-01/ses-1`, …"""
    for place in places:
        name = place.replace("/", "_")
        (root / place / "anat").mkdir(parents=True)
        shutil.copy(scan, root / place / "anat" / f"{name}_T1w.nii.gz")
    return root


# Cells -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "categories"),
    [
        (["None", "MCI", "None"], ("None", "MCI")),
        (["NA", "EU", "nan"], ("NA", "EU", "nan")),
        (["01", "1", "001"], ("01", "1", "001")),
        (["TRUE", "FALSE", "true"], ("TRUE", "FALSE", "true")),
        (["1.0", "0.5", "1"], ("1.0", "0.5", "1")),
        (["NULL", "-", "#N/A"], ("NULL", "-", "#N/A")),
    ],
)
def test_categories_are_the_texts_of_the_table(tmp_path: Path, cells: list[str], categories: tuple[str, ...]) -> None:
    rows = "".join(f"p{n},s.nii,{20 + n},{cell}\n" for n, cell in enumerate(cells))
    path = table(tmp_path, f"participant_id,image,age,dx\n{rows}")
    assert list(planned(path, AGE, categorical("dx", *categories))["dx"]) == cells


def test_a_whole_number_that_pandas_wrote_with_a_point_is_that_number(tmp_path: Path) -> None:
    path = table(tmp_path, "participant_id,image,age,grade\na,s.nii,20,1.0\nb,s.nii,21,\nc,s.nii,22,2.0\n")
    assert list(planned(path, AGE, categorical("grade", "1", "2"))["grade"])[::2] == ["1", "2"]
    other = planned(path, AGE, categorical("grade", "01", "02"))
    assert list(other["grade"])[::2] == [
        "1.0",
        "2.0",
    ]  # no category of the schema: rejected, with the nearest one named


@pytest.mark.parametrize(
    ("cells", "excluded", "kept"),
    [
        (["TRUE", "FALSE"], ("FALSE",), [0]),
        (["01", "02", "2"], ("02",), [0, 2]),
        (["0.0", "1.0", "0.5"], ("0.5", "1.0"), [0]),
        (["ok", "n/a", ""], ("n/a",), [0]),
        (["ok", "", "bad"], ("", "bad"), [0]),
        (["1.0", "2.0"], ("2",), [0]),
        (["None", "none"], ("None",), [1]),
    ],
)
def test_exclude_compares_texts(tmp_path: Path, cells: list[str], excluded: tuple[str, ...], kept: list[int]) -> None:
    rows = "".join(f"p{n},s.nii,{20 + n},{cell}\n" for n, cell in enumerate(cells))
    samples = planned(table(tmp_path, f"participant_id,image,age,qc\n{rows}"), exclude={"qc": excluded})
    assert [row for row, reason in enumerate(samples["excluded"]) if not reason] == kept


def test_an_exclude_that_matches_nothing_is_reported(tmp_path: Path) -> None:
    path = table(tmp_path, "participant_id,image,age,qc\na,s.nii,20,Fail\nb,s.nii,21,ok\n")
    preview = plan_cohort(config_of(path, exclude={"qc": ("fail", "ok")})).preview
    assert "source.exclude: no row has qc = 'fail'; did you mean 'Fail'?" in preview
    assert "'ok'" not in preview
    with pytest.raises(UserError, match="missing column.*QC"):
        planned(path, exclude={"QC": ("fail",)})


def test_a_spelling_that_an_exclude_does_not_reach_is_reported(tmp_path: Path) -> None:
    path = table(tmp_path, "participant_id,image,age,qc\na,s.nii,20,fail\nb,s.nii,21,Fail \nc,s.nii,22,pass\n")
    work = plan_cohort(config_of(path, exclude={"qc": ("fail",)}))
    assert "source.exclude: qc = 'fail' does not exclude 'Fail '; list each spelling" in work.warnings
    assert not [w for w in plan_cohort(config_of(path, exclude={"qc": ("fail", "Fail ")})).warnings if "exclude" in w]


@pytest.mark.parametrize("rows", ["a,s.nii,60.5,F", "a,s.nii,,F", "a,s.nii,61,"])
@pytest.mark.parametrize("missing", ["reject", "keep"])
def test_a_table_without_one_usable_row_is_planned_as_such(tmp_path: Path, rows: str, missing: Any) -> None:
    """A whole column of decimal commas, say: every row is accounted for, with its reason."""
    path = table(tmp_path, "participant_id;image;age;sex\n" + rows.replace(",", ";").replace(".", ",") + "\n")
    config = replace(config_of(path, AGE, categorical("sex", "F", "M")), missing_covariates=missing)
    work = plan_cohort(config)
    assert len(work.samples) == 1
    assert any("trainings will refuse this cohort" in warning for warning in work.warnings)


def test_letters_in_another_composition_are_named_as_that(tmp_path: Path) -> None:
    composed, decomposed = "K\u00f6ln", "Ko\u0308ln"
    (problem,) = categorical("site", composed, "Bonn").problems(pd.Series([decomposed]), allow_out_of_range=False)
    assert problem.endswith(f"did you mean {composed!r}, in other Unicode code points: 'K\\xf6ln'?")


def test_a_number_that_is_none_is_named_and_the_others_stay_numbers(tmp_path: Path) -> None:
    cells = ["40", "41,5", "None", "nan", "1_0", " 50 ", "inf", "0x10", "٤٠"]
    rows = "".join(f'p{n},s.nii,"{cell}"\n' for n, cell in enumerate(cells))
    samples = planned(table(tmp_path, f"participant_id,image,age\n{rows}"))
    assert samples["age"].dtype == float
    assert [n for n, reason in enumerate(samples["excluded"]) if not reason] == [0, 5]
    assert samples["excluded"][1] == "age = '41,5' is not a finite number; write it with a decimal point"
    assert samples["excluded"][3] == "age = 'nan' is not a finite number; a missing value is an empty cell or n/a"
    assert list(samples["age"][[0, 5]]) == [40.0, 50.0]


def test_numbers_of_text_are_those_that_pandas_reads(tmp_path: Path) -> None:
    path = table(tmp_path, "participant_id,image,age\n" + "".join(f"p{n},s.nii,{n / 7 + 1}\n" for n in range(400)))
    assert list(planned(path)["age"]) == list(pd.read_csv(path)["age"])


def test_ids_of_parquet_are_whole_numbers(tmp_path: Path) -> None:
    pd.DataFrame({"participant_id": [1.0, 2.0], "image": "s.nii", "age": [30.0, 31.0]}).to_parquet(
        tmp_path / "t.parquet"
    )
    samples = planned(tmp_path / "t.parquet")
    assert list(samples["sample_id"]) == ["1", "2"]
    assert list(samples["subject"]) == ["1", "2"]


def test_rows_to_generate_are_read_by_the_same_rules(tmp_path: Path) -> None:
    path = table(tmp_path, "age,dx,site\n40,None,01\n50,MCI,02\n")
    schema = CovariateSchema(covariates=(AGE, categorical("dx", "None", "MCI"), categorical("site", "01", "02")))
    rows = schema.validate(read_cells(str(path), "covariates.table"), str(path))
    assert rows.to_numpy().tolist() == [[40.0, "None", "01"], [50.0, "MCI", "02"]]
    path = table(tmp_path, "age,dx,site\n40,none,1\nforty,MCI,02\n")
    with pytest.raises(UserError) as error:
        schema.validate(read_cells(str(path), "covariates.table"), str(path))
    assert "line 2: dx = 'none' is not one of None, MCI; did you mean 'None'?" in str(error.value)
    assert "line 2: site = '1' is not one of 01, 02; did you mean '01'?" in str(error.value)
    assert "line 3: age = 'forty' is not a finite number" in str(error.value)


def test_text_of_parquet_that_is_stored_as_bytes_is_text(tmp_path: Path) -> None:
    frame = pd.DataFrame({"participant_id": [b"sub-01", "Zo\u00eb".encode()], "image": b"s.nii", "age": [30.0, 31.0]})
    frame.to_parquet(tmp_path / "t.parquet")
    assert list(planned(tmp_path / "t.parquet")["subject"]) == ["sub-01", "Zo\u00eb"]
    frame.assign(image=b"\xff").to_parquet(tmp_path / "t.parquet")
    with pytest.raises(UserError, match="cannot be read as a table"):
        planned(tmp_path / "t.parquet")


# Columns that are not ours ---------------------------------------------------------------------------------------------


def test_columns_that_bear_our_names_are_the_users(tmp_path: Path, scan: Path) -> None:
    header = "participant_id,scan,age,mask,session,split,status,excluded,reason,sample_id,subject,image,row"
    text = f"{header}\na,{scan},40,/no/such/mask.nii,3,validation,lost,yes,because,Z9,somebody,other.nii,17\n"
    config = config_of(table(tmp_path, text), image_column="scan")
    manifest = make_dataset(plan_cohort(config), config.runtime)
    assert (manifest.num_ok, manifest.num_samples) == (1, 1)
    assert open_dataset(config.output).sample_ids == ["a"]
    row = pd.read_parquet(Path(config.output) / "samples.parquet").iloc[0]
    assert (row["sample_id"], row["subject"], row["split"], row["mask"]) == ("a", "a", "validation", "")


@pytest.mark.parametrize("name", ["status", "split", "sample_id", "image", "row", "subject", "reason"])
def test_a_covariate_with_our_name_is_refused_when_the_config_is_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*our own column.*source.columns"):
        config_of(tmp_path / "t.csv", replace(AGE, name=name))


# People and visits -----------------------------------------------------------------------------------------------------

VISITS = "participant_id\tsession_id\tage\nsub-01\tses-1\t60\nsub-01\tses-2\t70\n02\tses-1\t50\n02\t2\t58\n"


def test_one_row_a_visit_pairs_each_scan_with_its_own_age(tmp_path: Path, scan: Path) -> None:
    folder = folder_of(tmp_path / "bids", scan, "sub-01/ses-1", "sub-01/ses-2", "sub-02/ses-1", "sub-02/ses-2")
    table(folder, VISITS, "participants.tsv")
    samples = planned(folder, session_column="session_id")
    assert dict(zip(samples["sample_id"], samples["age"], strict=True)) == {
        "01ses1": 60, "01ses2": 70, "02ses1": 50, "02ses2": 58
    }  # fmt: skip
    assert [Path(image).parts[-3] for image in samples["image"]] == ["ses-1", "ses-2", "ses-1", "ses-2"]
    with pytest.raises(UserError, match="(?s)more than one row.*session_column.*'session_id'.*lines 2, 3: 01"):
        planned(folder)


def test_a_visit_without_its_scan_and_a_scan_without_its_row(tmp_path: Path, scan: Path) -> None:
    folder = folder_of(tmp_path / "bids", scan, "sub-01/ses-1", "sub-01/ses-3", "sub-02/ses-1", "sub-99")
    (folder / "sub-01/ses-1/anat/._sub-01_ses-1_T1w.nii.gz").write_bytes(b"\0\5\x16\7")
    table(folder, VISITS, "participants.tsv")
    source = read_source(SourceConfig(path=str(folder), session_column="session_id"))
    assert [Path(s.image).name for s in source.scans] == ["sub-01_ses-1_T1w.nii.gz", "", "sub-02_ses-1_T1w.nii.gz", ""]
    assert "no sub-01/ses-2/anat" in source.scans[1].reason
    assert [name for name, _ in source.left_out] == [
        "sub-01/ses-1/anat/._sub-01_ses-1_T1w.nii.gz", "sub-01/ses-3/anat/sub-01_ses-3_T1w.nii.gz", "sub-99"
    ]  # fmt: skip
    preview = plan_cohort(config_of(folder, session_column="session_id")).preview
    assert "sub-99: no row of participants.tsv names this subject" in preview


@pytest.mark.parametrize("common", [False, True])
def test_bids_tables_of_sessions_give_each_visit_its_age(tmp_path: Path, scan: Path, common: bool) -> None:
    folder = folder_of(tmp_path / "bids", scan, "sub-01/ses-1", "sub-01/ses-2", "sub-02/ses-1")
    table(folder, "participant_id\tage\tsex\nsub-01\t60\tF\nsub-02\t50\tM\n", "participants.tsv")
    if common:
        table(folder, "participant_id\tsession_id\tage\nsub-01\tses-1\t61\nsub-02\tses-1\t51\n", "sessions.tsv")
    else:
        table(folder / "sub-01", "session_id\tage\nses-1\t61\n", "sub-01_sessions.tsv")
        table(folder / "sub-02", "session_id\tage\nses-1\t51\n", "sub-02_sessions.tsv")
    samples = planned(folder, AGE, categorical("sex", "F", "M"))
    assert list(samples["sample_id"]) == ["01ses1", "01ses2", "02ses1"]
    assert list(samples["age"].fillna(-1)) == [61, -1, 51]  # of the visit that is not listed, no age is known
    assert list(samples["sex"]) == ["F", "F", "M"]


def test_rows_of_a_table_are_visits_where_it_says_so(tmp_path: Path) -> None:
    path = table(tmp_path, "id,wave,image,age\nA,1,a.nii,30\nA,2,b.nii,34\nB,,c.nii,50\n")
    samples = planned(path, subject_column="id", session_column="wave")
    assert list(samples["sample_id"]) == ["A1", "A2", "B"]
    assert samples["split"][0] == samples["split"][1]
    with pytest.raises(UserError, match="(?s)more than one row.*none: add one.*lines 2, 3: A"):
        planned(path, subject_column="id")
    path = table(tmp_path, "id,wave,image,age\nA,1,a.nii,30\nA,1,b.nii,34\n")
    with pytest.raises(UserError, match="(?s)this id and wave.*lines 2, 3: A, 1"):
        planned(path, subject_column="id", session_column="wave")


def test_a_prefix_makes_nobody_another_person(tmp_path: Path, scan: Path) -> None:
    rows = "".join(f"sub-{n:02d},1,s.nii,40\n{n:02d},2,s.nii,41\n" for n in range(60))
    path = table(tmp_path, f"participant_id,visit,image,age\n{rows}")
    samples = planned(path, session_column="visit")
    people = samples.assign(person=samples["subject"].str.removeprefix("sub-")).groupby("person")
    assert people["split"].nunique().max() == 1
    assert set(samples["split"]) == {"train", "validation"}
    assert people["subject"].nunique().max() == 1
    with pytest.raises(UserError, match="lines 2, 3: 00"):
        planned(path)


def test_the_plan_of_the_former_rule_has_its_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed before sessions, rules of intensity and cells as text were there."""
    monkeypatch.chdir(tmp_path)
    Path("scans.csv").write_text(
        "participant_id,session,image,age,sex,place,qc\nA1,MR1,/data/a1.nii.gz,40.123456789012345,F,1,ok\n"
        "A1,MR2,/data/a1b.nii.gz,41,F,,ok\nA2,,/data/a2.nii.gz,,M,3,fail\nsub-A3,,/data/a3.nii.gz,0.1,n/a,2,ok\n"
    )
    covariates = (
        Covariate(name="age", kind="continuous", unit="years", low=18.0, high=95.0),
        Covariate(name="sex", kind="binary", categories=("F", "M")),
        categorical("site", "1", "2", "3"),
    )
    source = SourceConfig(
        path="scans.csv", session_column="session", columns={"site": "place"}, exclude={"qc": ("fail",)}
    )
    grid = replace(GRID, shape_xyz=(20, 26, 20), spacing_mm=(8.0, 8.0, 8.0), origin_mm=(-76.0, -120.0, -60.0))
    config = PrepareConfig(
        source=source,
        output="out",
        covariates=CovariateSchema(covariates=covariates),
        volume=grid,
        missing_covariates="keep",
        intensity_rule="percentiles",
    )
    plan = plan_cohort(config).plan
    assert plan.fingerprint == "ddce7ee858c0c7f8aefa3276f611541a5504ea72cb4f1506c6f0f18bc2d6cbc5"
    assert plan_cohort(replace(config, intensity_rule="robust")).plan.fingerprint != plan.fingerprint


def test_several_sessions_and_one_row_are_said(tmp_path: Path, scan: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folder_of(tmp_path / "bids", scan, "sub-01/ses-1", "sub-01/ses-2", "sub-02/ses-1")
    table(folder, "participant_id\tage\n01\t60\n02\t50\n", "participants.tsv")
    with caplog.at_level(logging.WARNING):
        assert list(planned(folder)["age"]) == [60, 60, 50]
    assert "1 people have several sessions and one row" in caplog.text


def test_a_column_for_a_covariate_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"source.columns: 'agee' is not a covariate; did you mean 'age'\?"):
        config_of(tmp_path / "t.csv", columns={"agee": "age_at_scan"})


def test_two_rows_of_one_scan_are_refused(tmp_path: Path, scan: Path) -> None:
    shutil.copy(scan, tmp_path / "s.nii.gz")
    path = table(tmp_path, "participant_id,image,age\na,s.nii.gz,20\nb,t.nii.gz,21\nc,./s.nii.gz,22\n")
    with pytest.raises(UserError, match=r"more than one row names the same scan(.|\n)*lines 2, 4"):
        planned(path)


def test_a_scan_whose_name_is_that_of_another_person_or_visit_is_left_out(tmp_path: Path, scan: Path) -> None:
    root = folder_of(tmp_path, scan, "sub-01", "sub-02", "sub-02/ses-1")
    shutil.copy(scan, root / "sub-01/anat/sub-02_T1w.nii.gz")
    shutil.copy(scan, root / "sub-02/ses-1/anat/sub-02_ses-2_T1w.nii.gz")
    table(root, "participant_id\tage\nsub-01\t30\nsub-02\t31\n", "participants.tsv")
    source = read_source(SourceConfig(path=str(root)))
    assert [Path(scan.image).name for scan in source.scans] == [
        "sub-01_T1w.nii.gz",
        "sub-02_T1w.nii.gz",
        "sub-02_ses-1_T1w.nii.gz",
    ]
    assert source.left_out == (
        ("sub-01/anat/sub-02_T1w.nii.gz", "its name says sub-02, its folder sub-01"),
        ("sub-02/ses-1/anat/sub-02_ses-2_T1w.nii.gz", "its name says ses-2, its folder ses-1"),
    )


def test_ids_that_look_alike_are_reported(tmp_path: Path) -> None:
    path = table(
        tmp_path, "participant_id,image,age\nP01,s.nii,20\np01,s.nii,21\n7,s.nii,22\n007,s.nii,23\nx,s.nii,24\n"
    )
    warnings = [w for w in plan_cohort(config_of(path)).warnings if "look alike" in w]
    assert warnings == [
        "read as different people, though the ids look alike: '007' and '7', 'P01' and 'p01'",
    ]


def test_an_id_that_names_nobody_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rows without participant_id: line 3"):
        planned(table(tmp_path, "participant_id,image,age\na,s.nii,20\nsub-,s.nii,21\n"))
