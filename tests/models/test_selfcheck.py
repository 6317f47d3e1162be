"""bfloat16 is checked on the networks' own convolutions, and a wrong one is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from brainsynth.errors import UserError
from brainsynth.models import device, selfcheck
from brainsynth.models.loading import _convolution_shapes
from brainsynth.models.selfcheck import ConvolutionShape, check_bfloat16
from brainsynth.stages.import_bundle import PAPER

CPU = torch.device("cpu")
SHAPES = [
    ConvolutionShape(False, (16, 8, 3, 3, 3), (1, 1, 1), (1, 1, 1), (20, 28, 20), False),
    ConvolutionShape(False, (16, 8, 3, 3, 3), (2, 2, 2), (1, 1, 1), (4, 4, 4), True),
    ConvolutionShape(True, (8, 4, 4, 4, 4), (2, 2, 2), (1, 1, 1), (5, 7, 5), True),
]


def test_this_cpu_passes() -> None:
    check_bfloat16(SHAPES, CPU)
    # without the instructions torch adds a transposed convolution's overlapping taps in bfloat16, rounding each sum
    bound = 0.003 if device.has_bfloat16(CPU) else 0.006
    assert all(0 < selfcheck.relative_error(shape, CPU) < bound for shape in SHAPES)


def spoilt(convolve: Callable[..., torch.Tensor], wrong: float) -> Callable[..., torch.Tensor]:
    def run(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        out = convolve(x, *args, **options)
        if x.dtype == torch.bfloat16:
            out[..., -1] = wrong  # one plane, as a kernel that forgets its tail leaves it
        return out

    return run


@pytest.mark.parametrize("wrong", [0.0, float("nan")])
@pytest.mark.parametrize("name", ["conv3d", "conv_transpose3d"])
def test_a_wrong_plane_is_noticed(name: str, wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, name, spoilt(getattr(functional, name), wrong))
    with pytest.raises(UserError, match="bfloat16 is wrong on this device"):
        check_bfloat16(SHAPES, CPU)


def test_the_papers_convolutions_are_found_at_their_size() -> None:
    plain, cheap = (set(_convolution_shapes(PAPER, rewrites)) for rewrites in (False, True))
    wide = ConvolutionShape(False, (128, 128, 3, 3, 3), (1, 1, 1), (1, 1, 1), (160, 224, 160), True)
    fused = ConvolutionShape(True, (128, 128, 4, 4, 4), (2, 2, 2), (1, 1, 1), (80, 112, 80), True)
    assert wide in plain
    assert wide not in cheap
    assert fused in cheap
    inputs = {s.weight_shape[1]: s for s in plain if not s.transposed and s.input_xyz == (20, 28, 20)}
    assert 7 in inputs  # three latents and four covariates
    assert len(plain) > 20
    assert dataclasses.replace(fused, transposed=False) not in cheap


def test_without_instructions_for_it_float32_takes_the_place_of_bfloat16(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device, "has_bfloat16", lambda _: False)
    assert device.able(CPU, "float32") == "float32"
    assert not caplog.records
    assert device.able(CPU, "bfloat16") == "float32"
    assert "no instructions for bfloat16" in caplog.text
    monkeypatch.setattr(device, "has_bfloat16", lambda _: True)
    assert device.able(CPU, "bfloat16") == "bfloat16"
