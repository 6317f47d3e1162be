"""Prepared cohort + autoencoder → latents, their shift and scale."""

from __future__ import annotations

import logging

from brainsynth.config.schema import (
    EncodeConfig,
)
from brainsynth.executors.dataset import dry_run, make_dataset
from brainsynth.training.latents import plan_latents, whiten

log = logging.getLogger(__name__)


def run(config: EncodeConfig) -> None:
    """Prepared cohort + autoencoder → latents, their shift and scale."""
    work = plan_latents(config)
    make_dataset(work, config.runtime)
    spec = whiten(work.root, config)
    log.info("latents %s: shift %s, scale %s", spec.shape_cxyz, _numbers(spec.shift), _numbers(spec.scale))


def describe(config: EncodeConfig) -> str:
    """What encode_latents would make."""
    return dry_run(plan_latents(config), config.runtime)


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:.3g}" for value in values) + ")"
