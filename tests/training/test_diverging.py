"""A training that is not finite any more stops at once; what would be refused later is refused before it begins."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from brainsynth.config.training import AutoencoderTrainConfig, DiffusionTrainConfig
from brainsynth.errors import UserError
from brainsynth.stages import train_autoencoder, train_diffusion
from brainsynth.training.autoencoder import TRAINING, AutoencoderTask
from brainsynth.training.checkpoint import checkpoints
from brainsynth.training.data import weights_seed
from brainsynth.training.diverged import Diverged
from brainsynth.training.runner import fit
from tests.line import Line, as_config


def poisoned(
    monkeypatch: pytest.MonkeyPatch, at: int, poison: Callable[[AutoencoderTask, dict[str, Tensor]], None]
) -> None:
    """The autoencoder's step number `at` (from 0) ends with `poison`."""
    plain = AutoencoderTask.step

    def step(self: AutoencoderTask, number: int) -> dict[str, Tensor]:
        values = plain(self, number)
        if number == at:
            poison(self, values)
        return values

    monkeypatch.setattr(AutoencoderTask, "step", step)


def finite(folder: Path) -> bool:
    return all(
        bool(torch.isfinite(tensor).all())
        for _, path in checkpoints(folder)
        for tensor in load_file(path / "tensors.safetensors").values()
        if tensor.is_floating_point()
    )


def stopped(line: Line, folder: Path, tmp_path: Path, **options: Any) -> str:
    config = as_config(line.autoencoder(str(folder), **options), AutoencoderTrainConfig, tmp_path)
    with pytest.raises(Diverged) as caught:
        train_autoencoder.run(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("loss", math.nan), ("gradient_norm", math.inf), ("l1", -math.inf)])
def test_the_first_value_that_is_not_finite_ends_it(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: float
) -> None:
    folder = tmp_path / "run"
    poisoned(monkeypatch, 4, lambda task, values: values.update({name: torch.tensor(value)}))
    said = stopped(line, folder, tmp_path, steps=9, checkpoint_every=2, keep_checkpoints=1)
    assert f"diverged at step 5 of 9: {name} is {value}" in said
    assert "learning rate 0.00" in said
    assert "the last sound checkpoint is step-000004" in said
    assert [step for step, _ in checkpoints(folder)] == [4]
    assert not (folder / "run.json").exists()
    monkeypatch.undo()
    again = stopped(line, folder, tmp_path, steps=9, checkpoint_every=2, keep_checkpoints=1)
    assert said in again
    assert "remove" in again
    (folder / "diverged.json").unlink()  # somebody knows better
    train_autoencoder.run(
        as_config(
            line.autoencoder(str(folder), steps=9, checkpoint_every=2, keep_checkpoints=1),
            AutoencoderTrainConfig,
            tmp_path,
        )
    )
    assert (folder / "run.json").exists()


