"""A pyramid in place of the autoencoder, through the real jobs: trained, exported, generated from, made again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import avg_pool3d

from brainsynth import open_dataset
from brainsynth.bundle.files import read_bundle
from brainsynth.config.architectures import PyramidArchitecture, UpsamplerArchitecture
from brainsynth.config.distillation import DistillConfig
from brainsynth.config.schema import EncodeConfig, ExportConfig, GenerateConfig
from brainsynth.config.training import AutoencoderTrainConfig, CropsConfig, DiffusionTrainConfig
from brainsynth.errors import UserError
from brainsynth.gate.file import load_bundle_gate
from brainsynth.models.loading import load_models
from brainsynth.stages import (
    distill_decoder,
    encode_latents,
    export_bundle,
    generate,
    train_autoencoder,
    train_diffusion,
)
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import open_store
from brainsynth.training.autoencoder import TRAINING
from brainsynth.training.crops import Crops
from brainsynth.training.preemption import Left, Request
from brainsynth.training.runner import fit
from tests.integration.test_line import records
from tests.integration.test_regenerate import brainsynth
from tests.integration.test_training import curve
from tests.line import Line, as_config

LOCAL = {"workers": 0, "threads_per_worker": 1}


@pytest.fixture(scope="module")
def pyramid(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundle of a tiny pyramid, trained on the line's cohort."""
    root = tmp_path_factory.mktemp("pyramid")
    places = {"autoencoder": str(root / "autoencoder")}
    train_autoencoder.run(as_config(line.pyramid(str(root / "autoencoder")), AutoencoderTrainConfig, root))
    latents = line.latents() | places | {"output": str(root / "latents")}
    encode_latents.run(as_config(latents, EncodeConfig, root))
    denoiser = line.diffusion(str(root / "diffusion"), kind="gaussian") | places | {"latents": latents["output"]}
    train_diffusion.run(as_config(denoiser, DiffusionTrainConfig, root))
    export_bundle.run(as_config(line.bundle(str(root / "diffusion"), str(root / "bundle")), ExportConfig, root))
    return root


