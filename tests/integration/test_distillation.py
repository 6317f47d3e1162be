"""The distilled decoder: trained, exported, used, and refused where something does not fit."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from brainsynth import open_dataset
from brainsynth.bundle.files import read_bundle
from brainsynth.bundle.spec import DECODER_FILE, BundleSpec
from brainsynth.config.distillation import DistillConfig
from brainsynth.config.schema import GenerateConfig
from brainsynth.errors import UserError
from brainsynth.models.loading import load_models
from brainsynth.planning import plan_generation
from brainsynth.records import from_dict, seal, to_dict
from brainsynth.stages import distill_decoder, generate
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import open_store
from brainsynth.training.diffusion import LatentTable
from brainsynth.training.distillation import TRAINING
from brainsynth.training.preemption import Left, Request
from brainsynth.training.runner import fit
from brainsynth.training.runs import DistillRun, read_run
from tests.integration.test_regenerate import brainsynth
from tests.line import Line, as_config

CPU = torch.device("cpu")


class Made(NamedTuple):
    """A finished distillation."""

    config: dict[str, Any]
    run: DistillRun
    bundle: Path
    spec: BundleSpec


@pytest.fixture(scope="module")
def made(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("distilled")
    config = line.distillation(str(folder / "run"), steps=60, validate_every=10, checkpoint_every=60)
    distill_decoder.run(as_config(config, DistillConfig, folder))
    run = read_run(folder / "run", DistillRun, "")
    return Made(config, run, folder / "run-bundle", read_bundle(folder / "run-bundle"))


def test_training_brings_it_nearer_on_held_out_latents(made: Made) -> None:
    rows = [json.loads(text) for text in (Path(made.config["output"]) / "metrics.jsonl").read_text().splitlines()]
    for kind in ("generated", "encoded"):
        l1 = [row[f"validation/{kind}_l1"] for row in rows if f"validation/{kind}_l1" in row]
        assert l1[-1] < 0.5 * l1[0]
        assert made.run.metrics[f"{kind}_l1"] == pytest.approx(l1[-1])


def test_it_makes_the_image_of_the_latents_it_is_given(line: Line, made: Made) -> None:
    """A decoder that had learnt one mean image would be as near to the image of any other latents."""
    own, _ = load_models(made.bundle, made.spec, CPU)
    light, _ = load_models(made.bundle, made.spec, CPU, decoder="distilled")
    latents = LatentTable(str(line.root / "latents"), "validation", made.spec.covariates, made.spec.latents)
    torch.manual_seed(0)
    z = latents.mean + latents.sigma * torch.randn_like(latents.mean)
    with torch.no_grad():
        wanted, images = own.decode(z), light.decode(z)
    distance = (images[:, None] - wanted[None]).abs().flatten(2).mean(2)
    right = distance.argmin(1) == torch.arange(len(latents))
    assert len(latents) >= 8
    assert right.float().mean() >= 0.75


def test_the_bundle_records_what_it_is_and_what_it_loses(line: Line, made: Made) -> None:
    old, new = read_bundle(line.root / "bundle"), made.spec
    assert new.distilled == made.run.distilled
    assert new.distilled is not None
    assert new.distilled.on_encoded is not None
    assert new.distilled.on_generated.count == 4
    assert new.distilled.flops_ratio > 2
    assert new.weights == old.weights | made.run.weights
    assert new.provenance["distilled_from"] == old.digest
    assert "distilled" not in to_dict(old)  # a bundle without one keeps its digest
    before = {path.name: path.stat().st_mtime_ns for path in made.bundle.iterdir()}
    distill_decoder.run(as_config(made.config, DistillConfig, made.bundle.parent))
    assert {path.name: path.stat().st_mtime_ns for path in made.bundle.iterdir()} == before


@pytest.mark.parametrize("gone", ["on_generated", "on_encoded", "flops_ratio", "architecture"])
def test_a_bundle_without_the_measured_loss_is_refused(made: Made, gone: str) -> None:
    plain = to_dict(made.spec)
    del plain["distilled"][gone]
    with pytest.raises(UserError, match=f"distilled.{gone}: "):
        from_dict(BundleSpec, plain, "the bundle")


def test_a_bundle_whose_record_and_files_disagree_is_refused(made: Made) -> None:
    assert made.spec.distilled is not None
    with pytest.raises(ValueError, match="needs its record under distilled"):
        dataclasses.replace(made.spec, distilled=None)
    weights = {name: sha for name, sha in made.spec.weights.items() if name != DECODER_FILE}
    with pytest.raises(ValueError, match="needs its record under distilled"):
        dataclasses.replace(made.spec, weights=weights)
    deep = dataclasses.replace(made.spec.distilled.architecture, channels=(8,) * 4, blocks=(0,) * 4)
    with pytest.raises(ValueError, match="does not fit 4 voxels per latent cell"):
        dataclasses.replace(made.spec, distilled=dataclasses.replace(made.spec.distilled, architecture=deep))


def test_a_changed_or_unfit_weight_file_is_refused(line: Line, made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(made.bundle, folder)
    config = as_config(
        line.generate(tmp_path / "data", bundle=str(folder), decoder="distilled"), GenerateConfig, tmp_path
    )
    data = bytearray((folder / DECODER_FILE).read_bytes())
    data[-1] ^= 1
    (folder / DECODER_FILE).write_bytes(data)
    with pytest.raises(UserError, match=f"{DECODER_FILE} is not the file that the bundle names"):
        generate.run(config)
    assert made.spec.distilled is not None
    shutil.copy(made.bundle / DECODER_FILE, folder)
    wider = dataclasses.replace(made.spec.distilled.architecture, channels=(24, 8))
    spec = dataclasses.replace(made.spec, distilled=dataclasses.replace(made.spec.distilled, architecture=wider))
    (folder / "bundle.json").write_bytes(seal(spec))
    with pytest.raises(UserError, match=f"{DECODER_FILE} does not fit the architecture"):
        generate.run(config)


def test_generation_with_it_is_another_dataset_and_can_be_made_again(line: Line, made: Made, tmp_path: Path) -> None:
    images = {}
    for decoder in ("own", "distilled"):
        config = line.generate(tmp_path / decoder, bundle=str(made.bundle), decoder=decoder)
        generate.run(as_config(config, GenerateConfig, tmp_path))
        images[decoder] = open_dataset(str(tmp_path / decoder)).volumes()
    plans = {name: read_plan(open_store(str(tmp_path / name))) for name in images}
    assert "decoder" not in plans["own"].identity  # fingerprints from before there was a choice stay
    assert plans["distilled"].identity == {**plans["own"].identity, "decoder": "distilled"}
    default = line.generate(tmp_path / "own", bundle=str(made.bundle))
    assert plan_generation(as_config(default, GenerateConfig, tmp_path)).plan.fingerprint == plans["own"].fingerprint
    difference = abs(images["own"] - images["distilled"]).mean()
    assert 0 < difference < 4 * made.run.metrics["generated_l1"]
    done = brainsynth("regenerate", tmp_path / "distilled", "--bundle", made.bundle, "--random", "12")
    assert "12 of 12 rows have the voxels that their records name" in done.stdout, done.stdout + done.stderr
    other = as_config(default | {"output": str(tmp_path / "distilled")}, GenerateConfig, tmp_path)
    with pytest.raises(UserError, match="identity.decoder: the folder has 'distilled'"):
        generate.run(other)


def test_no_data_are_needed_and_a_damaged_latents_file_is_sampled_again(line: Line, tmp_path: Path) -> None:
    config = line.distillation(str(tmp_path / "run"))
    del config["latents"]
    config["generated"]["share"] = 1.0
    distill_decoder.run(as_config(config, DistillConfig, tmp_path))
    spec = read_bundle(tmp_path / "run-bundle")
    assert spec.distilled is not None
    assert spec.distilled.on_encoded is None
    files = sorted((tmp_path / "run").glob("latents-*/*.safetensors"))
    assert [file.name[:-12] for file in files] == ["train-000000", "train-000008", "validation-000000"]
    before = [load_file(file)["latents"].clone() for file in files]
    every = torch.cat(before).flatten(1)
    assert (torch.cdist(every, every) + torch.eye(len(every)) * 1e9).min() > 1e-3  # none is drawn twice
    files[1].unlink()  # what was read is mapped from it
    files[1].write_bytes(b"cut")
    (tmp_path / "run" / "run.json").unlink()
    distill_decoder.run(as_config(config, DistillConfig, tmp_path))
    assert all(torch.equal(load_file(file)["latents"], found) for file, found in zip(files, before, strict=True))
    assert read_bundle(tmp_path / "run-bundle") == spec


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"latents": None}, "generated.share must be 1 without latents"),
        ({"bundle": "/nowhere"}, "is not a bundle"),
        ({"latents": "/nowhere"}, "is not a brainsynth dataset"),
        ({"architecture": {"channels": [8, 8, 8], "blocks": [0, 0, 0]}}, "a decoder of 3 levels does not fit"),
        ({"architecture": {"channels": [256, 128], "blocks": [4, 4]}}, "give it fewer channels or blocks"),
        ({"losses": {"perceptual_weight": 0.1}}, "need each other"),
        ({"losses": {"perceptual_weight": 0.1, "perceptual_weights": "/nowhere/r.pth"}}, "there is no file"),
        (
            {"generated": {"sampler": {"method": "ddim", "steps": 2}, "count": 2}},
            "does not fit a network that predicts",
        ),
        ({"bundle_output": "BUNDLE"}, "is also bundle or output"),
        ({"bundle_output": "COHORT"}, "is not empty and is not a bundle"),
    ],
)
def test_mistakes_are_told_before_it_starts(line: Line, tmp_path: Path, change: dict[str, Any], told: str) -> None:
    places = {"BUNDLE": str(line.root / "bundle"), "COHORT": str(line.root / "cohort")}
    config = line.distillation(str(tmp_path / "run"))
    config |= {key: places.get(value, value) if isinstance(value, str) else value for key, value in change.items()}
    with pytest.raises(UserError, match=re.escape(told)):
        distill_decoder.run(as_config(config, DistillConfig, tmp_path))
    assert not (tmp_path / "run").exists()


def test_latents_and_bundles_of_others_are_refused(line: Line, made: Made, tmp_path: Path) -> None:
    shutil.copytree(line.root / "latents", tmp_path / "latents")
    plan = read_plan(open_store(str(tmp_path / "latents")))
    (tmp_path / "latents" / "plan.json").write_bytes(
        seal(dataclasses.replace(plan, identity={**plan.identity, "autoencoder": "0" * 64}))
    )
    foreign = line.distillation(str(tmp_path / "run")) | {"latents": str(tmp_path / "latents")}
    with pytest.raises(UserError, match="were not made by the autoencoder of the bundle"):
        distill_decoder.run(as_config(foreign, DistillConfig, tmp_path))
    taken = line.distillation(str(tmp_path / "run"), steps=2) | {"bundle_output": str(made.bundle)}
    with pytest.raises(UserError, match="holds another distilled decoder"):
        distill_decoder.run(as_config(taken, DistillConfig, tmp_path))
    asked = line.generate(tmp_path / "data", decoder="distilled")
    with pytest.raises(UserError, match="has no distilled decoder"):
        generate.run(as_config(asked, GenerateConfig, tmp_path))
    assert not (tmp_path / "data").exists()


def test_asked_to_leave_it_leaves_between_two_files_of_latents(line: Line, tmp_path: Path) -> None:
    config = as_config(line.distillation(str(tmp_path / "run")), DistillConfig, tmp_path)
    asked = iter([Request.NOTHING, Request.LEAVE])
    with pytest.raises(Left):
        fit(TRAINING, config, preempted=lambda: next(asked))
    assert [file.name for file in tmp_path.glob("run/latents-*/*")] == ["train-000000.safetensors"]