def test_weights_that_are_not_finite_are_never_saved(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"

    def break_a_weight(task: AutoencoderTask, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            next(task.learner.network.parameters()).fill_(math.inf)

    poisoned(monkeypatch, 5, break_a_weight)
    said = stopped(line, folder, tmp_path, steps=6, checkpoint_every=3, validate_every=100)
    assert "step 6 of 6: module.autoencoder." in said
    assert [step for step, _ in checkpoints(folder)] == [3]
    assert finite(folder)


def test_an_absurd_learning_rate_diverges_before_any_checkpoint(line: Line, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    said = stopped(line, folder, tmp_path, steps=60, learning_rate=1e12, warmup_steps=0, checkpoint_every=1)
    assert "learning_rate (1e+12 now)" in said
    assert finite(folder)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) < 60
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        assert all(math.isfinite(value) for key, value in json.loads(text).items() if key.startswith("train/"))


@pytest.mark.slow
def test_workers_stop_together_and_are_not_started_again(line: Line, ray_cluster: None, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = line.autoencoder(str(folder), steps=60, learning_rate=1e12, warmup_steps=0, checkpoint_every=50)
    config["runtime"] = {"workers": 2, "cpus_per_worker": 0.5, "threads_per_worker": 1, "trackers": []}
    with pytest.raises(Diverged, match="^the training diverged at step"):
        train_autoencoder.run(as_config(config, AutoencoderTrainConfig, tmp_path))


def test_an_autoencoder_is_trained_further_in_a_new_folder(line: Line, tmp_path: Path) -> None:
    first = line.root / "autoencoder"
    more = line.autoencoder(str(tmp_path / "more"), steps=1, learning_rate=1e-12, warmup_steps=0)
    for start in (first, first / "autoencoder.safetensors", first / "checkpoints"):
        config = as_config(more | {"start_from": str(start)}, AutoencoderTrainConfig, tmp_path)
        if start.name == "checkpoints":
            with pytest.raises(UserError, match="start_from: .* holds neither autoencoder.safetensors nor"):
                train_autoencoder.run(config)
            continue
        train_autoencoder.run(config)
    before, after = (
        load_file(first / "autoencoder.safetensors"),
        load_file(tmp_path / "more" / "autoencoder.safetensors"),
    )
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)
    longer = line.autoencoder(steps=12)
    with pytest.raises(UserError, match="name it in start_from"):
        train_autoencoder.run(as_config(longer, AutoencoderTrainConfig, tmp_path))


def test_an_unfinished_training_is_a_start_by_its_newest_checkpoint(line: Line, tmp_path: Path) -> None:
    unfinished = tmp_path / "unfinished"
    config = as_config(line.autoencoder(str(unfinished)), AutoencoderTrainConfig, tmp_path)
    fit(TRAINING, config)
    (unfinished / "autoencoder.safetensors").unlink()
    more = line.autoencoder(str(tmp_path / "more"), steps=1, learning_rate=1e-12, warmup_steps=0)
    train_autoencoder.run(as_config(more | {"start_from": str(unfinished)}, AutoencoderTrainConfig, tmp_path))
    averaged = load_file(unfinished / "checkpoints" / "step-000006" / "tensors.safetensors")
    made = load_file(tmp_path / "more" / "autoencoder.safetensors")
    assert all(torch.allclose(made[name], averaged[f"ema.autoencoder.{name}"], atol=1e-6) for name in made)


@pytest.mark.parametrize("what", ["dataset", "bundle"])
def test_a_training_does_not_write_into_the_folder_of_another_thing(line: Line, tmp_path: Path, what: str) -> None:
    file = {"dataset": "plan.json", "bundle": "bundle.json"}[what]
    (tmp_path / file).write_text("{}")
    config = as_config(line.autoencoder(str(tmp_path)), AutoencoderTrainConfig, tmp_path)
    before = sorted(tmp_path.iterdir())
    for action in (train_autoencoder.run, train_autoencoder.describe):
        with pytest.raises(UserError, match=rf"is the folder of a {what} \({file}\); give another output folder"):
            action(config)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("job", ["autoencoder", "diffusion"])
def test_a_batch_larger_than_the_training_split_is_refused(line: Line, tmp_path: Path, job: str) -> None:
    folder = tmp_path / "run"
    make, cls, stage = {
        "autoencoder": (line.autoencoder, AutoencoderTrainConfig, train_autoencoder),
        "diffusion": (line.diffusion, DiffusionTrainConfig, train_diffusion),
    }[job]
    config = as_config(make(str(folder), batch_size=47), cls, tmp_path)  # type: ignore[operator]
    for action in (stage.run, stage.describe):
        with pytest.raises(UserError, match=r"batch_size 47 is more than the \d+ scans of the training split"):
            action(config)
    assert not folder.exists()


def test_a_batch_that_workers_cannot_share_is_a_mistake_in_the_config(line: Line, tmp_path: Path) -> None:
    config = line.autoencoder() | {"runtime": {"workers": 3}}
    with pytest.raises(UserError, match=r"batch_size 2 must be a multiple of runtime.workers 3"):
        as_config(config, AutoencoderTrainConfig, tmp_path)


def test_seeds_of_any_size_are_other_weights() -> None:
    seeds = [0, 7, 2**32 - 1, 2**32, 2**32 + 7, 2**64, 2**64 + 7, 10**30]
    assert [weights_seed(seed) for seed in seeds[:3]] == seeds[:3]
    assert len({weights_seed(seed) for seed in seeds}) == len(seeds)


def test_a_cohort_too_small_for_a_denoiser_is_refused_unless_none_follows(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("brainsynth.covariates.arrays._MIN_ROWS", 44)
    folder = tmp_path / "run"
    config = line.autoencoder(str(folder), steps=1)
    with pytest.raises(UserError, match=r"(?s)age: \d\d known values, at least 44 are needed.*denoiser_follows: false"):
        train_autoencoder.run(as_config(config, AutoencoderTrainConfig, tmp_path))
    assert not folder.exists()
    with pytest.raises(UserError, match="at least 44 are needed"):
        train_diffusion.describe(as_config(line.diffusion(str(folder)), DiffusionTrainConfig, tmp_path))
    alone = as_config(config | {"denoiser_follows": False}, AutoencoderTrainConfig, tmp_path)
    train_autoencoder.run(alone)
    assert dataclasses.replace(alone, denoiser_follows=True) != alone
    assert (folder / "run.json").exists()
