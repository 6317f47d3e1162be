"""Latents → denoiser."""

from __future__ import annotations

from brainsynth.config.training import DiffusionTrainConfig
from brainsynth.executors.ray_train import describe_training, train
from brainsynth.training.diffusion import TRAINING


def run(config: DiffusionTrainConfig) -> None:
    """Latents → denoiser."""
    train(TRAINING, config)


def describe(config: DiffusionTrainConfig) -> str:
    """What train-diffusion would do."""
    TRAINING.check(config)
    return describe_training(config)
