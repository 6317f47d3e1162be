"""TorchIO: every volume a `Subject`, read when its data is asked for. Needs torchio (`pip install torchio`)."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torchio

from brainsynth.reading.torch import read_tensor
from brainsynth.reading.volumes import Volumes


class VolumeLabels(torchio.LabelMap):
    """A LabelMap of the same kind as VolumeImage."""

    def __init__(self, *arguments: Any, verify_path: bool = False, **options: Any) -> None:
        super().__init__(*arguments, verify_path=False, **options)  # type: ignore[no-untyped-call]


class VolumeImage(torchio.ScalarImage):
    """A ScalarImage whose `path` names a volume and is not a file: TorchIO looks for one whenever it copies or crops."""

    def __init__(self, *arguments: Any, verify_path: bool = False, **options: Any) -> None:
        super().__init__(*arguments, verify_path=False, **options)  # type: ignore[no-untyped-call]


def subjects_dataset(dataset: Volumes, transform: Any = None) -> torchio.SubjectsDataset:
    """Subjects with `t1w`, a ScalarImage (1, X, Y, Z), `sample_id` and the covariates; with label maps also `labels`, a
    LabelMap.
    """
    subjects = []
    for index in range(len(dataset)):
        facts = dataset.facts(index)
        del facts["affine"]
        name = f"{facts['sample_id']}.brainsynth"  # TorchIO wants a path; the reader knows better
        image = VolumeImage(name, reader=functools.partial(_read, dataset, index))
        if dataset.has_labels:
            facts["labels"] = VolumeLabels(name, reader=functools.partial(_read_labels, dataset, index))
        subjects.append(torchio.Subject(t1w=image, **facts))
    return torchio.SubjectsDataset(subjects, transform=transform)


def _read(dataset: Volumes, index: int, path: Any) -> tuple[torch.Tensor, Any]:
    return read_tensor(dataset, index)[None], dataset.affine.copy()


def _read_labels(dataset: Volumes, index: int, path: Any) -> tuple[torch.Tensor, Any]:
    return torch.from_numpy(dataset.label_map(index))[None], dataset.affine.copy()
