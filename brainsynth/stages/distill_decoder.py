"""Bundle → the same bundle with a distilled decoder."""

from __future__ import annotations

import logging

from brainsynth.config.distillation import DistillConfig
from brainsynth.executors.ray_train import describe_training, train
from brainsynth.stages.bundle import export_distilled
from brainsynth.training import distillation

log = logging.getLogger(__name__)


def run(config: DistillConfig) -> None:
    """Bundle → the same bundle with a distilled decoder beside its own."""
    train("decoder", config)
    spec = export_distilled(config)
    assert spec.distilled is not None
    for name, found in (("generated", spec.distilled.on_generated), ("encoded", spec.distilled.on_encoded)):
        if found is not None:
            log.info(
                "to the own decoder's images of %d %s latents: PSNR %.2f dB, SSIM %.4f, L1 %.4f, sharpness %.3f",
                *(found.count, name, found.psnr_db, found.ssim, found.l1, found.sharpness_ratio),
            )
    log.info("bundle with a distilled decoder: %s (digest %s)", config.bundle_output, spec.digest[:12])


def describe(config: DistillConfig) -> str:
    """What distill_decoder would do."""
    bundle = distillation.check(config)
    return f"{distillation.describe_cost(config, bundle)}\n{describe_training(config)} → {config.bundle_output}"
