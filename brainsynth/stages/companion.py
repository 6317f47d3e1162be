"""Labeller or renderer → bundle: what a training left, as it stands next to a bundle."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Generic, TypeVar

from brainsynth.bundle.companion import Companion, CompanionSpec
from brainsynth.bundle.labeller import LABELLER, LabellerSpec
from brainsynth.bundle.renderer import RENDERER, RendererSpec
from brainsynth.errors import UserError
from brainsynth.labels import LabelTable
from brainsynth.stages.new_bundle import in_float16
from brainsynth.storage.whole_file import file_sha256
from brainsynth.training.runs import LabellerRun, RendererRun, read_run
from brainsynth.volume import VolumeSpec

S = TypeVar("S", bound=CompanionSpec)


@dataclasses.dataclass(frozen=True)
class Planned(Generic[S]):
    """A trained network as a bundle gets it."""

    kind: Companion[S]
    spec: S
    data: bytes
    """Its file."""

    def write(self, folder: Path) -> None:
        """Put it into a bundle's folder."""
        self.kind.write(folder, self.spec, self.data)


AnyPlanned = Planned[LabellerSpec] | Planned[RendererSpec]


def plan_labeller(source: Path, folder: Path, volume: VolumeSpec, *, half: bool) -> Planned[LabellerSpec]:
    """A trained labeller for a bundle. Raises UserError where it does not fit the bundle.

    Args:
        source: output folder of the training.
        folder: of the bundle, which may have this labeller already.
        volume: the bundle's grid.
        half: store its weights in float16.
    """
    run = read_run(source, LabellerRun, "train-labeller")
    data = _trained(source / LABELLER.file, run.weights_sha256, half)
    spec = LabellerSpec(
        architecture=run.architecture,
        labels=_table(run.labels, f"brainsynth labeller, trained on: {run.labels.source}"),
        volume=run.volume,
        weights_sha256=hashlib.sha256(data).hexdigest(),
        provenance=_provenance(run),
        dice={key.removeprefix("dice_"): value for key, value in run.metrics.items() if key.startswith("dice_")},
        dice_scans=run.validation_scans,
    )
    return _fitting(Planned(LABELLER, spec, data), folder, volume)


def plan_renderer(source: Path, folder: Path, volume: VolumeSpec, *, half: bool) -> Planned[RendererSpec]:
    """A trained renderer for a bundle; the same arguments."""
    run = read_run(source, RendererRun, "train-renderer")
    data = _trained(source / RENDERER.file, run.weights_sha256, half)
    spec = RendererSpec(
        architecture=run.architecture,
        labels=_table(run.labels, run.labels.source),
        structures=run.structures,
        covariates=run.covariates,
        volume=run.volume,
        weights_sha256=hashlib.sha256(data).hexdigest(),
        provenance=_provenance(run),
        metrics=run.metrics,
    )
    return _fitting(Planned(RENDERER, spec, data), folder, volume)


def _trained(path: Path, sha256: str, half: bool) -> bytes:
    """A training's weights file, checked. Raises UserError."""
    if not path.is_file() or file_sha256(path) != sha256:
        raise UserError(f"{path} is missing or is not the file that run.json names; train again or copy it again")
    return in_float16(path) if half else path.read_bytes()


def _table(labels: LabelTable, source: str) -> LabelTable:
    """The table without the integers of the files that the cohort was prepared from."""
    return LabelTable(labels=tuple(dataclasses.replace(label, values=()) for label in labels.labels), source=source)


def _provenance(run: LabellerRun | RendererRun) -> dict[str, str | int | float]:
    return {
        "config": run.config_digest,
        "cohort_fingerprint": run.cohort_fingerprint,
        "scans": run.scans,
        "steps": run.steps,
    }


def _fitting(planned: Planned[S], folder: Path, volume: VolumeSpec) -> Planned[S]:
    kind = planned.kind
    kind.check_grid(planned.spec.volume, volume)
    if kind.is_in(folder) and kind.read(folder).digest != planned.spec.digest:
        raise UserError(f"{kind.name}: {folder} holds another {kind.name}; give another output folder")
    return planned
