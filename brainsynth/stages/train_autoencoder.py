"""Prepared cohort → autoencoder."""

from __future__ import annotations

from brainsynth.config.training import AutoencoderTrainConfig
from brainsynth.executors.ray_train import describe_training, train
from brainsynth.training.autoencoder import TRAINING


def run(config: AutoencoderTrainConfig) -> None:
    """Prepared cohort → autoencoder."""
    train(TRAINING, config)


def describe(config: AutoencoderTrainConfig) -> str:
    """What train-autoencoder would do."""
    TRAINING.check(config)
    return describe_training(config)
