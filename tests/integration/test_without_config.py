"""`brainsynth generate --count N --output FOLDER`: no config file, the bundle's own recommendation."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

import brainsynth
from brainsynth.bundle.files import bundle_folder, read_bundle
from brainsynth.bundle.recommended import RECOMMENDED_FILE, recommended, write_recommended
from brainsynth.config.gate import GateConfig
from brainsynth.config.schema import SHIPPED_BUNDLE, ExportConfig, RecommendedConfig, SamplerConfig
from brainsynth.errors import UserError
from brainsynth.records import to_dict
from brainsynth.stages import export_bundle
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import open_store
from tests.commands import brainsynth as command
from tests.commands import tree
from tests.line import Line, as_config

SAMPLER = SamplerConfig(method="ab2", steps=3)


@pytest.fixture
def bundle(line: Line, tmp_path: Path) -> Path:
    """A bundle of one's own that recommends a sampler."""
    folder = Path(shutil.copytree(str(line.bundle()["output"]), tmp_path / "bundle"))
    write_recommended(folder, RecommendedConfig(sampler=SAMPLER, samples_per_shard=2))
    return folder


def test_what_the_bundle_recommends_is_what_is_made(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "--count", 3, "--output", tmp_path / "brains", "--bundle", bundle, "--workers", 0, "--seed", 5]
    assert command(monkeypatch, *words) == 0
    plan = read_plan(open_store(str(tmp_path / "brains")))
    assert plan.identity["sampler"] == to_dict(SAMPLER)
    assert plan.identity["base_seed"] == 5
    assert plan.samples_per_shard == 2
    assert brainsynth.verify_dataset(str(tmp_path / "brains")).ok
    before = tree(tmp_path / "brains" / "dataset.zarr")
    assert command(monkeypatch, *words) == 0  # the same again resumes, and there is nothing left to do
    assert tree(tmp_path / "brains" / "dataset.zarr") == before
    assert command(monkeypatch, *words, "--set", "sampler.steps=4") == 2
    assert "sampler.steps: the folder has 3, this run asks for 4" in capsys.readouterr().err


