"""A labeller: trained on a cohort's label maps, put into a bundle, and at work in a generation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest

from brainsynth import open_dataset
from brainsynth.bundle.files import read_bundle
from brainsynth.bundle.labeller import LABELLER
from brainsynth.cohort.phantom_cohort import DERIVATIVE, write_phantom_cohort
from brainsynth.config.evaluation import EvaluateConfig
from brainsynth.config.labelling import LabellerTrainConfig
from brainsynth.config.schema import ExportConfig, GenerateConfig, PrepareConfig
from brainsynth.errors import UserError
from brainsynth.metrics.overlap import dice as dice_of
from brainsynth.models.device import choose_device
from brainsynth.models.loading import load_labeller
from brainsynth.planning import plan_generation
from brainsynth.records import to_dict
from brainsynth.stages import evaluate, export_bundle, generate, prepare_cohort, train_labeller
from brainsynth.stages.regenerate import regenerate
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.verify import verify_dataset
from brainsynth.training.labeller import TRAINING, LabellerTask, check
from brainsynth.training.loop import Worker
from brainsynth.training.preemption import Left, Request
from brainsynth.training.runner import fit
from brainsynth.training.runs import LabellerRun, read_run
from tests.line import GRID, LOCAL, Line, as_config

STEPS = 120


class Made(NamedTuple):
    """A trained labeller, and the bundle that has it."""

    root: Path
    config: dict[str, Any]
    run: LabellerRun
    bundle: Path


def training(root: Path, output: str, **optimisation: Any) -> dict[str, Any]:
    options = {"steps": STEPS, "batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 10, "ema_decay": 0.9}
    options |= {"log_every": 20, "validate_every": STEPS // 2, "checkpoint_every": STEPS // 2}
    return {
        "cohort": str(root / "labelled"),
        "output": str(root / output),
        "architecture": {"channels": [16, 24], "blocks": [1, 1], "cell": 1},
        "optimisation": options | optimisation,
        "augmentation": {"shift_mm": 4.0},
        "runtime": {"workers": 0, "threads_per_worker": 1, "trackers": []},
    }


@pytest.fixture(scope="module")
def made(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("labeller")
    write_phantom_cohort(root / "phantoms", 64, 9, GRID, labels=True)
    source = {"path": str(root / "phantoms"), "label_folder": DERIVATIVE, "label_source": "construction"}
    cohort = line.prepare() | {"source": source, "output": str(root / "labelled"), "validation_fraction": 0.3}
    prepare_cohort.run(as_config(cohort, PrepareConfig, root))
    config = training(root, "run")
    train_labeller.run(as_config(config, LabellerTrainConfig, root))
    bundle = line.bundle() | {"output": str(root / "bundle"), "labeller": str(root / "run")}
    export_bundle.run(as_config(bundle, ExportConfig, root))
    return Made(root, config, read_run(root / "run", LabellerRun, ""), root / "bundle")


def test_it_learns_the_structures_of_scans_that_it_never_saw(made: Made) -> None:
    rows = [json.loads(text) for text in (made.root / "run" / "metrics.jsonl").read_text().splitlines()]
    dice = [row["validation/dice"] for row in rows if "validation/dice" in row]
    assert made.run.metrics["dice"] == pytest.approx(dice[-1])
    assert dice[-1] > dice[0]
    assert made.run.metrics["dice_white_matter"] > 0.65  # voxels of 7 mm: half of them lie at a border
    assert made.run.metrics["dice_grey_matter"] > 0.6
    assert set(made.run.metrics) == {"dice", "dice_csf", "dice_grey_matter", "dice_white_matter", "dice_ventricles"}
    assert made.run.scans + made.run.validation_scans == 64
    cohort = open_dataset(made.config["cohort"], split="validation")
    labeller = load_labeller(made.bundle, choose_device(False))
    maps = [(labeller(cohort.volume(i)[None])[0], cohort.label_map(i)) for i in range(len(cohort))]
    likeness = np.array(
        [[np.nanmean(dice_of(made_of, theirs, (1, 2, 3, 4))) for _, theirs in maps] for made_of, _ in maps]
    )
    assert (likeness.argmax(1) == np.arange(len(maps))).mean() > 0.5  # its own scan's map, not one mean map


def test_an_interrupted_training_ends_with_the_same_weights(made: Made) -> None:
    config = as_config(training(made.root, "stopped", steps=8, checkpoint_every=3), LabellerTrainConfig, made.root)
    asked = iter([Request.NOTHING] * 4 + [Request.LEAVE])
    with pytest.raises(Left):
        fit(TRAINING, config, preempted=lambda: next(asked))
    fit(TRAINING, config)
    whole = as_config(training(made.root, "whole", steps=8, checkpoint_every=3), LabellerTrainConfig, made.root)
    fit(TRAINING, whole)
    first, second = (read_run(made.root / name, LabellerRun, "") for name in ("stopped", "whole"))
    assert first.weights_sha256 == second.weights_sha256
    assert first.config_digest == second.config_digest


def test_workers_share_a_batch(made: Made) -> None:
    """Two workers see the scans of the batch of one, each its part; a step may see a box of each."""
    boxes = made.config | {"augmentation": {"box_xyz": [16, 24, 16]}}
    config = as_config(boxes, LabellerTrainConfig, made.root)
    worker = Worker(config.runtime, made.root / "unused")
    task = LabellerTask(config, check(config), worker)
    images, classes, places = task.batch(0)
    assert images.shape == (2, 1, 16, 24, 16)
    assert classes.shape == (2, 16, 24, 16)
    assert places.shape == (2, 18, 8, 12, 8)
    worker.world_size, worker.rank = 2, 1
    assert len(task.batch(0)[0]) == 1


def test_a_bundle_gets_a_labeller_without_another_digest(line: Line, made: Made, tmp_path: Path) -> None:
    """Its images are the same: a dataset that was made before it had one is still its own."""
    before = line.root / "bundle"
    assert read_bundle(made.bundle).digest == read_bundle(before).digest
    plain = plan_generation(as_config(line.generate(tmp_path / "a"), GenerateConfig, tmp_path)).plan
    named = line.generate(tmp_path / "a", bundle=str(made.bundle))
    assert plan_generation(as_config(named, GenerateConfig, tmp_path)).plan.fingerprint == plain.fingerprint
    labelled = plan_generation(as_config(named | {"labels": True}, GenerateConfig, tmp_path)).plan
    assert labelled.identity == plain.identity | {"labeller": LABELLER.read(made.bundle).digest}
    later = line.bundle() | {"output": str(tmp_path / "later")}
    export_bundle.run(as_config(later, ExportConfig, tmp_path))
    assert not (tmp_path / "later" / LABELLER.record).exists()
    for _ in range(2):
        export_bundle.run(as_config(later | {"labeller": str(made.root / "run")}, ExportConfig, tmp_path))
    assert LABELLER.read(tmp_path / "later") == LABELLER.read(made.bundle)


def test_any_bundle_gets_a_copy_with_the_labeller(line: Line, made: Made, tmp_path: Path) -> None:
    """Also one that was imported, whose training is not here."""
    source, copy = line.root / "bundle", tmp_path / "copy"
    config = training(made.root, "again", steps=2) | {"bundle": str(source), "bundle_output": str(copy)}
    for _ in range(2):
        train_labeller.run(as_config(config, LabellerTrainConfig, tmp_path))
    assert read_bundle(copy) == read_bundle(source)
    assert LABELLER.read(copy).labels == LABELLER.read(made.bundle).labels
    planned = plan_generation(
        as_config(line.generate(tmp_path / "d", bundle=str(copy), labels=True), GenerateConfig, tmp_path)
    )
    assert planned.plan.labels is not None
    assert f"→ {copy}" in train_labeller.describe(as_config(config, LabellerTrainConfig, tmp_path))
    for wrong, says in (
        ({"bundle_output": str(source)}, "is also bundle or output"),
        ({"bundle_output": str(made.root)}, "is not empty and is not a bundle"),
        ({"bundle": None}, "bundle and bundle_output need each other"),
        ({"bundle": "t1w-2mm"}, "labeller: it learns from volumes of"),
    ):
        with pytest.raises(UserError, match=says):
            train_labeller.run(as_config(config | wrong, LabellerTrainConfig, tmp_path))


def test_its_record_says_what_it_names_and_how_well(made: Made) -> None:
    spec = LABELLER.read(made.bundle)
    assert [label.name for label in spec.labels.labels] == ["CSF", "Grey-Matter", "White-Matter", "Ventricles"]
    assert "construction" in spec.labels.source
    assert spec.dice == {k.removeprefix("dice_"): v for k, v in made.run.metrics.items() if k != "dice"}
    assert spec.dice_scans == made.run.validation_scans


def test_float16_halves_the_file_and_hardly_changes_a_label(line: Line, made: Made, tmp_path: Path) -> None:
    half = line.bundle() | {"output": str(tmp_path / "half"), "labeller": str(made.root / "run"), "weights": "float16"}
    export_bundle.run(as_config(half, ExportConfig, tmp_path))
    sizes = [(folder / LABELLER.file).stat().st_size for folder in (tmp_path / "half", made.bundle)]
    assert sizes[0] < 0.6 * sizes[1]
    cohort, cpu = open_dataset(made.config["cohort"], split="validation"), choose_device(False)
    maps = [load_labeller(folder, cpu)(cohort.volumes(range(3))) for folder in (tmp_path / "half", made.bundle)]
    assert (maps[0] != maps[1]).mean() < 2e-3


def test_generated_volumes_come_with_the_label_maps_of_what_is_stored(line: Line, made: Made, tmp_path: Path) -> None:
    config = line.generate(tmp_path / "data", bundle=str(made.bundle), labels=True, covariates={"draw": 6})
    generate.run(as_config(config, GenerateConfig, tmp_path))
    dataset, labeller = open_dataset(str(tmp_path / "data")), load_labeller(made.bundle, choose_device(False))
    assert verify_dataset(open_store(str(tmp_path / "data"))).ok
    assert [one["name"] for one in dataset.label_table] == [label.name for label in made.run.labels.labels]
    for sample in dataset:
        np.testing.assert_array_equal(sample["labels"], labeller(sample["image"][None])[0])
    run = json.loads((tmp_path / "data" / "report.json").read_text())["run"]
    commits = [json.loads(path.read_text())["record"] for path in (tmp_path / "data" / "commits").glob("*.json")]
    assert run["shards"].split(",")[0] == str(len(commits))  # a shard of images and maps is one
    assert run["worker time"].startswith(f"{sum(commit['runtime']['make_s'] for commit in commits):.1f} s")
    counted = [(sample["labels"] == 3).sum() * GRID.voxel_ml for sample in dataset]
    np.testing.assert_allclose(dataset.label_volumes["White-Matter"], counted)
    plain = line.generate(tmp_path / "plain", covariates={"draw": 6})
    generate.run(as_config(plain, GenerateConfig, tmp_path))
    np.testing.assert_array_equal(open_dataset(str(tmp_path / "plain")).volumes(), dataset.volumes())
    single = config | {"output": str(tmp_path / "single")}
    single["runtime"] = single["runtime"] | {"micro_batch": 1, "threads_per_worker": 2}
    generate.run(as_config(single, GenerateConfig, tmp_path))
    alone = open_dataset(str(tmp_path / "single"))
    for sample in alone:
        np.testing.assert_array_equal(sample["labels"], labeller(sample["image"][None])[0])
    again = list(regenerate(str(tmp_path / "data"), str(made.bundle), [0, 4]))
    assert all(row.same_voxels and row.as_recorded for row in again)


@pytest.mark.slow
def test_an_evaluation_counts_structures(line: Line, made: Made, tmp_path: Path) -> None:
    """A cohort against itself: no structure differs, and the counted brains follow those that were asked for."""
    config = {
        "dataset": made.config["cohort"],
        "reference": made.config["cohort"],
        "output": str(tmp_path / "evaluation"),
        "labeller": str(made.bundle),
        "structures": {"ventricular_volume": "Ventricles", "brain_volume": "grey matter + White-Matter"},
        "pairs": 2,
        "features": None,
        "runtime": LOCAL,
    }
    found = {one.metric: one for one in evaluate.run(as_config(config, EvaluateConfig, tmp_path))}
    for structure in ("csf", "grey matter", "white matter", "ventricles"):
        one = found[f"{structure}: difference from real at the same covariates"]
        assert one.unit == "SD"
        assert abs(one.value) < 0.5
        assert one.as_real
    assert found["ventricular_volume: r of measured with asked"].n == 64
    assert found["brain_volume: r of measured with asked"].value > 0.8
    measured = pd.read_csv(tmp_path / "evaluation" / "measured.tsv", sep="\t")
    assert (measured["label_volume_white_matter"] > 100).all()
    for wrong, says in (
        (
            {"structures": {"ventricular_volume": "hippocampus"}},
            "hippocampus is not a structure of the labeller; it knows",
        ),
        ({"structures": {"ventricular_volume": "+"}}, "is not a list of structures"),
        ({"labeller": str(line.root / "bundle")}, "has no labeller"),
        ({"labeller": None}, "others need labeller: name a bundle"),
        ({"by": "age"}, "by: age is not a covariate of .* that has categories .sex."),
    ):
        with pytest.raises(UserError, match=says):
            evaluate.run(as_config(config | wrong, EvaluateConfig, tmp_path))


def test_another_labeller_or_none_is_refused_before_anything_is_written(line: Line, made: Made, tmp_path: Path) -> None:
    config = line.generate(tmp_path / "data", bundle=str(made.bundle), labels=True)
    work = plan_generation(as_config(config, GenerateConfig, tmp_path))
    other = tmp_path / "other"
    shutil.copytree(made.bundle, other)
    without = line.generate(tmp_path / "data", labels=True)
    with pytest.raises(UserError, match="labels: the bundle .* has no labeller"):
        plan_generation(as_config(without, GenerateConfig, tmp_path))
    (other / LABELLER.file).write_bytes((other / LABELLER.file).read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match=r"labeller\.safetensors is missing or is not the file that"):
        plan_generation(as_config(config | {"bundle": str(other)}, GenerateConfig, tmp_path))
    shutil.copytree(made.bundle, other, dirs_exist_ok=True)
    with pytest.raises(UserError, match="of another labeller: its plan names"):
        load_labeller(other, choose_device(False), "0" * 64)
    assert read_plan is not None
    assert work.plan.labels is not None
    assert not (tmp_path / "data").exists()


def test_mistakes_of_export_and_training(line: Line, made: Made, tmp_path: Path) -> None:
    short = training(made.root, "short", steps=2)
    train_labeller.run(as_config(short, LabellerTrainConfig, tmp_path))
    bundle = line.bundle() | {"output": str(made.bundle), "labeller": str(made.root / "short")}
    with pytest.raises(UserError, match="holds another labeller"):
        export_bundle.run(as_config(bundle, ExportConfig, tmp_path))
    bundle["labeller"] = str(tmp_path)
    with pytest.raises(UserError, match="run `brainsynth train-labeller`"):
        export_bundle.run(as_config(bundle, ExportConfig, tmp_path))
    shutil.copytree(made.root / "run", tmp_path / "damaged")
    with (tmp_path / "damaged" / LABELLER.file).open("ab") as file:
        file.write(b"\0")
    bundle |= {"output": str(tmp_path / "new"), "labeller": str(tmp_path / "damaged")}
    with pytest.raises(UserError, match="is not the file that"):
        export_bundle.run(as_config(bundle, ExportConfig, tmp_path))
    assert not (tmp_path / "new").exists()
    unlabelled = training(made.root, "never") | {"cohort": str(line.root / "cohort")}
    with pytest.raises(UserError, match="has no label maps to learn from"):
        train_labeller.run(as_config(unlabelled, LabellerTrainConfig, tmp_path))
    assert not (made.root / "never").exists()
    with pytest.raises(UserError, match="blocks needs one number per level"):
        as_config(short | {"architecture": {"channels": [8], "blocks": [1, 1]}}, LabellerTrainConfig, tmp_path)
    assert "4 structures" in train_labeller.describe(as_config(short, LabellerTrainConfig, tmp_path))
    assert to_dict(made.run)["labels"]["source"]
