"""One person's scan through a tiny model: the series, what it is measured by, how it is marked, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainsynth import open_dataset
from brainsynth.bundle.files import bundle_folder, read_bundle
from brainsynth.bundle.recommended import write_recommended
from brainsynth.cohort.scan import prepared_scan
from brainsynth.config.release import Creator, ReleaseConfig
from brainsynth.config.schema import SHIPPED_BUNDLE, PreparationConfig, RecommendedConfig, SamplerConfig
from brainsynth.errors import UserError
from brainsynth.evaluation.counterfactual import composition, reversibility
from brainsynth.models.counterfactual import ScanGenerator, inversion_times
from brainsynth.models.sampler_rules import check_inversion
from brainsynth.plan import generation_identity
from brainsynth.stages.release import check_release
from brainsynth.storage.commit import read_plan, read_samples
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.verify import verify_dataset
from tests.commands import brainsynth
from tests.line import GRID, Line

AB2 = SamplerConfig(method="ab2", steps=3)
ROBUST = PreparationConfig(intensity_rule="robust", intensity_percentiles=(0.0, 99.8))


@dataclasses.dataclass
class Person:
    folder: Path
    bundle: Path
    scan: Path
    covariates: str
    arguments: list[str]


@pytest.fixture(scope="module")
def person(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Person:
    """A phantom of the line's cohort, and a copy of its bundle that says how that cohort was prepared."""
    folder = tmp_path_factory.mktemp("scan-in")
    bundle = folder / "bundle"
    shutil.copytree(line.root / "bundle", bundle)
    write_recommended(bundle, RecommendedConfig(sampler=AB2, preparation=ROBUST))
    row = open_dataset(str(line.root / "cohort")).table.iloc[0]
    store = open_store(str(line.root / "cohort"))
    scan = Path(read_samples(store, read_plan(store))["image"].iloc[int(row["row"])])
    covariates = ",".join(f"{name}={row[name]}" for name in read_bundle(bundle).covariates.names)
    arguments = ["vary", "--bundle", str(bundle), "--scan", str(scan), "--covariates", covariates]
    arguments += ["--output", str(folder / "case"), "--sweep", "ventricular_volume=x1:x1.5:2"]
    arguments += ["--set", "runtime.workers=0", "--allow-extrapolation"]
    return Person(folder, bundle, scan, covariates, arguments)


@pytest.fixture(scope="module")
def varied(person: Person) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        assert brainsynth(patch, *person.arguments) == 0
    return person.folder / "case"


@pytest.fixture(scope="module")
def generator(person: Person, varied: Path) -> ScanGenerator:
    identity = generation_identity(read_plan(open_store(str(varied / "dataset"))))
    scan = prepared_scan(str(person.scan), "", GRID, ROBUST)[0]
    made = ScanGenerator(person.bundle, read_bundle(person.bundle), identity, True, scan)
    made.load("cpu")
    return made


def test_the_person_with_the_own_covariates_is_the_scan(line: Line, varied: Path) -> None:
    dataset = open_dataset(str(varied / "dataset"))
    scan = open_dataset(str(line.root / "cohort")).volume(0)
    assert verify_dataset(open_store(dataset.uri)).ok
    assert np.abs(dataset.volume(0) - scan).max() < 1e-3  # the first point of the sweep is the person as it is
    assert np.abs(dataset.volume(1) - scan).max() > 1e-3
    measures = json.loads((varied / "measures.json").read_bytes())
    assert set(measures["reversibility"]) == {"point00", "point01"}
    assert 0 < measures["composition_without_residual"] < 1
    series = pd.read_csv(varied / "series.tsv", sep="\t")
    assert series["difference_from_scan"][0] < min(1e-3, series["difference_from_scan"][1])


def test_there_and_back_is_the_scan_again(generator: ScanGenerator) -> None:
    changed = generator.own.assign(ventricular_volume=generator.own["ventricular_volume"] * 2)
    volume = generator.predict(generator.person, changed)[0]
    there = float(np.abs(volume - generator.scan).mean())
    assert reversibility(generator, volume, changed) < 0.5 * there
    assert composition(generator) == pytest.approx(
        float(np.abs(generator.person.residual)[generator.scan > 0.05].mean())
    )


def test_the_flow_leads_back_to_where_it_came_from(generator: ScanGenerator) -> None:
    """More steps invert better, and a start at noise is met again."""
    z = generator.person.noise
    errors = []
    for steps in (6, 48):
        times = inversion_times(steps)
        data = generator._integrate(z, generator.own, times[::-1])
        errors.append(float((generator._integrate(data, generator.own, times) - z).norm() / z.norm()))
    assert errors[1] < 0.05
    assert errors[1] < errors[0]


