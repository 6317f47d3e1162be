"""A bundle's renderer on disk: it makes images of label maps that a user brings."""

from __future__ import annotations

from typing import Literal

from brainsynth.bundle.companion import Companion
from brainsynth.bundle.labeller import LABELLER, LabellerSpec
from brainsynth.config.architectures import RendererArchitecture
from brainsynth.covariates.schema import CovariateSchema
from brainsynth.labels import LabelTable
from brainsynth.records import digest, record
from brainsynth.volume import VolumeSpec


@record
class RendererSpec:
    """A trained renderer: which structures it knows, on which grid, and how near its images come to scans."""

    schema_version: Literal[1] = 1
    architecture: RendererArchitecture
    labels: LabelTable
    volumes_ml: dict[str, tuple[float, float]]
    """Smallest and largest volume of each structure in the label maps that it was trained on, by its key."""
    covariates: CovariateSchema
    """Which it may be asked for."""
    volume: VolumeSpec
    """The grid that it was trained on; its stored dtype does not matter."""
    weights_sha256: str
    provenance: dict[str, str | int | float]
    metrics: dict[str, float]
    """Of images of validation scans' label maps, compared with the scans."""

    @property
    def digest(self) -> str:
        """sha256 of the record; covers the weights through theirs."""
        return digest(self)


RENDERER = Companion("renderer", RendererSpec, "render", "name another bundle")
COMPANIONS: tuple[Companion[LabellerSpec] | Companion[RendererSpec], ...] = (LABELLER, RENDERER)
