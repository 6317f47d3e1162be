"""The memory table of docs/gpu.md, each row measured on fake CUDA tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
from monai.networks.nets.resnet import resnet10

import brainsynth.training.autoencoder as autoencoder_training
import brainsynth.training.diffusion as diffusion_training
import brainsynth.training.losses as losses
from brainsynth.config.schema import SamplerConfig
from brainsynth.models.autoencoder import Autoencoder, build_autoencoder
from brainsynth.models.bundle_generator import BundleGenerator
from brainsynth.models.diffusion import Denoiser
from brainsynth.models.distilled_decoder import DistilledDecoder
from brainsynth.models.loading import prepare
from brainsynth.models.pieces import numbers_per_cell
from brainsynth.models.schedule import NoiseSchedule
from brainsynth.training.distillation import DistillTask
from brainsynth.training.latents import LatentEncoder
from brainsynth.training.learner import Learner
from brainsynth.training.loop import optimise
from brainsynth.volume import VolumeSpec
from tests.gpu import paper
from tests.gpu.fake_cuda import CUDA, Memory

DDIM = SamplerConfig(method="ddim", steps=2)
ADVERSARIAL = 20_000
"""A step after the warm-up of the adversarial loss."""


def networks(
    training: Any = paper.UNET,
    autoencoder: Any = paper.AUTOENCODER,
    latents: Any = paper.LATENTS,
    distilled: bool = False,
) -> tuple[Autoencoder, Denoiser]:
    """Of a config's sizes, with fresh weights, on the CPU."""
    decoder = Autoencoder(build_autoencoder(autoencoder.architecture), latents)
    if distilled:
        decoder.distilled = DistilledDecoder(paper.DISTILLED.architecture, autoencoder.architecture)
    channels, x, y, z = latents.shape_cxyz
    return decoder, Denoiser(training.architecture, channels, paper.COVARIATES.context_size, (x, y, z))


def generator(
    sampler: SamplerConfig = DDIM, precision: Any = "bfloat16", training: Any = paper.UNET, **sizes: Any
) -> BundleGenerator:
    """The bundle as a worker has it, except for what it reads from disks."""
    autoencoder, denoiser = networks(training, **sizes)
    prepare(autoencoder, denoiser, CUDA, precision, rewrites=True)
    made = object.__new__(BundleGenerator)
    made.autoencoder, made.denoiser, made.device = autoencoder, denoiser, CUDA
    made.identity = SimpleNamespace(precision=precision, sampler=sampler, renderer=None)  # type: ignore[assignment]
    made.spec = SimpleNamespace(covariates=paper.COVARIATES, latents=sizes.get("latents", paper.LATENTS))  # type: ignore[assignment]
    made.schedule, made.decode_s = NoiseSchedule(training.schedule), 0.0
    made.stored = VolumeSpec(shape_xyz=paper.SHAPE, spacing_mm=(1.0,) * 3, origin_mm=(0.0,) * 3)
    return made


def rows(count: int) -> pd.DataFrame:
    """People to generate."""
    middle = {c.name: (c.low + c.high) / 2 for c in paper.COVARIATES.covariates if c.kind == "continuous"}
    return pd.DataFrame({"sex": ["F"] * count, **middle})


def generated(memory: Memory, count: int, **how: Any) -> float:
    """Peak of a micro-batch, the weights included."""
    maker = generator(**how)
    return memory.during(lambda: maker.sample(rows(count), list(range(count))))[0]


def encoded(memory: Memory, count: int) -> float:
    """Peak of encoding some scans."""
    encoder = object.__new__(LatentEncoder)
    encoder.device, encoder.network = CUDA, build_autoencoder(paper.AUTOENCODER.architecture)
    encoder.network.requires_grad_(False).eval().to(CUDA)
    encoder.plan = SimpleNamespace(arrays=[SimpleNamespace(sample_shape=paper.LATENTS.shape_cxyz)])  # type: ignore[assignment]
    encoder._numbers = numbers_per_cell(encoder.network)
    scan = np.broadcast_to(np.float32(0.5), paper.SHAPE)
    with mock.patch.object(encoder, "_scan", return_value=scan, create=True):
        return memory.during(torch.no_grad()(lambda: encoder.encode(range(count))))[0]


def autoencoder_task(batch: int = 1, perceptual: bool = False, **runtime: Any) -> Any:
    """The paper's training on one GPU, with `batch` volumes."""
    config = paper.with_batch(paper.AUTOENCODER, batch, **runtime)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(autoencoder_training, "open_dataset", paper.scans))
        if perceptual:
            named = dataclasses.replace(config.losses, perceptual_weights="resnet10.safetensors")
            config = dataclasses.replace(config, losses=named)
            network = resnet10(
                spatial_dims=3, n_input_channels=1, num_classes=1, feed_forward=False, shortcut_type="B",
                bias_downsample=False,
            )  # fmt: skip
            stack.enter_context(mock.patch.object(losses, "read_tensors", return_value=network.state_dict()))
        worker: Any = paper.OneGpu(config.runtime.micro_batch)
        inputs: Any = SimpleNamespace(cohort=None)
        return autoencoder_training.AutoencoderTask(config, inputs, worker)