def test_it_is_marked_everywhere(varied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = varied / "dataset"
    assert open_dataset(str(dataset)).manifest["derived_from_person"] is True
    for name in ("README.md", "report.html"):
        assert "DERIVED FROM A REAL PERSON" in (dataset / name).read_text()
        assert "no real person" not in (dataset / name).read_text()
    assert brainsynth(monkeypatch, "export", "--to", "bids", "--output", str(tmp_path / "bids"), str(dataset)) == 0
    text = "".join(p.read_text() for p in tmp_path.rglob("*") if p.suffix in (".json", ".md"))
    assert "no real person" not in text
    image: Any = nib.load(next((tmp_path / "bids").rglob("*_T1w.nii.gz")))
    assert b"REAL PERSON" in bytes(image.header["descrip"])


def test_it_is_not_published(
    person: Person, varied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = dict.fromkeys(("title", "description", "licence", "source_terms", "contact"), "x")
    config = ReleaseConfig(
        dataset=str(varied / "dataset"), bundle=str(person.bundle), audit=str(tmp_path), output=str(tmp_path / "out"),
        creators=(Creator(name="us"),), published="2026-01-01", url="https://example.org", **text,
    )  # fmt: skip
    with pytest.raises(UserError, match="derived from a real person"):
        check_release(config)
    uri, bundle = str(varied / "dataset"), str(person.bundle)
    recipe = ("recipe", "--bundle", bundle, "--output", str(tmp_path / "x.recipe"), uri)
    assert brainsynth(monkeypatch, *recipe) == 2
    assert "derived from a real person" in capsys.readouterr().err
    assert brainsynth(monkeypatch, "regenerate", "--bundle", bundle, "--random", "1", uri) == 2
    assert "derived from a real person" in capsys.readouterr().err


def changed(person: Person, **options: str) -> list[str]:
    """The command with other values, in a folder that is not there yet."""
    arguments = [*person.arguments]
    for name, value in {"output": str(person.folder / "none"), **options}.items():
        arguments[arguments.index(f"--{name}") + 1] = value
    return arguments


def image(tmp_path: Path, scan: Path, values: np.ndarray | None = None, affine: np.ndarray | None = None) -> str:
    read: Any = nib.load(scan)
    data = np.asarray(read.dataobj, np.float32) if values is None else values
    nib.save(nib.Nifti1Image(data, read.affine if affine is None else affine), tmp_path / "bad.nii.gz")
    return str(tmp_path / "bad.nii.gz")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"covariates": "age=60,sex=F"}, r"add ventricular_volume \(ml\), brain_volume \(ml\)"),
        ({"covariates": "age=60,sex=X,ventricular_volume=20,brain_volume=1200"}, "X is not one of F, M"),
        ({"covariates": "age=old,sex=F,ventricular_volume=20,brain_volume=1200"}, "'old' is not a number"),
        ({"covariates": "age=60,sex=F,ventricular_volume=20,brain_volume=1200,iq=9"}, "a covariate of this model"),
        ({"scan": "nowhere.nii.gz"}, "missing file"),
        ({"sweep": "weight=1:2"}, "a covariate of this model"),
        ({"bundle": "module:Class"}, "no module module"),
    ],
)
def test_wrong_words_are_one_error(
    person: Person, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: dict[str, str],
    message: str,
) -> None:  # fmt: skip
    assert brainsynth(monkeypatch, *changed(person, **options)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (person.folder / "none").exists()


def test_a_value_out_of_range_is_refused(
    person: Person, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = changed(person, covariates="age=300,sex=F,ventricular_volume=20,brain_volume=1200")
    arguments.remove("--allow-extrapolation")
    assert brainsynth(monkeypatch, *arguments) == 2
    assert "age" in capsys.readouterr().err
    assert not (person.folder / "none").exists()


def test_a_scan_that_a_cohort_rejects_is_refused(
    person: Person, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = np.asarray(nib.load(person.scan).dataobj, np.float32)  # type: ignore[attr-defined]
    far = np.diag([7.0, 7.0, 7.0, 1.0])
    far[:3, 3] = 4000
    for bad in (data.max() - data, np.ones_like(data)):
        assert brainsynth(monkeypatch, *changed(person, scan=image(tmp_path, person.scan, bad))) == 2
        assert "--scan" in capsys.readouterr().err
    assert brainsynth(monkeypatch, *changed(person, scan=image(tmp_path, person.scan, None, far))) == 2
    assert "nothing of the image lies on the configured grid" in capsys.readouterr().err
    assert not (person.folder / "none").exists()


def test_a_bundle_that_does_not_say_how_its_cohort_was_prepared(
    person: Person, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(person.bundle, tmp_path / "bundle")
    write_recommended(tmp_path / "bundle", RecommendedConfig(sampler=AB2))
    assert brainsynth(monkeypatch, *changed(person, bundle=str(tmp_path / "bundle"))) == 2
    assert "recommended.preparation" in capsys.readouterr().err


def test_what_cannot_be_run_backwards() -> None:
    spec = read_bundle(bundle_folder(SHIPPED_BUNDLE))
    sampler = SamplerConfig(method="ab2", steps=8)
    check_inversion(spec, sampler, "own")
    v = dataclasses.replace(spec.schedule, prediction="v", logit_mean=0.0, logit_std=1.0)
    with pytest.raises(UserError, match="predicts no flow"):
        check_inversion(dataclasses.replace(spec, schedule=v), sampler, "own")
    with pytest.raises(UserError, match="guidance_scale must be 1.*decoder must be"):
        check_inversion(spec, dataclasses.replace(sampler, guidance_scale=1.5), "distilled")
