"""The line at a worker's start names what runs, read from where it is set."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
import torch

from brainsynth.config.architectures import DiffusionArchitecture, GaussianArchitecture, TransformerArchitecture
from brainsynth.config.load import load_config
from brainsynth.config.schema import GenerateConfig
from brainsynth.models.device import explain
from brainsynth.models.diffusion import attention_of
from brainsynth.stages import generate
from tests.line import Line, write_yaml


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("networks on ")]


def test_a_worker_says_it_in_one_line(line: Line, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = line.generate(tmp_path / "out", runtime={"workers": 0, "exact_rewrites": False})
    with caplog.at_level(logging.INFO):
        generate.run(load_config(write_yaml(config, tmp_path), GenerateConfig))
    (text,) = said(caplog)
    assert text.startswith("networks on cpu: float32; decoder channels last, denoiser plain")
    assert text.endswith("; exact rewrites off")
    assert "cuDNN" not in text


def test_switches_of_cudnn_are_as_they_are_set(caplog: pytest.LogCaptureFixture) -> None:
    for search in (False, True):
        with caplog.at_level(logging.INFO), torch.backends.cudnn.flags(benchmark=search, allow_tf32=search):
            explain(torch.device("cuda", 0), "float32", True, "none")
    off, on = said(caplog)
    assert "cuDNN's search for algorithms off" in off
    assert "TF32 in convolutions off" in off
    assert "cuDNN's search for algorithms on" in on
    assert "TF32 in convolutions allowed" in on


def test_attention_is_the_networks() -> None:
    unet = DiffusionArchitecture(channels=(8, 16), attention=(False, True), head_channels=0, norm_groups=4)
    assert attention_of(unet) == "written out"
    assert attention_of(dataclasses.replace(unet, upcast_attention=True)) == "written out in float32"
    transformer = TransformerArchitecture(kind="transformer", patch_xyz=(1, 1, 1), width=8, depth=1, heads=1)
    assert attention_of(transformer) == "by torch's fused kernel"
    gaussian = GaussianArchitecture(kind="gaussian", rank=4, rank_channels=1, channels=(8,))
    assert attention_of(gaussian) == "none"