def test_people_of_a_table(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spec = read_bundle(bundle)
    assert spec.distribution is not None
    spec.distribution.draw(3, 1).assign(shoe=40).to_csv(tmp_path / "rows.csv", index=False)
    words = ["--table", tmp_path / "rows.csv", "--output", tmp_path / "brains", "--bundle", bundle, "--workers", 0]
    assert command(monkeypatch, "generate", *words) == 0
    assert len(brainsynth.open_dataset(str(tmp_path / "brains"))) == 3
    assert "rows.csv: ignored, as the model does not know them: shoe" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "x"], "generate: give --config FILE, or --output FOLDER with --count N or --table FILE"),
        (["--count", "2"], "generate: give --config FILE, or --output FOLDER with --count N or --table FILE"),
        (["--count", "2", "--table", "t.csv", "--output", "x"], "generate: give --count N or --table FILE, not both"),
        (["--count", "2", "--output", "x", "--set", "output=y"], "--output and --set output=… set the same thing"),
        (
            ["--count", "2", "--output", "x", "--set", "covariates.draw=5"],
            "--count and --set covariates.draw=… set the same",
        ),
        (["--count", "0", "--output", "x"], "argument --count: 0: must be at least 1"),
        (["--count", "2", "--output", "x", "--workers", "-1"], "argument --workers: -1: must be at least 0"),
        (["--count", "2", "--output", "x", "--workers", "3", "--gpus", "2"], "starts one worker a GPU"),
        (["--config", "c.yaml", "--count", "2"], "--count: only without --config"),
        (["--count", "2", "--output", "x", "--set", "sampler.step=2"], "sampler.step"),
        (["--count", "2", "--output", "x", "--bundle", "absent"], "bundle.json"),
    ],
)
def test_mistakes(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "generate", *words) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_recommends_nothing(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(str(line.bundle()["output"]), tmp_path / "bundle")
    (Path(folder) / RECOMMENDED_FILE).unlink(missing_ok=True)
    assert command(monkeypatch, "generate", "--count", 2, "--output", tmp_path / "x", "--bundle", folder) == 2
    assert "recommends no sampler" in capsys.readouterr().err


def test_the_export_writes_it_and_refuses_what_does_not_fit(line: Line, tmp_path: Path) -> None:
    config = line.bundle() | {"output": str(tmp_path / "bundle"), "recommended": {"sampler": to_dict(SAMPLER)}}
    export_bundle.run(as_config(config, ExportConfig, tmp_path))
    assert recommended(tmp_path / "bundle", read_bundle(tmp_path / "bundle")).sampler == SAMPLER
    for wrong, message in (
        ({"sampler": {"method": "ddim", "steps": 5}}, "does not fit a network that predicts"),
        ({"sampler": to_dict(SAMPLER), "gate": {}}, "recommended.gate: the bundle has no quality gate"),
    ):
        with pytest.raises(UserError, match=message):
            export_bundle.run(as_config(config | {"recommended": wrong, "output": "b2"}, ExportConfig, tmp_path))
    assert not (tmp_path / "b2").exists()


def test_the_bundled_model_recommends_what_its_card_says() -> None:
    folder = bundle_folder(SHIPPED_BUNDLE)
    advice = recommended(folder, read_bundle(folder))
    assert advice.sampler == SamplerConfig(method="ab2", steps=8, time_shift=6.0)
    assert advice.gate == GateConfig(
        max_attempts=5, tolerance={"ventricular_volume": 12.0}, exempt=("checkerboard", "sharpness")
    )
    assert advice.decoder == "rendered"
    card = (folder / "README.md").read_text()
    assert "`ab2`, 8 steps, `time_shift` 6" in card


def test_one_volume_for_a_notebook(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = read_bundle(bundle)
    asked = {"age": 50.0, "sex": "F"}
    one = brainsynth.sample(seed=3, bundle=str(bundle), **asked)
    assert one.image.shape == spec.volume.shape_xyz
    assert one.image.dtype == np.float32
    assert 0 <= one.image.min() < one.image.max() <= 1
    np.testing.assert_array_equal(one.affine, spec.volume.affine)
    assert one.covariates["age"] == 50.0
    assert one.covariates["sex"] == "F"
    low, high = (spec.distribution.quantile("ventricular_volume", share) for share in (0.0, 1.0))
    assert low <= one.covariates["ventricular_volume"] <= high
    assert "age 50 years, sex F" in one._repr_html_()
    assert "<img" in one._repr_html_()
    again = brainsynth.sample(seed=3, bundle=str(bundle), **asked)
    np.testing.assert_array_equal(one.image, again.image)
    assert (brainsynth.sample(seed=4, bundle=str(bundle), **asked).image != one.image).any()
    one.save(str(tmp_path / "one.nii.gz"))
    np.testing.assert_array_equal(nib.load(tmp_path / "one.nii.gz").get_fdata(dtype=np.float32), one.image)
    for wrong, message in (
        ({"agee": 5}, "agee: not a covariate of .*, which has age"),
        ({"sex": "X"}, "sex = 'X' is not one of"),
        ({"age": 300}, "outside the training support"),
    ):
        with pytest.raises(UserError, match=message):
            brainsynth.sample(bundle=str(bundle), **wrong)
    for seed in (-1, "x", 1.5):
        with pytest.raises(UserError, match="seed must be a whole number of 0 or more"):
            brainsynth.sample(bundle=str(bundle), seed=seed)
    with pytest.raises(UserError, match=r"give a name that ends in \.nii"):
        one.save("one.png")
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "one.nii.gz"}


def test_a_sample_is_the_first_volume_of_a_dataset_of_that_seed(bundle: Path, tmp_path: Path) -> None:
    rows = pd.DataFrame({"age": [50.0], "sex": ["F"], "ventricular_volume": [np.nan], "brain_volume": [np.nan]})
    output = str(tmp_path / "brains")
    brainsynth.generate_dataset(rows=rows, output=output, bundle=str(bundle), seed=3, workers=0)
    one = brainsynth.sample(seed=3, bundle=str(bundle), age=50, sex="F")
    np.testing.assert_array_equal(brainsynth.open_dataset(output)[0]["image"], one.image)
    brainsynth.generate_dataset(count=2, output=str(tmp_path / "drawn"), bundle=str(bundle), workers=0)
    dataset = brainsynth.open_dataset(str(tmp_path / "drawn"))
    assert len(dataset) == 2
    assert dataset._repr_html_().count("<img") == 2
    for arguments in ({"output": "x"}, {"count": 2}, {"count": 2, "rows": rows, "output": "x"}):
        with pytest.raises(UserError, match="give a config, or output with either count or rows"):
            brainsynth.generate_dataset(bundle=str(bundle), **arguments)