def diffusion_task(training: Any = paper.UNET, batch: int = 2, latents: Any = paper.LATENTS, **runtime: Any) -> Any:
    """The denoiser's training on one GPU."""
    config = paper.with_batch(training, batch, **runtime)
    run = SimpleNamespace(
        architecture=(paper.AUTOENCODER if training is not paper.SMALL else paper.SMALL_AUTOENCODER).architecture
    )
    inputs: Any = diffusion_training.Inputs(run, Path(), paper.COVARIATES, latents, "")  # type: ignore[arg-type]
    worker: Any = paper.OneGpu(config.runtime.micro_batch)
    with ExitStack() as stack:
        for name, value in (
            ("LatentTable", paper.Table),
            ("fit_gaussian", lambda *_: None),
            ("fit_distribution", lambda *_: None),
        ):
            stack.enter_context(mock.patch.object(diffusion_training, name, value))
        task = diffusion_training.DiffusionTask(config, inputs, worker)
    return task


def decoder_task(batch: int = 1) -> DistillTask:
    """The distillation of the paper's decoder on one GPU, from generated latents."""
    task = object.__new__(DistillTask)
    alone = dataclasses.replace(paper.DISTILLED.generated, share=1.0)
    task.config = dataclasses.replace(paper.with_batch(paper.DISTILLED, batch), latents=None, generated=alone)
    task.worker, task.precision, task.encoded, task.perceptual = paper.OneGpu(), "bfloat16", None, None  # type: ignore[assignment]
    task.teacher, denoiser = networks()
    prepare(task.teacher, denoiser, CUDA, "float32", rewrites=True)
    task.generated = torch.zeros(16, *paper.LATENTS.shape_cxyz)
    task.held_out = {"generated": torch.zeros(4, *paper.LATENTS.shape_cxyz)}
    student = DistilledDecoder(paper.DISTILLED.architecture, paper.AUTOENCODER.architecture).to(CUDA)
    task.learner = Learner(student, task.worker, task.config.optimisation)
    task.state = task.learner.state("decoder")
    return task


def step(memory: Memory, task: Any, number: int = 0) -> float:
    """Peak of a second training step, when the optimizer has its state."""
    optimise(task, task.config.optimisation, number, 0)
    return memory.during(lambda: optimise(task, task.config.optimisation, number + 1, 0))[0]


def validated(memory: Memory, task: Any) -> float:
    """Peak of a validation and its figures, the training's state included."""
    trained = [p for optimizer in task.state.optimizers.values() for g in optimizer.param_groups for p in g["params"]]
    # What a step leaves: the gradient and two moments of each weight.
    left = [torch.empty(3 * weight.numel(), device=CUDA) for weight in trained]
    with mock.patch.object(paper.OneGpu, "part", lambda _, items: items[:2]):  # one after the other: two show it
        peak = max(memory.during(task.validate)[0], figures(memory, task))
    del left
    return peak


def figures(memory: Memory, task: Any) -> float:
    """Peak of the figures."""
    with mock.patch.object(diffusion_training, "load_weights"):
        return memory.during(task.figures)[0]


Row = Callable[[Memory], float]
TABLE: dict[str, Row] = {
    "generate, UNet, own decoder, micro-batch 1": lambda m: generated(m, 1),
    "generate, UNet, own decoder, micro-batch 4": lambda m: generated(m, 4),
    "generate, UNet, own decoder, micro-batch 8": lambda m: generated(m, 8),
    "generate, UNet, own decoder, micro-batch 4, float32": lambda m: generated(m, 4, precision="float32"),
    "generate, UNet, distilled decoder, micro-batch 4": lambda m: generated(m, 4, distilled=True),
    "generate, UNet, distilled decoder, micro-batch 16": lambda m: generated(m, 16, distilled=True),
    "encode, micro-batch 1": lambda m: encoded(m, 1),
    "encode, micro-batch 4": lambda m: encoded(m, 4),
    "autoencoder, 1 volume": lambda m: step(m, autoencoder_task(), ADVERSARIAL),
    "autoencoder, 1 volume, perceptual loss": lambda m: step(m, autoencoder_task(perceptual=True), ADVERSARIAL),
    "autoencoder, 1 volume, recompute": lambda m: step(m, autoencoder_task(recompute=True), ADVERSARIAL),
    "autoencoder, 1 volume, recompute, perceptual loss": lambda m: step(
        m, autoencoder_task(perceptual=True, recompute=True), ADVERSARIAL
    ),
    "autoencoder, 8 volumes, recompute, micro-batch 1": lambda m: step(
        m, autoencoder_task(8, recompute=True, micro_batch=1), ADVERSARIAL
    ),
    "autoencoder, validation and figures": lambda m: validated(m, autoencoder_task(recompute=True)),
    "denoiser, UNet, 2 volumes": lambda m: step(m, diffusion_task()),
    "denoiser, UNet, 16 volumes": lambda m: step(m, diffusion_task(batch=16)),
    "denoiser, UNet, 16 volumes, micro-batch 2": lambda m: step(m, diffusion_task(batch=16, micro_batch=2)),
    "denoiser, UNet, validation and figures": lambda m: validated(m, diffusion_task()),
    "denoiser, transformer, 2 volumes": lambda m: step(m, diffusion_task(paper.TRANSFORMER)),
    "denoiser, transformer, validation and figures": lambda m: validated(m, diffusion_task(paper.TRANSFORMER)),
    "distil the decoder, 1 volume": lambda m: step(m, decoder_task()),
    "distil the decoder, validation and figures": lambda m: validated(m, decoder_task()),
}
"""Row of the table → its peak in GB."""
