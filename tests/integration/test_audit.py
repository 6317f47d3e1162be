"""jobs/audit.py on invented brains: clean data passes, planted copies fail by name, mistakes are told before any work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainsynth.audit.case import find_people
from brainsynth.audit.verdict import AuditRecord, read_audit
from brainsynth.config.audit import AuditConfig
from brainsynth.config.schema import PrepareConfig
from brainsynth.errors import UserError
from brainsynth.reading.dataset import open_dataset
from brainsynth.stages import prepare_cohort
from brainsynth.stages.audit import run as audit
from brainsynth.storage.commit import commit_key
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.verify import verify_dataset
from tests.instruments.heads import SHAPE, SPACING, heads, moved
from tests.integration.test_bad_input import run_job
from tests.line import GRID, Line, as_config

VOLUME = {"shape_xyz": list(SHAPE), "spacing_mm": list(SPACING), "origin_mm": [-76.0, -100.0, -76.0]}
COVARIATES = {
    "covariates": [
        {"name": "age", "kind": "continuous", "unit": "years", "low": 18.0, "high": 95.0},
        {"name": "sex", "kind": "binary", "categories": ["F", "M"]},
    ]
}
RUNTIME = {"workers": 0, "threads_per_worker": 1, "micro_batch": 16}
PEOPLE = 110


def cohort(root: Path, name: str, scans: np.ndarray, seed: int, **changes: Any) -> str:
    """Heads and made-up covariates as a prepared cohort; the i-th scan is of subject P<i>."""
    folder = root / f"{name}-scans"
    folder.mkdir()
    rng, affine = np.random.default_rng(seed), np.diag([*SPACING, 1.0])
    affine[:3, 3] = VOLUME["origin_mm"]
    for index, scan in enumerate(scans):
        nib.save(nib.Nifti1Image(np.clip(scan, 0, 1).astype(np.float32), affine), folder / f"{index}.nii")
    table = pd.DataFrame({"participant_id": [f"P{i}" for i in range(len(scans))]})
    table["image"] = [f"{i}.nii" for i in range(len(scans))]
    table["age"] = rng.uniform(20, 90, len(scans)).round(2)
    table["sex"] = rng.choice(["F", "M"], len(scans))
    table.to_csv(folder / "table.csv", index=False)
    config = {
        "source": {"path": str(folder / "table.csv")},
        "output": str(root / name),
        "covariates": COVARIATES,
        "volume": VOLUME,
        "intensity_percentiles": [0.0, 100.0],
        "validation_fraction": 0.3,
        "samples_per_shard": 12,
        "runtime": {"workers": 0},
    }
    prepare_cohort.run(as_config(config | changes, PrepareConfig, root))
    return str(root / name)


class World:
    """A reference cohort, its scans, and others that stand in for generated volumes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.scans, self.strangers = heads(PEOPLE, 1), heads(24, 2)
        self.reference = cohort(root, "reference", self.scans, 1)
        self.clean = cohort(root, "clean", self.strangers, 2)
        trained = [int(i.removeprefix("P")) for i in open_dataset(self.reference, split="train").sample_ids]
        self.copied = trained[5], trained[20]
        planted = self.strangers.copy()
        planted[3] = self.scans[self.copied[0]]
        planted[17] = moved(self.scans[self.copied[1]], (3, -4, 5), (6, -4, 5))[::-1]
        self.planted = cohort(root, "planted", planted, 3)

    def config(self, dataset: str, output: Path, **changes: Any) -> dict[str, Any]:
        return {
            "dataset": dataset,
            "reference": self.reference,
            "output": str(output),
            "runtime": RUNTIME,
        } | changes

    def run(self, dataset: str, output: Path, **changes: Any) -> AuditRecord:
        return audit(as_config(self.config(dataset, output, **changes), AuditConfig, self.root))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("audit"))


@pytest.fixture(scope="module")
def planted(world: World) -> tuple[int, Path]:
    """Exit code and output of the job on the dataset with two copies."""
    output = world.root / "audit-planted"
    return run_job("audit", world.config(world.planted, output), world.root).returncode, output


def test_clean_volumes_pass(world: World, tmp_path: Path) -> None:
    output = tmp_path / "audit"
    done = run_job("audit", world.config(world.clean, output, pictures=False), tmp_path)
    assert done.returncode == 0, done.stderr
    found = read_audit(open_store(str(output)))
    assert (found.verdict, found.reasons, found.volumes) == ("PASS", (), 24)
    assert (found.copies.null_seen + found.copies.null_unseen, found.copies.outright) == (PEOPLE, 0)
    manifest = open_dataset(world.clean).manifest
    assert found.dataset_shards_digest == manifest["shards_digest"]
    assert found.dataset_plan_fingerprint == manifest["plan_fingerprint"]
    page = (output / "report.html").read_text()
    assert "not for publication" in page
    assert "real scans" not in page
    assert page.count("<img") == 2
    for name in ("described-dataset", "described-reference"):
        assert verify_dataset(open_store(str(output / name))).ok


def test_planted_copies_fail_and_name_the_right_people(world: World, planted: tuple[int, Path]) -> None:
    code, output = planted
    assert code == 1
    found = read_audit(open_store(str(output)))
    assert found.verdict == "FAIL"
    assert found.copies.outright == 2
    pairs = {pair.volume: pair.subject for pair in found.copies.worst if pair.outright}
    assert pairs == {"P3": f"P{world.copied[0]}", "P17": f"P{world.copied[1]}"}
    table = pd.read_csv(output / "neighbours.tsv", sep="\t")
    assert table["sample_id"].tolist() == open_dataset(world.planted).sample_ids
    assert table.set_index("sample_id")["nearest_participant"][["P3", "P17"]].tolist() == list(pairs.values())
    assert table["flagged"].sum() == found.copies.flagged
    page = (output / "report.html").read_text()
    assert "contains real scans: not for publication" in page
    assert page.count("<img") == 3
    assert "http://" not in page
    assert "https://" not in page


