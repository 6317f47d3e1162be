"""Prepared cohort → autoencoder."""

from __future__ import annotations

import logging

from brainsynth.config.training import AutoencoderTrainConfig
from brainsynth.executors.ray_train import describe_training, train
from brainsynth.training import autoencoder

log = logging.getLogger(__name__)


def run(config: AutoencoderTrainConfig) -> None:
    """Prepared cohort → autoencoder."""
    train("autoencoder", config)


def describe(config: AutoencoderTrainConfig) -> str:
    """What train_autoencoder would do."""
    autoencoder.check(config)
    return describe_training(config)
