"""The trainings: exact resume, damaged checkpoints, every prediction, data-parallel workers, perceptual weights."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets import resnet10
from safetensors.torch import load_file, save_file

from brainsynth.bundle.files import read_bundle
from brainsynth.config.distillation import DistillConfig
from brainsynth.config.schema import EncodeConfig, ExportConfig, GenerateConfig
from brainsynth.config.training import AutoencoderTrainConfig, DiffusionTrainConfig
from brainsynth.errors import UserError
from brainsynth.reading.dataset import open_dataset
from brainsynth.records import seal
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
from brainsynth.training.checkpoint import checkpoints
from brainsynth.training.losses import PerceptualLoss, gradient_difference, kl_divergence
from brainsynth.training.preemption import Request
from brainsynth.training.runner import fit
from brainsynth.training.runs import DenoiserRun, DiffusionRun, read_run, write_run
from tests.line import Line, as_config, write_yaml

REPO = Path(__file__).parents[2]
STEPS = {"steps": 40, "checkpoint_every": 5, "validate_every": 20}


def curve(folder: Path) -> list[dict[str, float]]:
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def kill_at(job: str, config: Path, folder: Path, step: int) -> int:
    """Start a training job, SIGKILL it once the checkpoint of `step` is there; returns the newest checkpoint's step."""
    process = subprocess.Popen(
        [sys.executable, str(REPO / "jobs" / job), "--config", str(config)], start_new_session=True, cwd=REPO
    )
    deadline = time.monotonic() + 180
    while not (folder / "checkpoints" / f"step-{step:06d}").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "run.json").exists(), "the kill came too late to test anything"
    return max(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("unet", "transformer")]


@pytest.mark.parametrize("kind", ["gaussian", "decoder", *SLOW])
def test_killed_training_goes_on_with_an_identical_curve(line: Line, tmp_path: Path, kind: str) -> None:
    """All denoisers' and the distilled decoder's; tests/chaos kills the autoencoder's."""
    job, weights_file, cls = "train_diffusion.py", "diffusion.safetensors", DiffusionTrainConfig
    stage, make = train_diffusion.run, functools.partial(line.diffusion, kind=kind)
    if kind == "decoder":
        job, weights_file, cls = "distill_decoder.py", "decoder.safetensors", DistillConfig
        stage, make = distill_decoder.run, line.distillation
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    threads = {"workers": 0, "threads_per_worker": 1, "trackers": []}
    stage(as_config(make(str(undisturbed), **STEPS) | {"runtime": threads}, cls, tmp_path))
    config = write_yaml(make(str(killed), **STEPS) | {"runtime": threads}, tmp_path, "killed.yaml")
    reached = kill_at(job, config, killed, 10)
    assert 10 <= reached < 40
    stage(as_config(make(str(killed), **STEPS) | {"runtime": threads}, cls, tmp_path))
    assert curve(killed) == curve(undisturbed)
    weights = load_file(killed / weights_file)
    for name, tensor in load_file(undisturbed / weights_file).items():
        assert torch.equal(weights[name], tensor), name


