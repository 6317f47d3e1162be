"""A renderer: trained on a cohort's label maps, put into a bundle, and at work on label maps that a user brings."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from brainsynth import cli, open_dataset
from brainsynth.bundle.files import read_bundle
from brainsynth.bundle.labeller import LABELLER
from brainsynth.bundle.renderer import RENDERER
from brainsynth.bundle.spec import AUTOENCODER_FILE, DIFFUSION_FILE
from brainsynth.cohort.phantom_cohort import DERIVATIVE, write_phantom_cohort
from brainsynth.config.labelling import LabellerTrainConfig, RendererTrainConfig
from brainsynth.config.schema import ExportConfig, GenerateConfig, PrepareConfig
from brainsynth.errors import UserError
from brainsynth.gate.fit import reconstructions
from brainsynth.labels import Label, LabelTable
from brainsynth.models import selfcheck
from brainsynth.models.device import choose_device
from brainsynth.models.loading import load_labeller, load_renderer
from brainsynth.stages import export_bundle, generate, prepare_cohort, train_labeller, train_renderer
from brainsynth.stages.export_bundle import write_distilled
from brainsynth.stages.regenerate import regenerate
from brainsynth.storage.commit import read_plan, read_samples
from brainsynth.storage.filesystem import open_store
from brainsynth.training.labelled import LabelledScans
from brainsynth.training.labeller import TRAINING as LABELLER_TRAINING
from brainsynth.training.preemption import Left, Request
from brainsynth.training.renderer import TRAINING, LabelledCrops, check
from brainsynth.training.runner import fit
from brainsynth.training.runs import RendererRun, read_run
from tests.integration.test_training import curve
from tests.line import GRID, Line, as_config

LOCAL = {"workers": 0, "threads_per_worker": 1, "trackers": []}
KNOWN = "age=60,sex=F,ventricular_volume=30,brain_volume=1200"


class Made(NamedTuple):
    """A trained renderer and the bundle that has it, with a labeller, and a label map as a user has it."""

    root: Path
    bundle: Path
    labels: Path
    cohort: str


def training(root: Path, output: str, **optimisation: Any) -> dict[str, Any]:
    options = {"steps": 80, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 20, "ema_decay": 0.9}
    options |= {"log_every": 1, "validate_every": 40, "checkpoint_every": 40}
    return {
        "cohort": str(root / "labelled"),
        "output": str(root / output),
        "architecture": {"width": 24, "blocks": 1, "noise": 2, "intensity_scale": 1.2, "coarse": 4, "kept": 0.25},
        "losses": {"adversarial_start": 70, "discriminator_channels": 4},
        "crops": {"cells": 6, "critics_alone": 2, "balance": "sex"},
        "optimisation": options | optimisation,
        "runtime": LOCAL,
    }


@pytest.fixture(scope="module")
def made(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("renderer")
    write_phantom_cohort(root / "phantoms", 32, 9, GRID, labels=True)
    source = {"path": str(root / "phantoms"), "label_folder": DERIVATIVE, "label_source": "construction"}
    cohort = line.prepare() | {"source": source, "output": str(root / "labelled"), "validation_fraction": 0.3}
    prepare_cohort.run(as_config(cohort, PrepareConfig, root))
    train_renderer.run(as_config(training(root, "run"), RendererTrainConfig, root))
    labeller = training(root, "labeller", steps=2) | {"architecture": {"channels": [8], "blocks": [1]}}
    labeller = {key: value for key, value in labeller.items() if key not in ("losses", "crops")}
    train_labeller.run(as_config(labeller, LabellerTrainConfig, root))
    bundle = line.bundle() | {"output": str(root / "bundle")}
    bundle |= {"labeller": str(root / "labeller"), "renderer": str(root / "run")}
    export_bundle.run(as_config(bundle, ExportConfig, root))
    dataset = open_dataset(cohort["output"], split="validation")
    nibabel.save(nibabel.Nifti1Image(dataset.label_map(0), GRID.affine), root / "map.nii.gz")
    return Made(root, root / "bundle", root / "map.nii.gz", cohort["output"])


@pytest.mark.parametrize("start", ["labeller", "bundle", "bundle/labeller.safetensors", "run"])
def test_a_training_begins_with_the_weights_of_another(made: Made, tmp_path: Path, start: str) -> None:
    """One step of next to nothing leaves them as they were; in a bundle they are in float16."""
    renderer = start == "run"
    before = load_file(made.root / ("run/renderer.safetensors" if renderer else "labeller/labeller.safetensors"))
    config = training(made.root, "", steps=1, learning_rate=1e-9) | {"output": str(tmp_path / "further")}
    config |= {"start_from": str(made.root / start)}
    if renderer:
        fit(TRAINING, as_config(config, RendererTrainConfig, tmp_path))
    else:
        config = {key: value for key, value in config.items() if key not in ("losses", "crops")}
        config |= {"architecture": {"channels": [8], "blocks": [1]}}
        fit(LABELLER_TRAINING, as_config(config, LabellerTrainConfig, tmp_path))
    after = load_file(tmp_path / "further" / ("renderer.safetensors" if renderer else "labeller.safetensors"))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-3, atol=1e-4 if start.startswith("bundle") else 1e-6)


def test_another_start_is_another_training_and_one_of_another_shape_is_refused(made: Made, tmp_path: Path) -> None:
    config = training(made.root, "run") | {"start_from": str(made.root / "run"), "output": str(tmp_path / "further")}
    refused = [
        (config | {"output": str(made.root / "run")}, "name it in start_from"),
        (config | {"architecture": {"width": 16, "blocks": 1, "noise": 2, "coarse": 4}}, "renderer.safetensors"),
        (config | {"start_from": str(tmp_path / "nowhere")}, "start_from: "),
        (config | {"start_from": str(made.root / "labeller" / "labeller.safetensors")}, "labeller.safetensors"),
    ]
    for wrong, words in refused:
        with pytest.raises(UserError, match=words):
            fit(TRAINING, as_config(wrong, RendererTrainConfig, tmp_path))
        assert not list((tmp_path / "further").glob("*.safetensors"))


def render(made: Made, output: Path, *words: str, labels: Path | None = None) -> int:
    command = ["render", "--bundle", str(made.bundle), "--labels", str(labels or made.labels), "--output", str(output)]
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, *words])
    return int(ended.value.code or 0)


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj, np.float32)


def mapped(made: Made, path: Path, change: Any, shift_mm: float = 0.0) -> Path:
    affine = GRID.affine.copy()
    affine[0, 3] += shift_mm
    nibabel.save(nibabel.Nifti1Image(change(voxels(made.labels)).astype(np.float32), affine), path)
    return path


def test_tissues_get_their_intensities_wherever_the_map_has_them(made: Made, tmp_path: Path) -> None:
    """CSF is darker than grey matter and that darker than white, also where no brain has it: in a corner of white matter."""
    white = np.argwhere(voxels(made.labels) == 3)
    corner = tuple(white[len(white) // 2 :][:60].T)

    def with_csf(labels: np.ndarray) -> np.ndarray:
        labels[corner] = 1
        return labels

    changed = mapped(made, tmp_path / "changed.nii.gz", with_csf)
    assert render(made, tmp_path / "image.nii.gz", "--covariates", KNOWN) == 0
    assert render(made, tmp_path / "other.nii.gz", "--covariates", KNOWN, labels=changed) == 0
    image, other = voxels(tmp_path / "image.nii.gz"), voxels(tmp_path / "other.nii.gz")
    means = [image[voxels(made.labels) == k].mean() for k in (1, 2, 3)]
    assert means[0] + 0.02 < means[1] < means[2] - 0.05
    assert other[corner].mean() < image[corner].mean() - 0.05
    header = nibabel.load(tmp_path / "image.nii.gz")
    np.testing.assert_allclose(header.affine, GRID.affine)
    assert b"AI-generated, from a label map" in header.header["descrip"].tobytes()
    l1 = [row["validation/l1"] for row in curve(made.root / "run") if "validation/l1" in row]
    assert read_run(made.root / "run", RendererRun, "").metrics["l1"] == pytest.approx(l1[-1])
    assert l1[-1] < l1[0]


def test_seed_and_covariates_count_and_the_same_words_give_the_same_image(made: Made, tmp_path: Path) -> None:
    variants = {
        "first": (),
        "again": ("--seed", "0"),
        "seed": ("--seed", "1"),
        "covariates": ("--covariates", KNOWN),
    }
    images = {}
    for name, words in variants.items():
        assert render(made, tmp_path / f"{name}.nii.gz", *words) == 0
        images[name] = voxels(tmp_path / f"{name}.nii.gz")
    np.testing.assert_array_equal(images["first"], images["again"])
    assert (images["first"] != images["seed"]).any()
    assert (images["first"] != images["covariates"]).any()


def test_orientation_and_numbers_of_the_file_do_not_matter(made: Made, tmp_path: Path) -> None:
    labels = nibabel.load(made.labels)
    turned = labels.as_reoriented([[2, -1], [0, -1], [1, 1]])
    assert nibabel.aff2axcodes(turned.affine) != nibabel.aff2axcodes(labels.affine)
    nibabel.save(turned, tmp_path / "turned.nii.gz")
    others = np.array([0, 24, 1003, 41, 43], np.int32)[voxels(made.labels).astype(int)]
    others[0, 0, 0] = 77
    nibabel.save(nibabel.Nifti1Image(others, GRID.affine), tmp_path / "others.nii.gz")
    table = tmp_path / "table.tsv"
    rows = [(0, "background", "77"), (4, "CSF", "24"), (1, "grey matter", "1000-1035")]
    rows += [(2, "White-Matter", "2, 41"), (3, "Ventricles", "4, 43")]
    table.write_text("index\tname\tvalues\n" + "".join(f"{i}\t{name}\t{values}\n" for i, name, values in rows))
    assert render(made, tmp_path / "plain.nii.gz") == 0
    assert render(made, tmp_path / "a.nii.gz", labels=tmp_path / "turned.nii.gz") == 0
    assert render(made, tmp_path / "b.nii.gz", "--label-table", str(table), labels=tmp_path / "others.nii.gz") == 0
    for name in ("a", "b"):
        np.testing.assert_array_equal(voxels(tmp_path / f"{name}.nii.gz"), voxels(tmp_path / "plain.nii.gz"))


def test_the_labeller_says_how_much_of_the_map_it_finds(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert render(made, tmp_path / "image.nii.gz") == 0
    said = capsys.readouterr().out
    assert "not an independent judge" in said
    assert all(f"  {name}: " in said for name in ("CSF", "Grey-Matter", "White-Matter", "Ventricles"))
    without = tmp_path / "without"
    shutil.copytree(made.bundle, without)
    (without / LABELLER.record).unlink()
    assert render(made, tmp_path / "second.nii.gz", "--bundle", str(without)) == 2  # given twice
    assert render(made._replace(bundle=without), tmp_path / "second.nii.gz") == 0
    assert "Dice" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "shift_mm", "says"),
    [
        (lambda x: np.where(x == 3, 99, x), 0, "the label table lacks 99; it has 0 background, 1 CSF, 2 Grey-Matter"),
        (lambda x: np.where(x == 3, 2.5, x), 0, "2.5 is not a whole number"),
        (lambda x: np.where(x == 3, -1, x), 0, "the label table lacks -1"),
        (lambda x: 0 * x, 0, "label map: all background"),
        (lambda x: x, 1000, "100% of what it labels lies outside of the renderer's grid"),
        (lambda x: x, 60, "% of what it labels lies outside of the renderer's grid"),
        (lambda x: x, 25, "Ventricles: its centre is "),
        (lambda x: x[:, ::-1], 0, "mm away from where it was in training"),
        (lambda x: np.where(x == 3, 0, x), 0, "1 of 4 structures are far from any label map"),
        (lambda x: np.where(x == 3, 0, x), 0, "White-Matter: 0 ml, in training"),
    ],
)
def test_a_map_that_is_not_a_brain_as_it_knows_them_is_refused(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, shift_mm: float, says: str
) -> None:
    path = mapped(made, tmp_path / "wrong.nii.gz", change, shift_mm)
    assert render(made, tmp_path / "image.nii.gz", labels=path) == 2
    said = capsys.readouterr().err
    assert says in said
    assert str(path) in said
    assert not (tmp_path / "image.nii.gz").exists()


def test_what_is_far_from_training_is_rendered_when_it_is_asked_for(made: Made, tmp_path: Path) -> None:
    path = mapped(made, tmp_path / "part.nii.gz", lambda x: np.where(x == 3, 0, x))
    assert render(made, tmp_path / "image.nii.gz", "--allow-extrapolation", labels=path) == 0
    assert render(made, tmp_path / "old.nii.gz", "--allow-extrapolation", "--covariates", "age=110") == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--covariates", "height=170"), "with a covariate of this model: age, sex"),
        (("--covariates", "age=old"), "'old' is not a number"),
        (("--covariates", "sex=X"), "X is not one of F, M"),
        (("--covariates", "age=60,age=61"), "age is given twice"),
        (("--covariates", "age=110"), "is outside the training support"),
        (("--label-table", "nowhere.tsv"), "--label-table: "),
        (("--seed", "-1"), "must be at least 0"),
    ],
)
def test_mistakes_in_words_are_refused(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    assert render(made, tmp_path / "image.nii.gz", *words) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_files_and_bundles_that_cannot_be_are_refused(
    line: Line, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there.nii.gz").write_text("mine")
    table = tmp_path / "table.tsv"
    table.write_text("index\tname\n1\tCSF\n2\tHippocampus\n")
    damaged = tmp_path / "damaged"
    shutil.copytree(made.bundle, damaged)
    with (damaged / RENDERER.file).open("ab") as file:
        file.write(b"\0")
    fine = tmp_path / "new.nii.gz"
    formless = nibabel.Nifti1Image(voxels(made.labels), None)
    formless.set_sform(None, 0)
    formless.set_qform(None, 0)
    nibabel.save(formless, tmp_path / "formless.nii.gz")
    for changed, output, words, says in (
        (made, tmp_path / "there.nii.gz", (), "is there already: give a new name"),
        (made, tmp_path / "new.nii", (), "give a name that ends in .nii.gz"),
        (made, tmp_path / "none" / "new.nii.gz", ("--label-table", str(table)), "Hippocampus: not a structure of"),
        (made._replace(labels=tmp_path / "nowhere.nii"), fine, (), "nowhere.nii: missing file"),
        (made._replace(labels=tmp_path / "formless.nii.gz"), fine, (), r"no form code; write one into the file"),
        (made._replace(labels=table), fine, (), "unreadable: neither a NIfTI nor an MGH file"),
        (made._replace(bundle=line.root / "bundle"), fine, (), "render: the bundle .* has no renderer"),
        (made._replace(bundle=damaged), fine, (), "is not the file that renderer.json names"),
        (made._replace(bundle=Path("package.module:Class")), fine, (), "only a bundle can have a renderer"),
    ):
        assert render(changed, output, *words) == 2
        assert re.search(says, capsys.readouterr().err)
    assert (tmp_path / "there.nii.gz").read_text() == "mine"
    assert not fine.exists()


def test_rendered_volumes_have_the_label_maps_that_they_were_made_from(
    line: Line, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = {"bundle": str(made.bundle), "decoder": "rendered", "covariates": {"draw": 6}}
    config = line.generate(tmp_path / "data", labels=True, **rendered)
    generate.run(as_config(config, GenerateConfig, tmp_path))
    dataset = open_dataset(str(tmp_path / "data"))
    plain = line.generate(tmp_path / "plain", bundle=str(made.bundle), labels=True, covariates={"draw": 6})
    generate.run(as_config(plain, GenerateConfig, tmp_path))
    decoded, render = open_dataset(str(tmp_path / "plain")), load_renderer(made.bundle, choose_device(False))
    contexts = RENDERER.read(made.bundle).covariates.encode(dataset.table)
    store = open_store(config["output"])
    seeds = read_samples(store, read_plan(store))["seed"].tolist()
    for index, (sample, before) in enumerate(zip(dataset, decoded, strict=True)):
        np.testing.assert_array_equal(sample["labels"], before["labels"])
        again = render(sample["labels"], contexts[index], seeds[index], before["image"])
        again = 0.25 * before["image"] + 0.75 * again
        np.testing.assert_allclose(sample["image"], again, atol=2**-11)
        assert np.abs(sample["image"] - before["image"]).mean() > 1e-3
    single = config | {"output": str(tmp_path / "single"), "labels": False}
    single["runtime"] = single["runtime"] | {"micro_batch": 1, "threads_per_worker": 2}
    generate.run(as_config(single, GenerateConfig, tmp_path))
    np.testing.assert_allclose(open_dataset(str(tmp_path / "single")).volumes(), dataset.volumes(), atol=2**-11)
    assert all(row.same_voxels and row.as_recorded for row in regenerate(config["output"], str(made.bundle), [0, 4]))
    rounded = config | {"output": str(tmp_path / "rounded"), "precision": "bfloat16"}
    generate.run(as_config(rounded, GenerateConfig, tmp_path))
    difference = np.abs(open_dataset(str(tmp_path / "rounded")).volumes() - dataset.volumes())
    assert 0 < difference.mean() < 0.01
    assert all(row.same_voxels and row.as_recorded for row in regenerate(rounded["output"], str(made.bundle), [0]))
    monkeypatch.setattr(selfcheck, "_measured", lambda shape, device: 0.5)
    with pytest.raises(UserError, match="bfloat16"):
        load_renderer(made.bundle, choose_device(False), precision="bfloat16")
    other = tmp_path / "other"
    shutil.copytree(made.bundle, other)
    shutil.copyfile(line.root / "bundle" / "bundle.json", other / "bundle.json")
    spec = RENDERER.read(other)
    RENDERER.write(other, dataclasses.replace(spec, metrics={}), (other / RENDERER.file).read_bytes())
    with pytest.raises(UserError, match="images are of another renderer"):
        list(regenerate(config["output"], str(other), [0]))


def test_a_gate_can_learn_from_rendered_scans(line: Line, made: Made, tmp_path: Path) -> None:
    config = line.bundle() | {"output": str(tmp_path / "bundle")}
    config |= {"gate": {"cohort": str(line.root / "cohort"), "reference": "rendered", "false_reject_rate": 0.2}}
    with pytest.raises(UserError, match="rendered needs a labeller and a renderer"):
        export_bundle.run(as_config(config, ExportConfig, tmp_path))
    assert not (tmp_path / "bundle").exists()
    config |= {"labeller": str(made.root / "labeller"), "renderer": str(made.root / "run")}
    with pytest.raises(UserError, match="rendered are too much alike to learn from"):  # a decoder of six steps
        export_bundle.run(as_config(config, ExportConfig, tmp_path))
    assert not (tmp_path / "bundle").exists()
    spec, scans = read_bundle(made.bundle), open_dataset(str(line.root / "cohort"), split="train")
    plain, rendered = (
        list(reconstructions(scans, [0, 5], made.bundle / AUTOENCODER_FILE, spec, renders))
        for renders in (None, made.bundle)
    )
    label, render = (load(made.bundle, choose_device(False)) for load in (load_labeller, load_renderer))
    for index, decoded, again in zip([0, 5], plain, rendered, strict=True):
        context = spec.covariates.encode(scans.table.iloc[[index]])[0]
        np.testing.assert_allclose(again, render.remade(decoded, label, context, 0)[0], atol=2**-11)
        assert np.abs(again - decoded).mean() > 1e-3


def test_a_renderer_that_cannot_follow_a_generation_is_refused(line: Line, made: Made, tmp_path: Path) -> None:
    spec, other = RENDERER.read(made.bundle), tmp_path / "other"
    labels = dataclasses.replace(spec.labels, labels=spec.labels.labels[:3])
    for changed, says in (
        ({"labels": labels}, "it knows other structures than the bundle's labeller"),
        ({"architecture": dataclasses.replace(spec.architecture, coarse=0, kept=0.0)}, "architecture.coarse 0"),
        ({"covariates": dataclasses.replace(spec.covariates, missing="refuse")}, "other covariates than the bundle"),
        (None, "has no renderer"),
    ):
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(made.bundle, other)
        if changed is None:
            (other / RENDERER.record).unlink()
        else:
            RENDERER.write(other, dataclasses.replace(spec, **changed), (other / RENDERER.file).read_bytes())
        config = line.generate(tmp_path / "data", bundle=str(other), decoder="rendered", covariates={"draw": 2})
        with pytest.raises(UserError, match=says):
            generate.run(as_config(config, GenerateConfig, tmp_path))
    assert not (tmp_path / "data").exists()


def test_left_and_resumed_training_is_the_undisturbed_one(made: Made) -> None:
    options: dict[str, Any] = {"steps": 8, "checkpoint_every": 3, "validate_every": 4}
    losses = {"losses": {"adversarial_start": 2, "discriminator_channels": 4}}
    asked: Iterator[Request] = iter([Request.NOTHING] * 5 + [Request.LEAVE])
    config = as_config(training(made.root, "stopped", **options) | losses, RendererTrainConfig, made.root)
    with pytest.raises(Left):
        fit(TRAINING, config, preempted=lambda: next(asked))
    fit(TRAINING, config)
    fit(TRAINING, as_config(training(made.root, "whole", **options) | losses, RendererTrainConfig, made.root))
    first, second = (read_run(made.root / name, RendererRun, "") for name in ("stopped", "whole"))
    assert first.weights_sha256 == second.weights_sha256
    assert first.config_digest == second.config_digest
    assert curve(made.root / "stopped") == curve(made.root / "whole")
    names = {name for row in curve(made.root / "whole") for name in row}
    assert {"train/l1", "train/adversarial", "train/matching", "train/penalty", "validation/critic_gap_train"} <= names


def test_mirrored_crops_change_sides(made: Made, tmp_path: Path) -> None:
    """A crop is a box of the scan and of its map, or of both mirrored, with left and right structures exchanged."""
    names = ("Left-A", "Right-A", "Left-B", "Right-B")
    table = LabelTable(labels=tuple(Label(index=i, name=n) for i, n in enumerate(names, 1)), source="test")
    config = as_config(training(made.root, "never"), RendererTrainConfig, tmp_path)
    scans, schema = LabelledScans(made.cohort, "train"), check(config).cohort.covariates
    crops = LabelledCrops(scans, config, schema, table)
    torch.manual_seed(0)
    chosen, seen = crops.indices(24, 0, 0), set()
    (batch,) = crops.batches(chosen)
    grid = [size // 2 for size in GRID.shape_xyz]
    for number, place in enumerate(batch.places[:, [0, 2, 3], 0, 0, 0].numpy()):
        origin = [round(((p + 1) / 2 * n - 0.5) * 2) for p, n in zip(place, grid, strict=True)]
        box = tuple(slice(o, o + 12) for o in origin)
        image, labels = scans.scan(int(chosen[number]))
        other = np.array([0, 2, 1, 4, 3], np.uint8)
        views = {"plain": (image, labels), "mirrored": (image[::-1], other[labels[::-1]])}
        same = {
            name
            for name, (scan, classes) in views.items()
            if np.array_equal(batch.classes[number], classes[box])
            and np.allclose(batch.target[number, 0], scan[box] * 1.2)
        }
        assert same
        seen |= same
    assert seen == {"plain", "mirrored"}
    sexes = scans.cohort.table["sex"].to_numpy()[crops.order]
    assert (sexes == "F").sum() == (sexes == "M").sum()


def test_a_bundle_gets_it_without_another_digest_and_copies_keep_both(line: Line, made: Made, tmp_path: Path) -> None:
    source = line.root / "bundle"
    assert read_bundle(made.bundle).digest == read_bundle(source).digest
    spec = RENDERER.read(made.bundle)
    assert set(spec.structures) == {"csf", "grey_matter", "white_matter", "ventricles"}
    volumes = open_dataset(made.cohort, split="train").label_volumes["Ventricles"]
    assert spec.structures["ventricles"].volume_ml == pytest.approx((volumes.min(), volumes.max()))
    copy = tmp_path / "copy"
    config = training(made.root, "again", steps=2) | {"bundle": str(made.bundle), "bundle_output": str(copy)}
    shown = train_renderer.describe(as_config(config, RendererTrainConfig, tmp_path))
    assert f"→ {copy}" in shown
    assert "4 structures: construction" in shown
    for _ in range(2):
        train_renderer.run(as_config(config, RendererTrainConfig, tmp_path))
    assert read_bundle(copy) == read_bundle(source)
    assert RENDERER.read(copy).provenance["steps"] == 2
    assert LABELLER.read(copy) == LABELLER.read(made.bundle)
    labeller = {"architecture": {"channels": [8], "blocks": [1]}, "bundle": str(made.bundle)}
    labeller |= {"cohort": made.cohort, "output": str(tmp_path / "labeller"), "bundle_output": str(tmp_path / "other")}
    labeller |= {"optimisation": training(made.root, "")["optimisation"] | {"steps": 1}, "runtime": LOCAL}
    train_labeller.run(as_config(labeller, LabellerTrainConfig, tmp_path))
    assert RENDERER.read(tmp_path / "other") == spec
    another = line.bundle() | {"output": str(made.bundle), "renderer": config["output"]}
    with pytest.raises(UserError, match="renderer: .* holds another renderer"):
        export_bundle.run(as_config(another, ExportConfig, tmp_path))
    distilled = write_distilled(tmp_path / "light", read_bundle(source), made.bundle, source, DIFFUSION_FILE)
    assert distilled == read_bundle(source)
    assert RENDERER.read(tmp_path / "light") == spec
    assert LABELLER.read(tmp_path / "light") == LABELLER.read(made.bundle)
    assert LABELLER.read(tmp_path / "other").provenance["steps"] == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"crops": {"balance": "age"}}, "crops.balance: 'age' is not a binary or categorical covariate"),
        ({"crops": {"cells": 2}}, "cells must be between 4 and 64"),
        ({"crops": {"cells": 4}}, "2 . crops.cells must be a multiple of architecture.coarse, and at least 3 times"),
        ({"coarse_share": 2.0}, "coarse_share must be between 0 and 1"),
        ({"losses": {"square_weight": -1.0}}, "cannot be negative"),
        ({"bundle": "t1w-2mm"}, "bundle and bundle_output need each other"),
        ({"bundle": "t1w-2mm", "bundle_output": "new"}, "renderer: it learns from volumes of"),
        ({"architecture": {"intensity_scale": 0.0}}, "intensity_scale must be between"),
        ({"runtime": LOCAL | {"micro_batch": 2}}, "runtime.micro_batch does nothing for train-renderer"),
        ({"cohort": "unlabelled"}, "has no label maps to learn from"),
    ],
)
def test_mistakes_of_a_training(line: Line, made: Made, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    config = training(made.root, "never") | change
    if config["cohort"] == "unlabelled":
        config["cohort"] = str(line.root / "cohort")
    with pytest.raises(UserError, match=says):
        train_renderer.run(as_config(config, RendererTrainConfig, tmp_path))
    assert not (made.root / "never").exists()
