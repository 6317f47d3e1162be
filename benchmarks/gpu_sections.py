"""Sections of h200.py that ask what no CPU shows: real memory, numerics of large batches, layouts, the shipped model."""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import ladder
from benchmarks.h200 import Notes, peak_memory, seconds, size_of, the_device
from brainsynth.models import pieces
from brainsynth.models.device import autocast, has_bfloat16

MEASURED = (
    "autoencoder, 1 volume",
    "autoencoder, 1 volume, perceptual loss",
    "autoencoder, 1 volume, recompute",
    "autoencoder, validation and figures",
    "denoiser, UNet, 2 volumes",
    "denoiser, UNet, validation and figures",
)
"""Rows of the table in docs/gpu.md, which are lower bounds there."""


class RealMemory:
    """In place of the counting of fake tensors: what the device's allocator gave out at the most."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def during(self, action: Callable[[], Any]) -> tuple[float, Any]:
        """The peak in GB while something is done, and its result."""
        peak_memory(self.device)
        result = action()
        return peak_memory(self.device), result


def memory(notes: Notes, dry: bool) -> None:
    """Peaks of training steps, validations and figures, by the harness that made the table of docs/gpu.md."""
    from tests.gpu import paper

    device: Any = the_device(dry)
    paper.OneGpu.device = device
    if dry:
        spec = size_of(True).spec
        shape = tuple(n * spec.autoencoder.factor for n in spec.latents.shape_cxyz[1:])
        paper.AUTOENCODER = dataclasses.replace(paper.AUTOENCODER, architecture=spec.autoencoder)
        paper.UNET = dataclasses.replace(paper.UNET, architecture=spec.diffusion)
        paper.LATENTS, paper.SHAPE = spec.latents, shape  # type: ignore[assignment]
        paper.scans = lambda *_, **__: paper.Scans(8)  # type: ignore[assignment]
    from tests.gpu import memory as harness  # it takes its defaults from `paper`

    harness.CUDA = device
    for name in MEASURED:
        row: Any = harness.TABLE[name]
        notes.rung(name, lambda row=row: {"peak_memory_gb": row(RealMemory(device))})


@torch.no_grad()
def decoding(notes: Notes, dry: bool) -> None:
    """Decoding four together against one by one, layouts with and without cuDNN's search, autocast against all bfloat16."""
    device, size, times = the_device(dry), size_of(dry), 1 if dry else 3
    precision = "bfloat16" if not dry or has_bfloat16(device) else "float32"
    rung = ladder.Rung("", "unipc", 8, precision)
    autoencoder, denoiser = ladder.arranged(ladder.build(size, device), rung, size)
    z, context = ladder.inputs(size, 4, device)
    timesteps = torch.full((4,), 979.0, device=device)

    def decoded(part: Tensor) -> Tensor:
        with autocast(device, precision):
            images: Tensor = autoencoder.decode(part)
        return images

    def one_by_one() -> Tensor:
        return torch.cat([decoded(part) for part in z.split(1)])

    def together() -> dict[str, float]:
        with mock.patch.object(pieces, "MOST_NUMBERS", 2**40):  # tensors beyond 2^31 numbers, which else are avoided
            return apart(decoded(z), one_by_one())

    def laid_out(layout: torch.memory_format, search: bool) -> dict[str, float]:
        for network in (autoencoder, denoiser):
            network.to(memory_format=layout)
        with torch.backends.cudnn.flags(benchmark=search, allow_tf32=True), autocast(device, precision):
            step = seconds(functools.partial(denoiser, z, timesteps, context), device, times)
            decode = seconds(functools.partial(autoencoder.decode, z), device, times)
        return {"step_s": statistics.median(step) / 4, "decode_s": statistics.median(decode) / 4}

    def whole() -> dict[str, float]:
        network = copy.deepcopy(autoencoder.network).to(torch.bfloat16)

        def run(part: Tensor) -> Tensor:
            raw = part / autoencoder.scale + autoencoder.shift
            images: Tensor = network.decode(raw.bfloat16()).float().clamp(0, 1)
            return images.flip(autoencoder.flipped)

        peak_memory(device)
        taken = {"s_per_volume": statistics.median(seconds(lambda: run(z[:1]), device, times))}
        taken["peak_memory_gb"] = peak_memory(device)
        taken["autocast_s_per_volume"] = statistics.median(seconds(lambda: decoded(z[:1]), device, times))
        return taken | {"autocast_peak_memory_gb": peak_memory(device), **apart(run(z[:1]), decoded(z[:1]))}

    notes.rung("4 together against 4 × 1", together)
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        for search in (False, True):
            notes.rung(f"{layout}, cudnn.benchmark {search}", functools.partial(laid_out, layout, search))
    notes.rung("all bfloat16 against autocast", whole)


def apart(a: Tensor, b: Tensor) -> dict[str, float]:
    """How far two batches of images are from each other."""
    difference = (a - b).abs()
    return {"largest_difference": float(difference.max()), "root_mean_square": float(difference.square().mean().sqrt())}


def shipped(notes: Notes, dry: bool) -> None:
    """The bundled model as it is recommended, but for its micro-batch: volumes a second of sampling and decoding."""
    from brainsynth.bundle.recommended import recommended_generation
    from brainsynth.config.schema import SHIPPED_BUNDLE
    from brainsynth.planning import plan_generation
    from brainsynth.storage.commit import write_plan

    device = the_device(dry)
    counts = (1,) if dry else (2, 16, 64)
    with tempfile.TemporaryDirectory() as folder:
        config = recommended_generation(
            folder, SHIPPED_BUNDLE, {"draw": max(counts)}, seed=0, workers=0, gpus=0 if dry else 1
        )
        work = plan_generation(config)
        write_plan(work.store, work.plan, work.samples)
        maker: Any = work.build_maker(**work.arguments)
        for count in counts:

            def run(rows: Any = work.samples.iloc[:count]) -> dict[str, float]:
                peak_memory(device)
                volumes = functools.partial(maker.volumes, rows, {"sample_s": 0.0, "decode_s": 0.0})
                taken = statistics.median(seconds(volumes, device, 1 if dry else 3))
                return {"volumes_per_s": len(rows) / taken, "peak_memory_gb": peak_memory(device)}

            notes.rung(f"micro-batch {count}", run)
