"""Cohorts with label maps, as labeller and renderer are trained on them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from brainsynth.config.labelling import LabellerTrainConfig, RendererTrainConfig
from brainsynth.errors import UserError
from brainsynth.labels import LabelTable
from brainsynth.plan import Plan
from brainsynth.reading.dataset import open_dataset
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import local_folder, open_store
from brainsynth.training.data import CACHE_BYTES, check_splits
from brainsynth.training.starting import with_start


class LabelledScans:
    """The scans of a split of a cohort, with their label maps: in memory once they were read, where that is small."""

    def __init__(self, cohort: str, split: str) -> None:
        self.cohort = open_dataset(cohort, split=split)
        voxels = math.prod(self.cohort.shape[1:]) * len(self.cohort)
        self._kept: dict[int, tuple[npt.NDArray[np.float16], npt.NDArray[np.uint8]]] | None = None
        if 3 * voxels <= CACHE_BYTES:
            self._kept = {}

    def __len__(self) -> int:
        return len(self.cohort)

    def scan(self, index: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
        """(X, Y, Z) intensities in [0, 1], and stored labels."""
        if self._kept is None:
            return self.cohort.volume(index), self.cohort.label_map(index)
        if index not in self._kept:
            self._kept[index] = self.cohort.volume(index).astype(np.float16), self.cohort.label_map(index)
        image, labels = self._kept[index]
        return image.astype(np.float32), labels


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a training on label maps starts from."""

    cohort: Plan
    labels: LabelTable
    uri: str
    fingerprint: str
    """Of images and label maps, and of the weights that it begins with."""

    def scans(self, split: str) -> LabelledScans:
        """A split of the cohort."""
        return LabelledScans(self.uri, split)


def check(config: LabellerTrainConfig | RendererTrainConfig, weights_file: str) -> Inputs:
    """Everything that can be refused before a worker starts, and what was read for it. Raises UserError.

    Args:
        weights_file: name of the network's weights in a training's folder and in a bundle.
    """
    plan = read_plan(open_store(config.cohort))
    if plan.labels is None:
        raise UserError(
            f"cohort: {config.cohort} has no label maps to learn from; prepare it again with label_column or label_folder "
            "in source (docs/labels.md)"
        )
    local_folder(config.output, "output")
    check_splits(config.cohort, "cohort")
    return Inputs(plan, plan.labels, config.cohort, with_start(plan.fingerprint, config.start_from, weights_file))
