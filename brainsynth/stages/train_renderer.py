"""Prepared cohort with label maps → renderer, and perhaps a copy of a bundle that has it."""

from __future__ import annotations

from brainsynth.bundle.renderer import RENDERER
from brainsynth.config.labelling import RendererTrainConfig
from brainsynth.stages.companion import plan_renderer
from brainsynth.stages.companion_training import describe_companion, train_companion
from brainsynth.training.renderer import TRAINING


def run(config: RendererTrainConfig) -> None:
    """Prepared cohort with label maps → renderer, which makes images of label maps; harmless to repeat."""
    train_companion(TRAINING, config, RENDERER, plan_renderer)


def describe(config: RendererTrainConfig) -> str:
    """What train-renderer would do."""
    return describe_companion(TRAINING, config, RENDERER)
