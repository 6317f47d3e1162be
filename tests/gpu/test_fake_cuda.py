"""The whole line on fake CUDA tensors: nothing mixes devices, nothing is larger than the table says, no tensor too large."""

from __future__ import annotations

import multiprocessing
import re
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from brainsynth.config.schema import SamplerConfig
from brainsynth.models.diffusion import Denoiser
from brainsynth.models.embedder import Embedder
from brainsynth.models.segmenter import Segmenter
from brainsynth.training.loop import optimise
from tests.gpu import memory as measured
from tests.gpu import paper
from tests.gpu.fake_cuda import CUDA, TOO_LARGE, fake_cuda

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
QUICK = (
    "generate, UNet, own decoder, micro-batch 4",
    "generate, UNet, distilled decoder, micro-batch 16",
    "encode, micro-batch 4",
    "autoencoder, 1 volume, recompute",
    "autoencoder, validation and figures",
    "denoiser, UNet, 2 volumes",
    "denoiser, UNet, validation and figures",
    "denoiser, transformer, 2 volumes",
    "distil the decoder, 1 volume",
    "distil the decoder, validation and figures",
)
"""`make test-all` measures the others, too."""


def documented() -> dict[str, float]:
    """Row → GB, as docs/gpu.md has them."""
    found = re.findall(r"^\| ([a-z][^|]+?) \| ([\d.]+) \|", PAGE.read_text(), re.MULTILINE)
    return {name: float(value) for name, value in found if name in measured.TABLE}


def test_every_row_is_documented() -> None:
    assert set(documented()) == set(measured.TABLE)


def measure(row: measured.Row, answer: Any) -> None:
    with fake_cuda() as memory:
        answer.send((row(memory), memory.largest, memory.at_peak))


def forked(row: measured.Row) -> tuple[float, int, str]:
    """A peak in GB, the largest tensor, and what was computed at the peak; in a process of its own.

    What is alive is counted by when Python frees it, and what torch does with fake tensors in C++ is not always safe.
    """
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(row, theirs))
    process.start()
    theirs.close()
    try:
        found: tuple[float, int, str] = mine.recv()
    finally:
        process.join()
    return found


def row_mark(name: str) -> Any:
    return name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [row_mark(name) for name in measured.TABLE])
def test_peaks_are_within_the_table(name: str) -> None:
    peak, largest, at_peak = forked(measured.TABLE[name])
    assert largest < TOO_LARGE, f"a tensor of {largest / TOO_LARGE:.2f} × 2^31 numbers"
    assert peak <= documented()[name] + 0.05, f"{peak:.2f} GB at {at_peak}"
    assert peak >= 0.9 * documented()[name] - 0.1, f"the table may be lowered to {peak:.1f} GB"


VARIANCE_PRESERVING = [{"method": "ddim"}, {"method": "ddpm"}, {"method": "ddim", "eta": 0.5}, {"method": "dpmpp_2m"},
                       {"method": "unipc"}]  # fmt: skip
FLOW = [{"method": "euler"}, {"method": "heun"}, {"method": "ab2", "guidance_scale": 2.0}]
SAMPLERS = [
    *(
        pytest.param(paper.UNET, options, id=f"unet-{'-'.join(map(str, options.values()))}")
        for options in VARIANCE_PRESERVING
    ),
    *(pytest.param(paper.TRANSFORMER, options, id=f"transformer-{options['method']}") for options in FLOW),
    pytest.param(paper.SMALL, {"method": "ab2"}, id="gaussian-ab2"),
]


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize(("training", "options"), SAMPLERS)
def test_samplers_and_decoders(training: Any, options: dict[str, Any], precision: str) -> None:
    small = training is paper.SMALL
    sizes = {"autoencoder": paper.SMALL_AUTOENCODER, "latents": paper.small_latents()} if small else {"distilled": True}
    with fake_cuda() as memory:
        maker = measured.generator(SamplerConfig(steps=4, **options), precision, training, **sizes)
        images = maker.sample(measured.rows(2), [0, 1])
    assert images.shape == (2, *((80, 112, 80) if small else paper.SHAPE))
    assert images.dtype == np.float16, "it was not quantised on the device"
    assert memory.largest < TOO_LARGE
    if not small:
        assert not memory.waits, "the CPU waits for the device inside a sampler"


def small_task(kind: str) -> Any:
    """Of the line for small cohorts."""
    if kind == "gaussian":
        return measured.diffusion_task(paper.SMALL, latents=paper.small_latents())
    with (
        mock.patch.object(measured.paper, "AUTOENCODER", paper.SMALL_AUTOENCODER),
        mock.patch("brainsynth.training.autoencoder.patch_components", lambda _, patch, n: torch.eye(patch**3)[:, :n]),
    ):
        return measured.autoencoder_task()


@pytest.mark.parametrize("action", [measured.step, measured.validated])
@pytest.mark.parametrize("kind", ["gaussian", "patch"])
def test_the_trainings_of_the_line_for_small_cohorts(kind: str, action: Any) -> None:
    peak, largest, _ = forked(lambda memory: action(memory, small_task(kind)))
    assert 0 < peak < 80
    assert largest < TOO_LARGE


def test_the_networks_of_evaluations() -> None:
    with fake_cuda() as memory:
        for network, use in (
            (Segmenter(), lambda n: n.labels(torch.zeros(160, 224, 160))),
            (Embedder(), lambda n: n.embed(torch.zeros(4, 40, 56, 40).numpy())),
        ):
            network.requires_grad_(False).eval().to(CUDA, torch.bfloat16 if isinstance(network, Segmenter) else None)
            use(network)
    assert 0 < memory.largest < TOO_LARGE


def test_a_constant_on_the_cpu_is_noticed() -> None:
    plain = Denoiser.forward

    def forward(self: Denoiser, z: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return plain(self, z, t, context) * torch.ones(3, 1, 1, 1).cpu()

    with (
        fake_cuda(),
        mock.patch.object(Denoiser, "forward", forward),
        pytest.raises(RuntimeError, match="two different devices|same device"),
    ):
        measured.generator(distilled=True).sample(measured.rows(1), [0])


def test_a_batch_that_stays_on_the_cpu_is_noticed() -> None:
    with fake_cuda():
        task = measured.autoencoder_task(recompute=True)
        batches = task.batches
        task.batches = lambda step: mock.MagicMock(to=lambda *_, **__: batches(step))
        with pytest.raises(RuntimeError, match="two different devices|same device|Input type"):
            optimise(task, task.config.optimisation, 0, 0)


def test_a_tensor_that_is_too_large_is_noticed() -> None:
    with fake_cuda() as memory, mock.patch("brainsynth.models.pieces.MOST_NUMBERS", 2**40):
        measured.generated(memory, 4)
    assert memory.largest > TOO_LARGE
