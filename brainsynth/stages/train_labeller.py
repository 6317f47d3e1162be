"""Prepared cohort with label maps → labeller, and perhaps a copy of a bundle that has it."""

from __future__ import annotations

from brainsynth.bundle.labeller import LABELLER
from brainsynth.config.labelling import LabellerTrainConfig
from brainsynth.stages.companion import plan_labeller
from brainsynth.stages.companion_training import describe_companion, train_companion
from brainsynth.training.labeller import TRAINING


def run(config: LabellerTrainConfig) -> None:
    """Prepared cohort with label maps → labeller; harmless to repeat."""
    train_companion(TRAINING, config, LABELLER, plan_labeller)


def describe(config: LabellerTrainConfig) -> str:
    """What train-labeller would do."""
    return describe_companion(TRAINING, config, LABELLER)
