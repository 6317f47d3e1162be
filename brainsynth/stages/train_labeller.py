"""Prepared cohort with label maps → labeller."""

from __future__ import annotations

from brainsynth.config.labelling import LabellerTrainConfig
from brainsynth.executors.ray_train import describe_training, train
from brainsynth.training.labeller import TRAINING


def run(config: LabellerTrainConfig) -> None:
    """Prepared cohort with label maps → labeller."""
    train(TRAINING, config)


def describe(config: LabellerTrainConfig) -> str:
    """What train-labeller would do."""
    inputs = TRAINING.check(config)
    return f"{len(inputs.labels.labels)} structures: {inputs.labels.source}\n{describe_training(config)}"
