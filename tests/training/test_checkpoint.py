"""Checkpoints: which one is resumed, what is passed over, and that a failed load changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from brainsynth.config.training import DiffusionTrainConfig
from brainsynth.errors import UserError
from brainsynth.records import seal, unseal
from brainsynth.stages import train_diffusion
from brainsynth.storage import whole_file
from brainsynth.storage.whole_file import file_sha256
from brainsynth.training import checkpoint
from brainsynth.training import state as training_state
from brainsynth.training.checkpoint import CheckpointRecord, checkpoints, restore_newest, save_checkpoint
from brainsynth.training.ema import Ema
from brainsynth.training.state import room_for
from tests.chaos.checkpoint_saver import DIGEST, fill, make_state
from tests.line import Line, as_config

WIDTH = 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A training with checkpoints of steps 1, 2 and 3."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    return tmp_path


def save(folder: Path, step: int, keep: int = 3) -> Path:
    state = make_state(WIDTH)
    fill(state, step)
    return save_checkpoint(folder, state, step, DIGEST, keep)


def restored(folder: Path) -> int:
    """The step that is restored, exactly."""
    state, expected = make_state(WIDTH), make_state(WIDTH)
    fill(state, 77)
    step = restore_newest(folder, state, DIGEST)
    fill(expected, step or 77)
    found = state.tensors()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.tensors().items())
    return step


def steps(folder: Path) -> list[int]:
    return [step for step, _ in checkpoints(folder)]


def rewrite(path: Path, **changes: Any) -> None:
    """Another record, well sealed."""
    file = path / "checkpoint.json"
    saved = unseal(CheckpointRecord, file.read_bytes(), "it")
    values = {name: getattr(saved, name) for name in CheckpointRecord.__slots__}  # type: ignore[attr-defined]
    file.write_bytes(seal(CheckpointRecord(**values | changes)))


def retensor(path: Path, change: Any) -> None:
    """Other tensors, with the right digest in the record."""
    file = path / "tensors.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    rewrite(path, tensors_sha256=file_sha256(file))


def test_the_largest_step_is_the_newest_not_the_last_name(tmp_path: Path) -> None:
    for step in (999_998, 999_999, 1_000_000):
        save(tmp_path, step, keep=2)
    assert steps(tmp_path) == [999_999, 1_000_000]
    assert restored(tmp_path) == 1_000_000


def half_copied(path: Path) -> None:
    (path / "checkpoint.json").unlink()


def emptied(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def no_tensors(path: Path) -> None:
    (path / "tensors.safetensors").unlink()


def huge_record(path: Path) -> None:
    with open(path / "checkpoint.json", "r+b") as handle:
        handle.truncate(1 << 40)  # a hole: nothing on the disk, all of the memory


def deep_record(path: Path) -> None:
    (path / "checkpoint.json").write_text("[" * 500_000)


def long_number(path: Path) -> None:
    (path / "checkpoint.json").write_text('{"record": ' + "9" * 100_000 + ', "sha256": ""}')


def record_is_a_pipe(path: Path) -> None:
    (path / "checkpoint.json").unlink()
    os.mkfifo(path / "checkpoint.json")


def record_is_a_folder(path: Path) -> None:
    (path / "checkpoint.json").unlink()
    (path / "checkpoint.json").mkdir()


def record_of_another_step(path: Path) -> None:
    rewrite(path, step=99)


def field_too_many(path: Path) -> None:
    file = path / "checkpoint.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"__class__": "os.system"}))


@pytest.mark.parametrize(
    "harm",
    [half_copied, emptied, no_tensors, huge_record, deep_record, long_number, record_is_a_pipe, record_is_a_folder,
     record_of_another_step, field_too_many],
)  # fmt: skip
def test_a_damaged_one_is_named_and_passed_over(folder: Path, harm: Any, caplog: pytest.LogCaptureFixture) -> None:
    harm(folder / "checkpoints" / "step-000003")
    assert restored(folder) == 2
    assert "checkpoint step-000003 is damaged and is passed over" in caplog.text


def short(tensors: dict[str, torch.Tensor]) -> None:
    tensors["ema.network.weight"] = torch.zeros(1)


def less(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["optimizer.network.1.exp_avg"]


def more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["optimizer.network.9.step"] = torch.zeros(())


def other_type(tensors: dict[str, torch.Tensor]) -> None:
    tensors["module.network.bias"] = tensors["module.network.bias"].half()


def nothing(tensors: dict[str, torch.Tensor]) -> None:
    tensors.clear()


@pytest.mark.parametrize("change", [short, less, more, other_type, nothing])
def test_what_does_not_fit_is_passed_over_whole(folder: Path, change: Any, caplog: pytest.LogCaptureFixture) -> None:
    retensor(folder / "checkpoints" / "step-000003", change)
    assert restored(folder) == 2
    assert "checkpoint step-000003 does not fit the network" in caplog.text


@pytest.mark.parametrize("changes", [{"ema_updates": {}}, {"optimizer_groups": {}}, {"ema_updates": {"network": -1}}])
def test_a_record_that_does_not_fit_is_passed_over(folder: Path, changes: dict[str, Any]) -> None:
    rewrite(folder / "checkpoints" / "step-000003", **changes)
    assert restored(folder) == 2


def test_settings_in_a_record_are_not_believed(folder: Path) -> None:
    group = {"params": [0, 1], "lr": 1e9, "betas": "evil"}
    rewrite(folder / "checkpoints" / "step-000003", optimizer_groups={"network": [group]})
    state = make_state(WIDTH)
    assert restore_newest(folder, state, DIGEST) == 3
    assert state.optimizers["network"].param_groups[0]["betas"] == (0.9, 0.999)


def test_when_none_fits_nothing_is_started_over(folder: Path) -> None:
    with pytest.raises(UserError, match="none fits the network"):
        restore_newest(folder, make_state(WIDTH + 1), DIGEST)


def test_a_damaged_one_of_another_config_hides_nothing(folder: Path) -> None:
    newest = folder / "checkpoints" / "step-000003"
    rewrite(newest, config_digest="another")
    with pytest.raises(UserError, match=r"another config \(checkpoint step-000003\)"):
        restored(folder)
    (newest / "tensors.safetensors").write_bytes(b"")
    assert restored(folder) == 2
    with pytest.raises(UserError, match=r"another config \(checkpoint step-000002\)"):
        restore_newest(folder, make_state(WIDTH), "another")


def test_all_damaged_starts_over(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _, path in checkpoints(folder):
        emptied(path)
    assert restored(folder) == 0
    assert caplog.text.count("is damaged") == 3


def test_a_later_damaged_one_does_not_crowd_out_what_is_saved(folder: Path) -> None:
    no_tensors(folder / "checkpoints" / "step-000003")
    (folder / "checkpoints" / "step-000003").rename(folder / "checkpoints" / "step-000009")
    save(folder, 4, keep=1)
    assert steps(folder) == [4, 9]
    assert restored(folder) == 4
    save(folder, 9, keep=1)
    assert steps(folder) == [9]
    assert restored(folder) == 9


def test_other_names_are_left_alone(folder: Path) -> None:
    root = folder / "checkpoints"
    (root / "step-final").mkdir()
    (root / "step-000004").write_text("a file")
    (root / "step-000005").symlink_to(root / "step-000001")
    save(folder, 6, keep=1)
    assert sorted(path.name for path in root.iterdir()) == ["step-000004", "step-000005", "step-000006", "step-final"]
    assert restored(folder) == 6


def test_what_is_not_finite_is_named_and_a_sum_that_overflows_is_not(tmp_path: Path) -> None:
    state = make_state(WIDTH)
    weight = state.modules["network"].half().weight
    with torch.no_grad():
        weight.fill_(60_000.0)
        assert not torch.isfinite(weight.sum())
        assert state.not_finite() == []
        weight[0, 0], weight[0, 1] = torch.inf, -torch.inf
    assert state.not_finite() == ["module.network.weight"]


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_averages_follow_to_the_last_bit(decay: float) -> None:
    network = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 3), torch.nn.BatchNorm1d(3))
    average = Ema(network, decay)
    expected = {name: tensor.clone() for name, tensor in average.shadow.items()}
    for step in range(1, 4):
        network(torch.randn(4, 2, 9))
        for parameter in network.parameters():
            parameter.data.normal_()
        average.update(network)
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                expected[name].lerp_(tensor, 1 - min(decay, (1 + step) / (10 + step)))
            else:
                expected[name].copy_(tensor)
    assert all(torch.equal(average.shadow[name], tensor) for name, tensor in expected.items())


def test_the_memory_of_the_copies_is_there_before_the_first_save(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a save writes the state of its own step into it."""
    allocated: list[str] = []

    def noted(value: torch.Tensor) -> torch.Tensor:
        allocated.append(threading.current_thread().name)
        return room_for(value)

    for module in (checkpoint, training_state):
        monkeypatch.setattr(module, "room_for", noted)
    options = {"steps": 4, "checkpoint_every": 2, "validate_every": 4}
    config = as_config(line.diffusion(str(tmp_path / "run"), **options), DiffusionTrainConfig, tmp_path)
    train_diffusion.run(config)
    assert allocated
    assert all(name.startswith("checkpoint") for name in allocated), "the training thread allocates"
    first, last = (load_file(path / "tensors.safetensors") for _, path in checkpoints(tmp_path / "run"))
    assert len(first) == len(allocated)
    assert not all(torch.equal(first[name], last[name]) for name in first)


def test_a_save_that_fails_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whole_file, "sync", full)
    with pytest.raises(UserError, match="step-000004 could not be written"):
        save(folder, 4, keep=1)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [f"step-00000{i}" for i in (1, 2, 3)]