def test_a_second_run_makes_only_what_is_missing(planted: tuple[int, Path]) -> None:
    _, output = planted
    before = (output / "audit.json").read_bytes()
    described = output / "described-dataset"
    (described / "dataset.json").unlink()
    (described / commit_key(1)).unlink()
    (described / "dataset.zarr" / "voxels" / "c" / "1" / "0" / "0").unlink()
    kept = {path: path.stat().st_mtime_ns for path in (described / "commits").iterdir()}
    template = next(output.glob("template-*.npy")).stat().st_mtime_ns
    config = json.loads(before)["record"]
    again = {"dataset": config["dataset"], "reference": config["reference"], "output": str(output)}
    done = run_job("audit", again | {"runtime": RUNTIME}, output.parent)
    assert done.returncode == 1, done.stderr
    assert (output / "audit.json").read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert (described / commit_key(1)).exists()
    assert next(output.glob("template-*.npy")).stat().st_mtime_ns == template


@pytest.mark.slow
def test_an_embedder_is_trained_once_and_is_part_of_the_plan(world: World, tmp_path: Path) -> None:
    options = {"embedder": "train", "embedder_steps": 2}
    found = world.run(world.planted, tmp_path / "audit", **options)
    assert found.instruments["instruments"] == ["voxels", "embedding"]
    (weights,) = (tmp_path / "audit").glob("embedder-*.safetensors")
    written = weights.stat().st_mtime_ns
    assert world.run(world.planted, tmp_path / "audit", **options) == found
    assert weights.stat().st_mtime_ns == written
    for changes in ({}, {"embedder": "train", "embedder_steps": 3}):
        with pytest.raises(UserError, match="holds another plan"):
            world.run(world.planted, tmp_path / "audit", **changes)
    assert len(list((tmp_path / "audit").glob("embedder-*"))) == 1


@pytest.mark.slow
def test_two_ids_of_one_person_do_not_calibrate(world: World) -> None:
    """A held-out scan of a person who is in training under another id tells nothing of people who are no copies."""
    reference = open_dataset(world.reference)
    apart = find_people(reference)
    assert len(apart.training) + len(apart.held_out) == PEOPLE
    trained, held_out = (reference.sample_ids[int(rows[0])] for rows in (apart.training, apart.held_out))
    joined = find_people(reference, [[held_out, trained]])
    assert joined.training.tolist() == apart.training.tolist()
    assert joined.held_out.tolist() == apart.held_out.tolist()[1:]
    assert joined.names[int(joined.person[joined.training[0]])] == f"{held_out}={trained}"


def wrong(world: World, tmp_path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    coarse = {**VOLUME, "shape_xyz": [18, 26, 20]}
    yield {"reference": cohort(tmp_path, "coarse", world.scans[:4], 1, volume=coarse)}, "is on another grid"
    yield {"reference": cohort(tmp_path, "few", world.scans[:16], 1)}, "10 held out, not"
    yield {"reference": cohort(tmp_path, "some", world.scans[:40], 1)}, "needs at least 99 scans of people"
    yield {"reference": str(tmp_path / "absent")}, "reference: there is no finished dataset"
    alone = cohort(tmp_path, "alone", world.scans[:2], 1, validation_fraction=0.001)
    yield {"reference": alone}, "no subjects in the split 'validation'"
    yield {"false_alarm_rate": 0.005}, "ask for a rate of at least 0.00901"
    yield {"same_person": [["P1", "Q1"]]}, "same_person: no scan of Q1"
    yield {"same_person": [["P1"]]}, "at least two ids"
    yield {"embedder": str(tmp_path / "no.safetensors")}, "embedder: there are no weights"
    yield {"bundle": str(tmp_path)}, "was not generated"
    yield {"dataset": world.reference, "output": world.reference}, "a folder of its own"


def test_mistakes_are_told_once_and_leave_nothing(world: World, tmp_path: Path) -> None:
    output = tmp_path / "audit"
    for changes, message in wrong(world, tmp_path):
        done = run_job("audit", world.config(world.clean, output) | changes, tmp_path)
        assert done.returncode == 2, changes
        assert done.stderr.count("error:") == 1
        assert message in done.stderr, (changes, done.stderr)
    assert not output.exists()


def test_a_generated_dataset_is_audited_against_its_own_cohort_alone(
    line: Line, generated: Path, world: World, tmp_path: Path
) -> None:
    volume = {"shape_xyz": list(GRID.shape_xyz), "spacing_mm": list(GRID.spacing_mm), "origin_mm": list(GRID.origin_mm)}
    other = cohort(tmp_path, "other", world.scans[:12], 1, volume=volume)
    bundle = str(line.root / "bundle")
    for changes, message in (
        ({"reference": other}, "bundle: name the bundle"),
        ({"reference": other, "bundle": bundle}, "is another cohort"),
        # The right one, of 48 people, is let through to the next question: are they enough?
        ({"reference": str(line.root / "cohort"), "bundle": bundle}, "held out"),
    ):
        config = world.config(str(generated), tmp_path / "audit") | changes
        done = run_job("audit", config, tmp_path, "--dry-run")
        assert done.returncode == 2
        assert message in done.stderr