def made(line: Line, pyramid: Path, folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = line.generate(folder / "data", **changes) | {"bundle": str(pyramid / "bundle")}
    generate.run(as_config(config, GenerateConfig, folder))
    return folder / "data"


def test_latents_are_the_averages_of_the_scans(line: Line, pyramid: Path) -> None:
    scans, latents = open_dataset(str(line.root / "cohort")), open_dataset(str(pyramid / "latents"), array="mean")
    scan = scans.volume(3)
    x, y, z = (size // 4 for size in scan.shape)
    averages = scan.reshape(x, 4, y, 4, z, 4).mean((1, 3, 5))
    np.testing.assert_allclose(latents.volume(3)[0], averages, atol=1e-6)
    assert read_bundle(pyramid / "bundle").latents.shape_cxyz == (1, x, y, z)


def test_a_row_is_the_same_volume_in_every_micro_batch_and_alone(line: Line, pyramid: Path, tmp_path: Path) -> None:
    one, four = (made(line, pyramid, tmp_path / str(size), runtime={**LOCAL, "micro_batch": size}) for size in (1, 4))
    first, second = open_dataset(str(one)).volumes(), open_dataset(str(four)).volumes()
    assert np.abs(first - second).max() <= 2.0**-11  # the denoiser's rounding; the decoder takes one at a time
    rounded = open_dataset(str(made(line, pyramid, tmp_path / "bfloat16", precision="bfloat16"))).volumes()
    assert 0 < np.abs(rounded - first).mean() < 0.02  # the denoiser's
    done = brainsynth("regenerate", four, "--bundle", pyramid / "bundle", "--random", "12")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 of 12 rows have the voxels that their records name" in done.stdout


def test_noise_of_the_decoder_is_the_seeds_and_covariates_count(pyramid: Path) -> None:
    spec = read_bundle(pyramid / "bundle")
    autoencoder, _ = load_models(pyramid / "bundle", spec, torch.device("cpu"), rewrites=True)
    for stage in autoencoder.network.stages:  # a tiny training leaves it near zero
        torch.nn.init.normal_(stage.last.weight, std=0.1)
        torch.nn.init.normal_(stage.blocks[0].narrow.weight, std=0.1)
        torch.nn.init.normal_(stage.blocks[0].modulation.weight, std=1.0)
    z = torch.rand(1, *spec.latents.shape_cxyz).expand(3, -1, -1, -1, -1)
    context = torch.rand(1, spec.covariates.context_size).expand(3, -1)
    same, other, again = autoencoder.decode(z, context, [5, 6, 5])
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    assert not torch.equal(autoencoder.decode(z, 1 - context, [5, 6, 5])[0], same)
    assert torch.equal(autoencoder.decode(z[1:2], context[:1], [6])[0], other)
    assert torch.equal(autoencoder.decode(z[:1], context[:1]), autoencoder.decode(z[:1], context[:1]))
    with pytest.raises(ValueError, match="covariates"):
        autoencoder.decode(z)


def test_left_and_resumed_training_is_the_undisturbed_one(line: Line, pyramid: Path, tmp_path: Path) -> None:
    asked: Iterator[Request] = iter([Request.NOTHING] * 3 + [Request.LEAVE] * 9)
    config = as_config(line.pyramid(str(tmp_path / "resumed")), AutoencoderTrainConfig, tmp_path)
    with pytest.raises(Left):
        fit(TRAINING, config, preempted=lambda: next(asked))
    fit(TRAINING, config)
    assert curve(tmp_path / "resumed") == curve(pyramid / "autoencoder")
    resumed, undisturbed = (
        load_file(p / "autoencoder.safetensors") for p in (tmp_path / "resumed", pyramid / "autoencoder")
    )
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)
    names = {name for line in curve(tmp_path / "resumed") for name in line}
    assert {"train/adversarial", "train/matching", "train/discriminator", "train/penalty"} <= names
    assert {"validation/critic_gap_train", "validation/critic_gap_validation", "validation/sharpness_ratio"} <= names


def test_start_from_begins_with_those_weights(line: Line, pyramid: Path, tmp_path: Path) -> None:
    config = line.pyramid(str(tmp_path / "further"), steps=1, learning_rate=1e-12)
    config["start_from"] = str(pyramid / "autoencoder")
    train_autoencoder.run(as_config(config, AutoencoderTrainConfig, tmp_path))
    before, after = (load_file(p / "autoencoder.safetensors") for p in (pyramid / "autoencoder", tmp_path / "further"))
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crops": {"balance": "age"}}, "crops.balance: 'age' is not a binary or categorical covariate"),
        ({"crops": {"balance": "site"}}, "it has sex"),
        ({"losses": {"perceptual_weight": 0.0}}, "losses.kl_weight must be 0 with architecture.kind: pyramid"),
        ({"losses": {"kl_weight": 0.0}}, "losses.perceptual_weight must be 0"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(
    line: Line, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    config = line.pyramid(str(tmp_path / "refused")) | change
    with pytest.raises(UserError, match=message):
        train_autoencoder.run(as_config(config, AutoencoderTrainConfig, tmp_path))
    assert not (tmp_path / "refused").exists()


def test_crops_are_for_pyramids_and_a_pyramid_is_not_distilled(line: Line, pyramid: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="crops is for architecture.kind: pyramid"):
        as_config(line.autoencoder() | {"crops": {}}, AutoencoderTrainConfig, tmp_path)
    config = line.distillation(str(tmp_path / "light")) | {"bundle": str(pyramid / "bundle"), "latents": None}
    config["generated"]["share"] = 1.0
    with pytest.raises(UserError, match="is a pyramid, which draws from noise and covariates"):
        distill_decoder.run(as_config(config, DistillConfig, tmp_path))


def test_a_decoder_that_was_trained_further_takes_the_place_of_the_first(
    line: Line, pyramid: Path, tmp_path: Path
) -> None:
    further = line.pyramid(str(tmp_path / "further"), steps=2) | {"start_from": str(pyramid / "autoencoder")}
    train_autoencoder.run(as_config(further, AutoencoderTrainConfig, tmp_path))
    config = line.bundle(str(pyramid / "diffusion"), str(tmp_path / "bundle")) | {
        "autoencoder": str(tmp_path / "further")
    }
    export_bundle.run(as_config(config | {"weights": "float16"}, ExportConfig, tmp_path))
    first, second = read_bundle(pyramid / "bundle"), read_bundle(tmp_path / "bundle")
    stored, trained = (load_file(p / "autoencoder.safetensors") for p in (tmp_path / "bundle", tmp_path / "further"))
    assert all(torch.equal(stored[name], trained[name].half()) for name in trained)
    assert second.provenance["autoencoder_l1"] != first.provenance["autoencoder_l1"]
    made(line, tmp_path, tmp_path / "generated", covariates={"draw": 3})
    other = line.bundle(str(line.root / "diffusion"), str(tmp_path / "other")) | {
        "autoencoder": str(tmp_path / "further")
    }
    with pytest.raises(UserError, match="only a pyramid may take the place of another one"):
        export_bundle.run(as_config(other, ExportConfig, tmp_path))
    assert not (tmp_path / "other").exists()


def test_the_gate_learns_from_what_the_pyramid_makes_of_scans(line: Line, pyramid: Path, tmp_path: Path) -> None:
    config = line.bundle(str(pyramid / "diffusion"), str(tmp_path / "bundle"))
    for name, reference in (("bundle", "reconstructions"), ("sharp", "scans")):
        fitted = config | {"output": str(tmp_path / name)}
        fitted |= {"gate": {"cohort": str(line.root / "cohort"), "reference": reference}}
        export_bundle.run(as_config(fitted, ExportConfig, tmp_path))
    gates = [load_bundle_gate(tmp_path / name, read_bundle(tmp_path / name)) for name in ("bundle", "sharp")]
    assert not np.allclose(gates[0].envelope, gates[1].envelope)
    root = made(line, tmp_path, tmp_path / "generated", covariates={"draw": 6}, gate={"max_attempts": 2})
    statuses = [status for _, _, status in records(root)]
    assert len(statuses) == 6
    assert set(statuses) <= {"ok", "rejected"}


def test_crops_are_where_their_places_say_at_every_phase(line: Line) -> None:
    architecture = PyramidArchitecture(
        kind="pyramid", stages=(UpsamplerArchitecture(width=8),) * 2, intensity_scale=1.5
    )
    dataset = open_dataset(str(line.root / "cohort"), split="train")
    schema = read_plan(open_store(str(line.root / "cohort"))).covariates
    crops = Crops(dataset, schema, architecture, CropsConfig(cells=4, balance="sex"), mirror=False)
    torch.manual_seed(0)
    scans = crops.indices(16, 0, 0)
    coarse, fine = crops.batches(scans)
    phases = set()
    for batch, factor in ((coarse, 4), (fine, 2)):
        torch.testing.assert_close(batch.coarse, avg_pool3d(batch.target, 2))
        exact = batch.level == 0
        assert torch.equal(batch.degraded[exact], batch.coarse[exact])
        assert 0 < int(exact.sum()) < 16
        grid = [size // factor for size in dataset.volume(0).shape]
        for number, place in enumerate(batch.places[:, [0, 2, 3], 0, 0, 0].numpy()):
            origin = [round(((p + 1) / 2 * n - 0.5) * factor) for p, n in zip(place, grid, strict=True)]
            phases.add((factor, origin[0] % factor))
            cut = tuple(slice(o, o + 4 * factor) for o in origin)
            voxels = torch.from_numpy(dataset.volume(int(scans[number]))[cut])[None, None] * 1.5
            target = voxels if factor == 2 else avg_pool3d(voxels, 2)
            torch.testing.assert_close(batch.target[number : number + 1], target)
    assert phases == {(4, 0), (4, 1), (4, 2), (4, 3), (2, 0), (2, 1)}
    sexes = dataset.table["sex"].to_numpy()[crops.order]
    assert (sexes == "F").sum() == (sexes == "M").sum() >= len(dataset) / 2
