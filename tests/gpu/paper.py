"""The paper's line on fake CUDA tensors: its own configs and classes, with stand-ins for what is read from disks alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from brainsynth.bundle.spec import LatentSpec
from brainsynth.config.distillation import DistillConfig
from brainsynth.config.load import load_config
from brainsynth.config.schema import PrepareConfig
from brainsynth.config.training import AutoencoderTrainConfig, DiffusionTrainConfig
from tests.gpu.fake_cuda import CUDA

CONFIGS = Path(__file__).parents[2] / "configs"
LATENTS = LatentSpec(shape_cxyz=(3, 20, 28, 20), shift=(0.0,) * 3, scale=(1.0,) * 3)
SHAPE = (160, 224, 160)
AUTOENCODER: AutoencoderTrainConfig = load_config(CONFIGS / "paper" / "autoencoder.yaml", AutoencoderTrainConfig)
UNET: DiffusionTrainConfig = load_config(CONFIGS / "paper" / "diffusion.yaml", DiffusionTrainConfig)
TRANSFORMER: DiffusionTrainConfig = load_config(CONFIGS / "paper" / "diffusion-transformer.yaml", DiffusionTrainConfig)
DISTILLED: DistillConfig = load_config(CONFIGS / "paper" / "distill-decoder.yaml", DistillConfig)
COVARIATES = load_config(CONFIGS / "paper" / "cohort.yaml", PrepareConfig).covariates
SMALL: DiffusionTrainConfig = load_config(CONFIGS / "t1w-2mm" / "4-diffusion.yaml", DiffusionTrainConfig)
SMALL_AUTOENCODER: AutoencoderTrainConfig = load_config(
    CONFIGS / "t1w-2mm" / "2-autoencoder.yaml", AutoencoderTrainConfig
)


def small_latents() -> LatentSpec:
    """Of the line for small cohorts, at 2 mm."""
    channels, factor = SMALL_AUTOENCODER.architecture.latent_channels, SMALL_AUTOENCODER.architecture.factor
    shape = (channels, 80 // factor, 112 // factor, 80 // factor)
    return LatentSpec(shape_cxyz=shape, shift=(0.0,) * channels, scale=(1.0,) * channels)


class OneGpu:
    """The only worker of a training, on the fake device."""

    rank, world_size, device, folder = 0, 1, CUDA, Path()

    def __init__(self, micro_batch: int = 0) -> None:
        self.micro_batch = micro_batch

    def parallel(self, module: nn.Module) -> nn.Module:
        return module

    def part(self, items: Any) -> Any:
        return items

    def share(self, indices: Any) -> torch.Tensor:
        return torch.from_numpy(indices)


class Scans:
    """A dataset of scans at 1 mm that takes no memory."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def volume(self, index: int) -> np.ndarray[Any, Any]:
        return np.broadcast_to(np.float32(0.5), SHAPE)

    def volumes(self, indices: Any = None) -> np.ndarray[Any, Any]:
        return np.stack([self.volume(i) for i in (range(self.count) if indices is None else indices)])


def scans(uri: str, split: str = "train", array: str | None = None) -> Scans:
    """In place of `open_dataset`."""
    return Scans({"train": 31105, "validation": 635}[split])


class Table:
    """In place of a `LatentTable`: 512 training and 64 validation latents."""

    def __init__(self, uri: str, split: str, schema: Any, latents: LatentSpec) -> None:
        count = 512 if split == "train" else 64
        self.mean, self.sigma = torch.zeros(count, *latents.shape_cxyz), torch.ones(count, *latents.shape_cxyz)
        continuous = {c.name: np.linspace(c.low, c.high, count) for c in schema.covariates if c.kind == "continuous"}
        binary = {c.name: list(c.categories) * (count // 2) for c in schema.covariates if c.kind == "binary"}
        self.table = self.scans = pd.DataFrame({**continuous, **binary})
        self.context = torch.zeros(count, schema.context_size)
        self.subjects = [str(number) for number in range(count)]
        self.mirrored = torch.zeros(count, dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.mean)


def with_batch(config: Any, batch_size: int, **runtime: Any) -> Any:
    """The config of one worker with another batch."""
    if isinstance(config, DiffusionTrainConfig):
        config = dataclasses.replace(config, figure_steps=2)  # each is like the other
    return dataclasses.replace(
        config,
        optimisation=dataclasses.replace(config.optimisation, batch_size=batch_size),
        runtime=dataclasses.replace(config.runtime, **{"workers": 1, "recompute": False, **runtime}),
    )
