"""Nothing dies for a picture: saved before validated, and what fails there is a warning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from brainsynth.config.training import AutoencoderTrainConfig
from brainsynth.stages import train_autoencoder
from brainsynth.training.autoencoder import AutoencoderTask
from brainsynth.training.checkpoint import checkpoints
from brainsynth.training.image_quality import mean_closeness
from tests.line import Line, as_config

OPTIONS = {"steps": 6, "checkpoint_every": 2, "validate_every": 2}


def full(*_: object) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 94.8 GiB")


def trained(line: Line, folder: Path) -> list[dict[str, float]]:
    train_autoencoder.run(as_config(line.autoencoder(str(folder), **OPTIONS), AutoencoderTrainConfig, folder.parent))
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_figure_that_fails_is_a_warning(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = trained(line, tmp_path / "plain")
    monkeypatch.setattr(AutoencoderTask, "figures", full)
    assert trained(line, tmp_path / "without") == plain
    assert caplog.text.count("no figures (OutOfMemoryError") == 3
    assert not (tmp_path / "without" / "figures").exists()
    weights = [load_file(tmp_path / name / "autoencoder.safetensors") for name in ("plain", "without")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_validation_without_memory_is_a_warning_and_the_last_one_an_error_after_all_is_saved(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = trained(line, tmp_path / "plain")
    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderTask, "validate", full)
        with pytest.raises(torch.OutOfMemoryError):
            trained(line, tmp_path / "run")
    assert caplog.text.count("out of memory while validating") == 2
    assert [step for step, _ in checkpoints(tmp_path / "run")] == [2, 4, 6]
    again = trained(line, tmp_path / "run")
    assert again[-1] == plain[-1], "the last validation is made up for, and logged"


def test_killed_between_the_save_and_the_validation_the_curve_is_the_same(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trained(line, tmp_path / "plain")

    class Killed(BaseException):
        pass

    def kill(*_: object) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderTask, "validate", kill)
        with pytest.raises(Killed):
            trained(line, tmp_path / "run")
    assert [step for step, _ in checkpoints(tmp_path / "run")] == [2], "saved before it was validated"
    assert trained(line, tmp_path / "run") == plain


def test_means_are_over_the_rows_that_have_a_number() -> None:
    assert mean_closeness([{"a": 1.0}, {"b": 2.0}, {"a": 3.0}]) == {"a": 2.0, "b": 2.0}
