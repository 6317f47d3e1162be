"""Exports hold the committed voxels at their place in the world, pass the formats' own validators, and survive a kill."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any, get_args

import nibabel
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import zarr

from brainsynth import cli
from brainsynth.config.schema import ExportFormat
from brainsynth.errors import UserError
from brainsynth.export.formats import FORMATS
from brainsynth.export.plan import EXPORT_KEY, plan_export
from brainsynth.export.run import FILES_FOLDER
from brainsynth.manifest import MODEL_KEY, ModelRecord
from brainsynth.plan import table_digest
from brainsynth.records import seal
from brainsynth.stages.export import run_export
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.verify import verify_dataset
from tests.commands import tree
from tests.reading.conftest import OK_ROWS, ids, plan_of, write

F32 = npt.NDArray[np.float32]
OLDER_WOMEN = "age > 60 and sex == 'F'"
CHOSEN = [row for row in OK_ROWS if 30 + row * 1.5 > 60 and row % 2 == 0]


def export(uri: Path | str, output: Path, to: Any, partial: bool = False, workers: int = 0, **chosen: Any) -> Any:
    return run_export(plan_export(str(uri), str(output), to, partial=partial, **chosen), partial, workers)


@pytest.fixture
def damaged(finished: Path, tmp_path: Path) -> Path:
    """The dataset with a flipped byte in a volume of its second shard, and the row of that volume."""
    root = tmp_path / "damaged"
    shutil.copytree(finished, root)
    file = root / "dataset.zarr/t1w/c/1/0/0/0"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(bytes(data))
    assert len(verify_dataset(open_store(str(root))).problems) == 1
    return root


def damaged_ids(root: Path) -> set[str]:
    from brainsynth import open_dataset

    opened, lost = open_dataset(str(root)), set()
    for index, sample_id in enumerate(opened.sample_ids):
        try:
            opened.volume(index)
        except ValueError:
            lost.add(sample_id)
    return lost


def test_nifti_is_the_volume_at_its_place(finished: Path, tmp_path: Path, intensities: F32) -> None:
    done = export(finished, tmp_path, "nifti", where=OLDER_WOMEN)
    assert done.finished
    files = sorted(tmp_path.glob("*.nii.gz"))
    assert [file.name for file in files] == [f"sub-{name}_T1w.nii.gz" for name in ids(CHOSEN)]
    plan, _ = plan_of()
    for file, row in zip(files, CHOSEN, strict=True):
        image: Any = nibabel.load(file)
        np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), intensities[OK_ROWS.index(row)])
        for affine in (image.affine, image.get_sform(), image.get_qform()):
            np.testing.assert_allclose(affine, plan.volume.affine)
        assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
        assert (image.header["sform_code"], image.header["qform_code"]) == (2, 2)
        assert image.header.get_xyzt_units()[0] == "mm"
        assert b"AI-generated" in image.header["descrip"].item()
    table = pd.read_csv(tmp_path / "participants.tsv", sep="\t")
    assert list(table["participant_id"]) == [f"sub-{name}" for name in ids(CHOSEN)]
    assert list(table["age"]) == [30 + row * 1.5 for row in CHOSEN]


@pytest.mark.parametrize("outside", [[2, 5], []])
def test_rows_outside_the_training_support_are_marked(outside: list[int], tmp_path: Path) -> None:
    plan, samples = plan_of(rows=8)
    samples["extrapolated"] = samples.index.isin(outside)
    write(str(tmp_path / "made"), dataclasses.replace(plan, samples_digest=table_digest(samples)), samples)
    export(tmp_path / "made", tmp_path / "out", "webdataset")
    table = pd.read_csv(tmp_path / "out" / "participants.tsv", sep="\t", dtype=str).set_index("participant_id")
    assert list(table.index[table["extrapolated"] == "true"]) == [f"sub-{name}" for name in ids(outside)]
    columns = json.loads((tmp_path / "out" / "participants.json").read_text())
    assert set(columns["extrapolated"]["Levels"]) == {"true", "false"} >= set(table["extrapolated"])
    (tar,) = (tmp_path / "out").glob("*.tar")
    with tarfile.open(tar) as members:
        facts = [json.load(members.extractfile(name) or io.BytesIO()) for name in members.getnames() if "json" in name]
    assert [fact["sample_id"] for fact in facts if fact["extrapolated"]] == ids(outside)


def test_bids_passes_the_real_validator_and_says_what_it_is(finished: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "bids"
    shutil.copytree(finished, source)
    model = ModelRecord(bundle="b" * 64, name="tiny", licence="CC-BY-SA-4.0", training_data="phantoms")
    open_store(str(source)).write(MODEL_KEY, seal(model))
    assert verify_dataset(open_store(str(source))).ok
    export(source, output, "bids")
    description = json.loads((output / "dataset_description.json").read_text())
    assert description["License"] == "CC-BY-SA-4.0"
    made = description["GeneratedBy"][0]
    assert made["Name"] == "brainsynth"
    assert made["Description"].startswith("AI-generated images of no real person")
    columns = json.loads((output / "participants.json").read_text())
    assert columns["age"] == {"Description": "Age at the scan", "Units": "years", "Range": [18.0, 95.0]}
    assert set(pd.read_csv(output / "participants.tsv", sep="\t")) == {"participant_id", *columns}
    assert len(list(output.glob("sub-*/anat/sub-*_T1w.nii.gz"))) == len(OK_ROWS)
    validator = Path(sys.executable).parent / "bids-validator-deno"
    if not validator.exists():
        pytest.skip("the BIDS validator is not installed: `pip install bids-validator-deno`")
    command = [str(validator), str(output), "--format", "json"]
    judged = subprocess.run(command, capture_output=True, text=True, timeout=300)
    issues = json.loads(judged.stdout)["issues"]["issues"]
    assert judged.returncode == 0
    assert [issue for issue in issues if issue["severity"] == "error"] == []
    (output / "participants.tsv").write_text("participant_id\nsub-nobody\n")  # the validator does look
    assert subprocess.run(command, capture_output=True, timeout=300).returncode != 0


def test_a_model_record_of_another_bundle_is_refused(finished: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(finished, source)
    model = ModelRecord(bundle="c" * 64, name="other", licence="CC0", training_data="")
    open_store(str(source)).write(MODEL_KEY, seal(model))
    with pytest.raises(UserError, match="names another bundle"):
        plan_export(str(source), str(tmp_path / "out"), "bids")


def test_ome_zarr_is_valid_and_in_place(finished: Path, tmp_path: Path, intensities: F32) -> None:
    export(finished, tmp_path, "ome-zarr", where=OLDER_WOMEN)
    plan, _ = plan_of()
    folders = sorted(tmp_path.glob("*.ome.zarr"))
    assert len(folders) == len(CHOSEN)
    for folder, row in zip(folders, CHOSEN, strict=True):
        group = zarr.open_group(str(folder), mode="r")
        values: Any = group["0"]
        np.testing.assert_array_equal(np.asarray(values[:]).transpose(2, 1, 0), intensities[OK_ROWS.index(row)])
        about: Any = group.attrs["brainsynth"]
        assert about["affine"] == plan.volume.affine.tolist()
        assert (about["synthetic"], about["covariates"]["sex"]) == (True, "F")
    image = pytest.importorskip(
        "ome_zarr_models.v05.image", reason="OME-Zarr's validator is not installed: `pip install ome-zarr-models`"
    )
    for folder in folders:
        attributes = image.Image.from_zarr(zarr.open_group(str(folder), mode="r")).ome_attributes
        scale, translation = attributes.multiscales[0].datasets[0].coordinateTransformations
        assert tuple(scale.scale) == plan.volume.spacing_mm[::-1]
        assert tuple(translation.translation) == plan.volume.origin_mm[::-1]


def test_webdataset_reads_its_shards(finished: Path, tmp_path: Path, intensities: F32) -> None:
    wds = pytest.importorskip("webdataset", reason="webdataset is not installed: `pip install webdataset`")
    export(finished, tmp_path, "webdataset")
    tars = sorted(str(path) for path in tmp_path.glob("*.tar"))
    assert len(tars) == 2
    samples = list(wds.WebDataset(tars, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == ids(OK_ROWS)
    for sample, expected, row in zip(samples, intensities, OK_ROWS, strict=True):
        np.testing.assert_array_equal(sample["t1w.npy"].astype(np.float32), expected)
        assert sample["json"]["covariates"]["age"] == 30 + row * 1.5
        assert np.array(sample["json"]["affine"]).shape == (4, 4)


KILLED = """
import os, signal, sys
from brainsynth.stages.export import run_export
from brainsynth.export.plan import plan_export
replace, left = os.replace, int(sys.argv[4])
def counted(a, b):
    global left
    # zarr renames inside of its folder, too, and every file has a note
    left -= os.path.basename(a).startswith(".tmp-") and "brainsynth-export" not in str(b)
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(a, b)
os.replace = counted
run_export(plan_export(*sys.argv[1:4]))
"""


@pytest.mark.parametrize(
    ("to", "after"),
    [
        ("bids", 11),
        pytest.param("ome-zarr", 3, marks=pytest.mark.slow),
        pytest.param("nifti-zarr", 3, marks=pytest.mark.slow),
        ("dicom", 3),
        pytest.param("webdataset", 1, marks=pytest.mark.slow),
    ],
)
def test_a_killed_export_goes_on_and_is_equal(to: str, after: int, finished: Path, tmp_path: Path) -> None:
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "output"
    export(finished, undisturbed, to)
    command = [sys.executable, "-c", KILLED, str(finished), str(output), to, str(after)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    there = tree(output)
    half = [name for name in there if ".tmp-" in name]
    assert half
    assert "dataset_description.json" not in there
    own = (EXPORT_KEY, FILES_FOLDER)  # what is noted of the files grows with them
    whole = {name: data for name, data in there.items() if name not in half and not name.startswith(own)}
    assert whole.items() <= tree(undisturbed).items()
    assert len({name.split("/")[0] for name in whole}) == after
    export(finished, output, to)
    assert tree(output) == tree(undisturbed)
    export(finished, output, to)  # once more does no harm
    assert tree(output) == tree(undisturbed)


@pytest.mark.parametrize("to", get_args(ExportFormat))
def test_what_was_cut_changed_or_lost_since_is_written_again(to: str, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    export(finished, output, to, where="age < 40")
    whole = tree(output)
    volumes = [name for name in whole if name.endswith((".nii.gz", ".tar", "/c/0/0/0", ".dcm"))]
    assert volumes
    first = output / volumes[0]
    untouched = {name: (output / name).stat().st_mtime_ns for name in volumes[1:]}
    flipped = bytearray(whole[volumes[0]])
    flipped[len(flipped) // 2] ^= 1
    for data in (whole[volumes[0]][:-40], b"", bytes(flipped), whole[volumes[0]] + b"x", None):
        first.unlink() if data is None else first.write_bytes(data)
        export(finished, output, to, where="age < 40")
        assert tree(output) == whole
    for table in ("participants.tsv", "README.md"):
        (output / table).write_bytes(whole[table][:9])
    note = next(output.glob(f"{FILES_FOLDER}/*.json"))
    note.write_bytes(note.read_bytes()[:-20])
    export(finished, output, to, where="age < 40")
    assert tree(output) == whole
    shutil.rmtree(output / FILES_FOLDER)  # as of an export of a version that noted nothing
    export(finished, output, to, where="age < 40")
    assert tree(output) == whole
    assert set(untouched) == set(volumes[1:])


def test_a_file_that_is_whole_is_not_written_again(finished: Path, tmp_path: Path) -> None:
    export(finished, tmp_path, "nifti", where="age < 40")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.nii.gz")}
    cut = min(before)
    cut.write_bytes(cut.read_bytes()[:100])
    export(finished, tmp_path, "nifti", where="age < 40")
    assert {path for path, then in before.items() if path.stat().st_mtime_ns != then} == {cut}


def test_a_folder_of_the_dataset_is_no_output(finished: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(finished, tmp_path / "sub" / "generated"))
    (tmp_path / "link").symlink_to(own)
    before = tree(tmp_path)
    outputs = {
        own: "is the folder of the dataset",
        own / "exported": "lies in the folder of the dataset",
        own / "dataset.zarr" / "a" / "b": "lies in",
        tmp_path / "sub": "holds the folder of the dataset",
        tmp_path / "link" / "x": "lies in",
        own / ".." / "generated" / "x": "lies in",
    }
    for output, why in outputs.items():
        with pytest.raises(UserError, match=f"output: .* {why}"):
            plan_export(str(own), str(output), "nifti")
    with pytest.raises(UserError, match="output: .* lies in"):
        plan_export(own.as_uri(), str(own / "x"), "nifti")
    assert tree(tmp_path) == before
    export(own, tmp_path / "sub" / "generated-nifti", "nifti", where="age < 32")  # next to it is fine


def test_a_desktop_s_file_does_not_fill_a_folder(finished: Path, tmp_path: Path) -> None:
    (tmp_path / ".DS_Store").write_bytes(b"x")
    export(finished, tmp_path, "nifti", where="age < 32")
    assert len(list(tmp_path.glob("*.nii.gz"))) == 2


def test_on_ray_it_is_the_same(finished: Path, tmp_path: Path, ray_cluster: None) -> None:
    export(finished, tmp_path / "here", "nifti", split="train")
    export(finished, tmp_path / "ray", "nifti", split="train", workers=2)
    assert tree(tmp_path / "here") == tree(tmp_path / "ray")


def test_from_object_storage(s3_root: str, finished: Path, tmp_path: Path) -> None:
    write(s3_root, *plan_of())
    export(s3_root, tmp_path / "s3", "nifti", where=OLDER_WOMEN)
    export(finished, tmp_path / "local", "nifti", where=OLDER_WOMEN)
    assert tree(tmp_path / "s3") == tree(tmp_path / "local")


def test_every_format_of_the_records_has_its_entry() -> None:
    assert list(FORMATS) == list(get_args(ExportFormat))


@pytest.mark.parametrize("to", FORMATS)
def test_damage_is_refused_or_left_out(to: str, damaged: Path, finished: Path, tmp_path: Path) -> None:
    lost = damaged_ids(damaged)
    assert len(lost) == 1
    with pytest.raises(UserError, match=r"lost or damaged.*verify .* --repair.*--partial"):
        export(damaged, tmp_path / "out", to)
    assert not (tmp_path / "out" / "dataset_description.json").exists()
    done = export(damaged, tmp_path / "out", to, partial=True)
    assert set(done.left_out) == lost
    kept = pd.read_csv(tmp_path / "out" / "participants.tsv", sep="\t")["participant_id"]
    assert set(kept) == {f"sub-{name}" for name in ids(OK_ROWS)} - {f"sub-{name}" for name in lost}
    # Mended, the same command adds what was missing.
    shutil.copyfile(finished / "dataset.zarr/t1w/c/1/0/0/0", damaged / "dataset.zarr/t1w/c/1/0/0/0")
    export(damaged, tmp_path / "out", to)
    export(finished, tmp_path / "undisturbed", to)
    assert tree(tmp_path / "out") == tree(tmp_path / "undisturbed")


def test_voxels_that_were_not_committed_are_refused(finished: Path, tmp_path: Path) -> None:
    root = tmp_path / "swapped"
    shutil.copytree(finished, root)
    shutil.copyfile(root / "dataset.zarr/t1w/c/2/0/0/0", root / "dataset.zarr/t1w/c/1/0/0/0")
    with pytest.raises(UserError, match=r"the voxels of syn000008 \(row 8\) are not those that were committed"):
        export(root, tmp_path / "out", "nifti")


def test_an_unfinished_dataset_is_refused_or_exported_in_part(finished: Path, tmp_path: Path) -> None:
    root = tmp_path / "unfinished"
    shutil.copytree(finished, root)
    for key in ("dataset.json", "commits/shard-000001.json"):
        (root / key).unlink()
    with pytest.raises(UserError, match="is not finished: run its job again.*--partial"):
        plan_export(str(root), str(tmp_path / "out"), "nifti")
    done = export(root, tmp_path / "out", "nifti", partial=True)
    assert (done.subjects, done.left_out) == (len(OK_ROWS) - 8, ())


def test_a_folder_holds_one_export(finished: Path, tmp_path: Path) -> None:
    export(finished, tmp_path / "out", "nifti", where=OLDER_WOMEN)
    before = tree(tmp_path / "out")
    for chosen, named in (({"where": "age > 61"}, "where: there"), ({}, "subjects: there")):
        with pytest.raises(UserError, match=f"(?s)holds another export.*{named}"):
            plan_export(str(finished), str(tmp_path / "out"), "nifti", **chosen)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"is not empty \(it holds thesis.tex\)"):
        plan_export(str(finished), str(tmp_path / "other"), "nifti")
    with pytest.raises(UserError, match="no volume of .* is chosen by 'age > 1000'"):
        plan_export(str(finished), str(tmp_path / "new"), "nifti", where="age > 1000")
    with pytest.raises(UserError, match="must be a folder that every worker reaches"):
        plan_export(str(finished), "s3://bucket/out", "nifti")
    assert tree(tmp_path / "out") == before
    assert not (tmp_path / "new").exists()


def test_the_command(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["brainsynth", "export", str(finished), *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return int(left.value.code or 0), *capsys.readouterr()

    code, told, _ = run("--to", "nifti", "--output", str(tmp_path / "out"), "--where", OLDER_WOMEN)
    assert code == 0
    assert f"{len(CHOSEN)} volumes as nifti" in told
    code, _, error = run(
        "--to", "nifti", "--output", str(tmp_path / "new"), "--where", "__import__('os').system('touch x')"
    )
    assert code == 2
    assert error.startswith("error: the condition")
    assert not (tmp_path / "new").exists()
    code, _, error = run("--to", "minc", "--output", str(tmp_path / "new"))
    assert code == 2
    assert "invalid choice: 'minc'" in error