def test_damaged_newest_checkpoint_falls_back(line: Line, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    config = as_config(line.autoencoder(str(folder)), AutoencoderTrainConfig, tmp_path)
    train_autoencoder.run(config)
    before = load_file(folder / "autoencoder.safetensors")
    (folder / "run.json").unlink()
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1] / "tensors.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    train_autoencoder.run(config)
    assert "checkpoint step-000006 is damaged and is passed over" in caplog.text
    after = load_file(folder / "autoencoder.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_another_config_is_refused(line: Line, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train_autoencoder.run(as_config(line.autoencoder(str(folder)), AutoencoderTrainConfig, tmp_path))
    other = as_config(line.autoencoder(str(folder), seed=9), AutoencoderTrainConfig, tmp_path)
    with pytest.raises(UserError, match="another config"):
        train_autoencoder.run(other)
    (folder / "run.json").unlink()
    with pytest.raises(UserError, match="another config"):
        train_autoencoder.run(other)


@pytest.mark.parametrize(
    ("prediction", "method", "denoiser"),
    [("epsilon", "ddpm", "unet"), ("v", "unipc", "unet"), ("flow", "euler", "unet"), ("flow", "ab2", "transformer")],
)
def test_every_prediction_trains_and_generates(
    line: Line, tmp_path: Path, prediction: str, method: str, denoiser: str
) -> None:
    name = str(tmp_path / "diffusion")
    training = line.diffusion(name, prediction, denoiser)
    if prediction == "v":
        training["schedule"]["zero_terminal_snr"] = True
    train_diffusion.run(as_config(training, DiffusionTrainConfig, tmp_path))
    bins = [key for key in curve(Path(name))[-1] if key.startswith("validation/loss_t")]
    assert len(bins) == 5
    export_bundle.run(as_config(line.bundle(name, str(tmp_path / "bundle")), ExportConfig, tmp_path))
    config = line.generate(
        tmp_path / "generated",
        bundle=str(tmp_path / "bundle"),
        sampler={"method": method, "steps": 3, "guidance_scale": 1.5},
    )
    generate.run(as_config(config, GenerateConfig, tmp_path))


def test_the_line_for_small_cohorts_trains_and_generates(line: Line, tmp_path: Path) -> None:
    """Patches, mirrored scans, half whitening, and the Gaussian denoiser, which hardly needs its network here."""
    training = line.autoencoder(str(tmp_path / "autoencoder"))
    training["architecture"] = {"kind": "patch", "patch": 4, "latent_channels": 4, "width": 8, "blocks": 1}
    training["losses"] |= {"kl_weight": 0.0, "square_weight": 1.0}
    train_autoencoder.run(as_config(training, AutoencoderTrainConfig, tmp_path))
    latents = line.latents() | {"autoencoder": str(tmp_path / "autoencoder"), "output": str(tmp_path / "latents")}
    encode_latents.run(as_config(latents | {"mirror": True, "whitening": 0.5}, EncodeConfig, tmp_path))
    plain, mirror = open_dataset(line.root / "cohort", split="train"), open_dataset(tmp_path / "latents", split="train")
    assert len(mirror) == 2 * len(plain)
    ids = set(plain.sample_ids)
    assert set(mirror.sample_ids) == ids | {f"{name}mirrored" for name in ids}
    assert len(open_dataset(tmp_path / "latents", split="validation")) == len(
        open_dataset(line.root / "cohort", split="validation")
    )
    training = line.diffusion(str(tmp_path / "diffusion"), kind="gaussian")
    training["schedule"] |= {"logit_mean": -0.5}
    training |= {"latents": str(tmp_path / "latents"), "autoencoder": str(tmp_path / "autoencoder")}
    train_diffusion.run(as_config(training, DiffusionTrainConfig, tmp_path))
    first = next(row for row in curve(tmp_path / "diffusion") if "validation/loss" in row)
    assert first["validation/loss"] < 3, "in units of what the Gaussian model leaves open"
    bundle = line.bundle(str(tmp_path / "diffusion"), str(tmp_path / "bundle"))
    export_bundle.run(as_config(bundle, ExportConfig, tmp_path))
    half = bundle | {"output": str(tmp_path / "half"), "weights": "float16"}
    for _ in range(2):  # harmless to repeat
        export_bundle.run(as_config(half, ExportConfig, tmp_path))
    for name in ("bundle", "half"):
        config = line.generate(tmp_path / f"from-{name}", bundle=str(tmp_path / name))
        generate.run(as_config(config, GenerateConfig, tmp_path))
    config = line.generate(tmp_path / "in-bfloat16", bundle=str(tmp_path / "bundle"), precision="bfloat16")
    generate.run(as_config(config, GenerateConfig, tmp_path))
    images, rounded = (open_dataset(tmp_path / f"from-{name}").volumes() for name in ("bundle", "half"))
    short = open_dataset(tmp_path / "in-bfloat16").volumes()
    assert 0 < np.abs(images - short).max() < 0.1
    background = images == 0
    assert np.abs(short[background]).mean() < 1e-3, "what the decoder leaves in the background is not rounded"
    assert 0 < np.abs(images - rounded).max() < 0.02
    sizes = [(tmp_path / name / "diffusion.safetensors").stat().st_size for name in ("bundle", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    real = open_dataset(line.root / "cohort", split="train").volumes()
    near = np.corrcoef(images.mean(0).ravel(), real.mean(0).ravel())[0, 1]
    assert near > 0.9, "the Gaussian model alone knows the mean brain"


def test_a_denoiser_goes_on_from_another_ones_weights(line: Line, tmp_path: Path) -> None:
    first = line.diffusion(str(tmp_path / "first"), kind="gaussian")
    train_diffusion.run(as_config(first, DiffusionTrainConfig, tmp_path))
    weights = tmp_path / "first" / "diffusion.safetensors"
    second = line.diffusion(str(tmp_path / "second"), kind="gaussian", steps=1, warmup_steps=0, learning_rate=1e-9)
    second |= {
        "start_from": str(weights),
        "architecture": second["architecture"] | {"finest_blocks": 2, "crossed": "sex", "rank": 3},
    }
    train_diffusion.run(as_config(second, DiffusionTrainConfig, tmp_path))
    before, after = (load_file(tmp_path / name / "diffusion.safetensors") for name in ("first", "second"))
    assert set(before) < set(after)
    fitted = "gaussian.latents."  # again, with other slopes for each sex
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before if fitted not in name)
    assert f"{fitted}product_map" in after
    steeper = second | {"emphasis": {"age": 1.5}, "output": str(tmp_path / "steeper")}
    train_diffusion.run(as_config(steeper, DiffusionTrainConfig, tmp_path))
    emphasised = load_file(tmp_path / "steeper" / "diffusion.safetensors")
    slopes = [part[f"{fitted}mean_map"][1] for part in (after, emphasised)]
    assert torch.allclose(slopes[1], 1.5 * slopes[0], atol=1e-6)
    with pytest.raises(UserError, match="emphasis: 'sex' is not a continuous covariate"):
        train_diffusion.run(as_config(steeper | {"emphasis": {"sex": 1.5}}, DiffusionTrainConfig, tmp_path))
    train_diffusion.run(as_config(second, DiffusionTrainConfig, tmp_path))  # finished: nothing to do
    weights.write_bytes((tmp_path / "second" / "diffusion.safetensors").read_bytes())
    with pytest.raises(UserError, match="another config"):
        train_diffusion.run(as_config(second, DiffusionTrainConfig, tmp_path))
    unknown = second | {"architecture": second["architecture"] | {"crossed": "age"}, "output": str(tmp_path / "third")}
    with pytest.raises(UserError, match="architecture.crossed: 'age' is not a binary covariate"):
        train_diffusion.run(as_config(unknown, DiffusionTrainConfig, tmp_path))
    lost = second | {"start_from": str(tmp_path / "nowhere"), "output": str(tmp_path / "third")}
    with pytest.raises(UserError, match="start_from"):
        train_diffusion.run(as_config(lost, DiffusionTrainConfig, tmp_path))
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": {"prediction": "v"}}, "needs schedule.prediction: flow"),
        ({"schedule": {"prediction": "v", "logit_mean": 0.5}}, "logit_mean and logit_std are for prediction: flow"),
        ({"schedule": {"prediction": "flow", "logit_std": 0.0}}, "logit_std above 0"),
    ],
)
def test_a_gaussian_denoiser_is_for_flow(line: Line, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        as_config(line.diffusion(kind="gaussian") | change, DiffusionTrainConfig, tmp_path)


def test_figures_and_scalars_are_written(line: Line) -> None:
    for kind in ("autoencoder", "diffusion"):
        events = list((line.root / kind / "tensorboard").glob("events*"))
        assert events
        data = b"".join(path.read_bytes() for path in events)
        assert b"train/loss" in data
        assert b"PNG" in data


def test_data_parallel_workers_train_one_model(line: Line, ray_cluster: None, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".stop-of-an-earlier-run").touch()
    config: dict[str, Any] = line.autoencoder(str(folder), steps=4, validate_every=4, checkpoint_every=4)
    config["runtime"] = {"workers": 2, "cpus_per_worker": 0.5, "threads_per_worker": 1, "trackers": []}
    train_autoencoder.run(as_config(config, AutoencoderTrainConfig, tmp_path))
    assert (folder / "run.json").exists()
    assert [row["step"] for row in curve(folder) if "train/loss" in row] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_mistake_that_only_a_worker_sees_reads_the_same(line: Line, ray_cluster: None, tmp_path: Path) -> None:
    config = line.autoencoder(seed=9)
    config["runtime"] = {"workers": 1, "cpus_per_worker": 0.5, "threads_per_worker": 1, "max_failures": 0}
    with pytest.raises(UserError, match="^[^\n]*holds a finished training with another config[^\n]*$"):
        train_autoencoder.run(as_config(config, AutoencoderTrainConfig, tmp_path))


def test_asked_to_save_a_training_saves_at_once_and_goes_on(line: Line, tmp_path: Path) -> None:
    """A machine that will go is no reason to stop: whoever asked starts the workers again if they die."""
    folder, calls, seen = tmp_path / "run", iter(range(100)), []

    def preempted() -> Request:
        step = next(calls)
        seen.append([at for at, _ in checkpoints(folder)])
        return Request.SAVE if step in (0, 3) else Request.NOTHING

    fit(
        TRAINING,
        as_config(line.autoencoder(str(folder), checkpoint_every=5), AutoencoderTrainConfig, tmp_path),
        preempted=preempted,
    )
    assert seen[:5] == [[], [], [], [], [3]], "who asks for it gets it before the next step"
    assert seen[5] in ([3], [3, 5]), "the others are written meanwhile"
    assert [at for at, _ in checkpoints(folder)] == [3, 5, 6]
    assert (folder / "run.json").exists()


def test_lost_weights_of_a_finished_training_are_made_again(
    line: Line, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    config = as_config(line.diffusion(str(folder)), DiffusionTrainConfig, tmp_path)
    train_diffusion.run(config)
    files = [folder / name for name in ("diffusion.safetensors", "autoencoder.safetensors")]
    before = [file.read_bytes() for file in files]
    for file in files:
        file.write_bytes(b"")
        train_diffusion.run(config)
        assert f"{file} is missing or damaged" in caplog.text
        assert [file.read_bytes() for file in files] == before
    caplog.set_level("INFO")
    train_diffusion.run(config)
    assert "already trained" in caplog.text


def test_a_training_of_an_earlier_version_is_finished_and_exported(
    line: Line, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It left a DiffusionRun: the record of a bundle that had no name yet."""
    folder, wanted = tmp_path / "diffusion", read_bundle(line.root / "bundle")
    shutil.copytree(line.root / "diffusion", folder)
    run = read_run(folder, DenoiserRun, "train-diffusion")
    unnamed = dataclasses.replace(wanted, name="unreleased", licence="unreleased", training_data="unreleased")
    write_run(folder, DiffusionRun(config_digest=run.config_digest, bundle=unnamed, metrics=run.metrics, elapsed_s=1.0))
    caplog.set_level("INFO")
    train_diffusion.run(as_config(line.diffusion(str(folder)), DiffusionTrainConfig, tmp_path))
    assert f"already trained: {folder}" in caplog.text
    export_bundle.run(as_config(line.bundle(str(folder), str(tmp_path / "bundle")), ExportConfig, tmp_path))
    assert read_bundle(tmp_path / "bundle") == wanted


def test_perceptual_loss_needs_fitting_local_weights(line: Line, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = resnet10(spatial_dims=3, n_input_channels=1, num_classes=1, feed_forward=False, bias_downsample=False)
    path = tmp_path / "resnet.safetensors"
    save_file({f"module.{name}": tensor for name, tensor in network.state_dict().items()}, path)
    loss = PerceptualLoss(path, 10)
    x = torch.rand(1, 1, 24, 24, 24)
    assert float(loss(x, x)) == pytest.approx(0.0, abs=1e-6)
    assert float(loss(x, torch.rand_like(x))) > 1e-3
    with pytest.raises(UserError, match="does not fit a 3D ResNet-18"):
        PerceptualLoss(path, 18)
    with pytest.raises(UserError, match="nowhere.pth is missing"):
        PerceptualLoss(tmp_path / "nowhere.pth", 10)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"losses": {"perceptual_weights": "/nowhere/resnet.pth"}}, "there is no file /nowhere/resnet.pth"),
        ({"architecture": {"channels": [8] * 6, "latent_channels": 2, "norm_groups": 4}}, "must be a multiple of 32"),
        ({"cohort": "/nowhere"}, "is not a brainsynth dataset"),
    ],
)
def test_training_refuses_before_it_starts(line: Line, tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    config = line.autoencoder(str(tmp_path / "run")) | change
    with pytest.raises(UserError, match=re.escape(expected)):
        train_autoencoder.run(as_config(config, AutoencoderTrainConfig, tmp_path))
    assert not (tmp_path / "run").exists()


def test_conditioning_dropout_needs_a_null_context(line: Line, tmp_path: Path) -> None:
    plan = read_plan(open_store(str(line.root / "latents")))
    refusing = dataclasses.replace(plan, covariates=dataclasses.replace(plan.covariates, missing="refuse"))
    shutil.copytree(line.root / "latents", tmp_path / "latents")
    (tmp_path / "latents" / "plan.json").write_bytes(seal(refusing))
    config = line.diffusion(str(tmp_path / "run")) | {"latents": str(tmp_path / "latents")}
    with pytest.raises(UserError, match="conditioning_dropout must be 0"):
        train_diffusion.run(as_config(config, DiffusionTrainConfig, tmp_path))


def test_kl_matches_torch() -> None:
    mu, sigma = torch.randn(3, 2, 4, 4, 4), torch.rand(3, 2, 4, 4, 4) + 0.1
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mu, sigma), normal(0.0, 1.0)).flatten(1).sum(1).mean()
    assert torch.allclose(kl_divergence(mu, sigma), expected, rtol=1e-5)


def test_gradient_difference_is_that_of_each_resolution() -> None:
    x, y = torch.rand(2, 2, 1, 8, 10, 12)
    assert float(gradient_difference(x, x, 3)) == 0
    assert torch.allclose(gradient_difference(x, x + 0.3, 3), torch.zeros(()), atol=1e-6)  # edges, not brightness
    terms = []
    for image, other in ((x, y), (torch.nn.functional.avg_pool3d(x, 2), torch.nn.functional.avg_pool3d(y, 2))):
        for axis in (2, 3, 4):
            far, near = image.diff(dim=axis), other.diff(dim=axis)
            terms.append(float((far - near).abs().mean()))
    assert float(gradient_difference(x, y, 2)) == pytest.approx(sum(terms) / 6, rel=1e-5)
    assert torch.equal(gradient_difference(x, y, 3), gradient_difference(x, y, 5))  # a 2-voxel axis is not halved
