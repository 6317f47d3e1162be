"""Latents → denoiser."""

from __future__ import annotations

import logging

from brainsynth.config.training import DiffusionTrainConfig
from brainsynth.executors.ray_train import describe_training, train
from brainsynth.training import diffusion

log = logging.getLogger(__name__)


def run(config: DiffusionTrainConfig) -> None:
    """Latents → denoiser."""
    train("diffusion", config)


def describe(config: DiffusionTrainConfig) -> str:
    """What train_diffusion would do."""
    diffusion.check(config)
    return describe_training(config)
