"""Trained runs → bundle."""

from __future__ import annotations

import logging

from brainsynth.config.schema import (
    ExportConfig,
)
from brainsynth.gate.fit import reference_rows, write_gate
from brainsynth.stages.bundle import export_bundle, plan_bundle

log = logging.getLogger(__name__)


def run(config: ExportConfig) -> None:
    """Trained runs → bundle."""
    describe(config)  # everything that can be refused
    spec = export_bundle(config, write_gate)
    log.info("bundle %s: %s (digest %s)", spec.name, config.output, spec.digest[:12])


def describe(config: ExportConfig) -> str:
    """What make_bundle would write."""
    _, folder, spec = plan_bundle(config)
    gate = ""
    if config.gate is not None:
        gate = f" and a quality gate fitted on {len(reference_rows(config.gate, spec)[1])} people's {config.gate.reference}"
    return f"bundle {spec.name} (digest {spec.digest[:12]}), {len(spec.weights)} weight files{gate} → {folder}"
