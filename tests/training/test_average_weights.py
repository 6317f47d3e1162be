"""`recipes.average_weights`: the network of two trainings averaged, the Gaussian of the second."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from brainsynth.config.architectures import GaussianArchitecture
from brainsynth.models.diffusion import Denoiser
from brainsynth.models.weights import save_weights
from recipes import average_weights

FIRST = GaussianArchitecture(kind="gaussian", rank=3, rank_channels=2, channels=(4, 8), norm_groups=2, embedding=8)
SECOND = dataclasses.replace(FIRST, finest_blocks=2, rank=5)


def test_an_added_block_counts_from_the_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    names = [str(tmp_path / f"{name}.safetensors") for name in ("first", "second", "averaged")]
    for architecture, name in zip((FIRST, SECOND), names, strict=False):
        denoiser = Denoiser(architecture, 3, 2, (4, 4, 4))
        for tensor in denoiser.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape))
        save_weights(denoiser, Path(name))
    monkeypatch.setattr(sys, "argv", ["average", *names[:2], "--share", "0.25", "--output", names[2]])
    average_weights.main()
    first, second, averaged = (load_file(name) for name in names)
    assert set(averaged) == set(second) > set(first)
    for name, found in averaged.items():
        if "latents" in name:
            expected = second[name]
        elif name in first:
            expected = 0.75 * first[name] + 0.25 * second[name]
        else:
            expected = (0.25 if "conv2" in name or "modulation" in name else 1) * second[name]
        torch.testing.assert_close(found, expected)
