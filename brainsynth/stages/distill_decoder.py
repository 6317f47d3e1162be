"""Bundle → the same bundle with a distilled decoder next to its own."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from brainsynth.bundle.files import bundle_folder, read_bundle
from brainsynth.bundle.spec import DECODER_FILE, BundleSpec
from brainsynth.config.distillation import DistillConfig
from brainsynth.executors.ray_train import describe_training, train
from brainsynth.stages.export_bundle import bundle_output, write_distilled
from brainsynth.storage.filesystem import local_folder
from brainsynth.training.distillation import TRAINING, describe_cost
from brainsynth.training.runs import DistillRun, read_run

log = logging.getLogger(__name__)
_DISTILLED = ("distilled_from", "distilled_config")


def run(config: DistillConfig) -> None:
    """Bundle → the same bundle with a distilled decoder; harmless to repeat."""
    _output(config)
    train(TRAINING, config)
    spec = _export(config)
    assert spec.distilled is not None
    for name, fidelity in (("generated", spec.distilled.on_generated), ("encoded", spec.distilled.on_encoded)):
        if fidelity is not None:
            log.info(
                "against the bundle's own decoder on %d %s latents: PSNR %.2f dB, SSIM %.4f, L1 %.4f, sharpness %.3f",
                fidelity.count,
                name,
                fidelity.psnr_db,
                fidelity.ssim,
                fidelity.l1,
                fidelity.sharpness_ratio,
            )
    log.info("bundle with a distilled decoder: %s (digest %s)", config.bundle_output, spec.digest[:12])


def describe(config: DistillConfig) -> str:
    """What distill-decoder would do."""
    _output(config)
    bundle = TRAINING.check(config).bundle
    return f"{describe_cost(config, bundle)}\n{describe_training(config)} → {config.bundle_output}"


def _output(config: DistillConfig) -> Path:
    """The folder of the new bundle. Raises UserError when it cannot go there."""
    old = without_decoder(read_bundle(bundle_folder(config.bundle)))
    return bundle_output(config, lambda there: without_decoder(there) == old)


def without_decoder(spec: BundleSpec) -> BundleSpec:
    """A bundle's record as it was before a distilled decoder joined."""
    weights = {name: sha for name, sha in spec.weights.items() if name != DECODER_FILE}
    provenance = {key: value for key, value in spec.provenance.items() if key not in _DISTILLED}
    return dataclasses.replace(spec, distilled=None, weights=weights, provenance=provenance)


def _export(config: DistillConfig) -> BundleSpec:
    """The bundle with the finished training's decoder in it."""
    source, trained = bundle_folder(config.bundle), local_folder(config.output, "output")
    run = read_run(trained, DistillRun, "distill-decoder")
    plain = without_decoder(read_bundle(source))
    spec = dataclasses.replace(
        plain,
        distilled=run.distilled,
        weights={**plain.weights, **run.weights},
        provenance={**plain.provenance, "distilled_from": run.bundle_digest, "distilled_config": run.config_digest},
    )
    return write_distilled(_output(config), spec, source, trained, DECODER_FILE)
