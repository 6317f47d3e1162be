"""Train the labeller on a cohort with label maps: cross-entropy and soft Dice on boxes of augmented scans."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from brainsynth.bundle.labeller import LABELLER
from brainsynth.config.labelling import LabellerTrainConfig
from brainsynth.metrics.overlap import dice
from brainsynth.models.device import able, autocast, layout
from brainsynth.models.labeller import Labeller, VolumeLabeller, grid_places, padded
from brainsynth.models.patch_autoencoder import space_to_depth
from brainsynth.report.montage import grid
from brainsynth.training.data import batch_indices, weights_seed
from brainsynth.training.label_augmentation import augmented, mirrored_classes
from brainsynth.training.labelled import Inputs
from brainsynth.training.labelled import check as check_labelled
from brainsynth.training.learner import Learner
from brainsynth.training.loop import Worker
from brainsynth.training.losses import label_losses
from brainsynth.training.runner import Training
from brainsynth.training.runs import Finished, LabellerRun, write_weights
from brainsynth.training.starting import load_start

log = logging.getLogger(__name__)
VALIDATED_AT_MOST = 32
_AIR = 0.05  # share of the empty cells that a step learns from: they are half of a volume and all alike


class LabellerTask:
    """One step, validation and figures of the labeller."""

    def __init__(self, config: LabellerTrainConfig, inputs: Inputs, worker: Worker) -> None:
        self.config, self.cohort, self.table, self.worker = config, inputs.cohort, inputs.labels, worker
        options = config.optimisation
        self.precision = able(worker.device, options.precision)
        torch.manual_seed(weights_seed(options.seed))
        self.network = Labeller(config.architecture, len(self.table.labels) + 1)
        load_start(self.network, config.start_from, LABELLER.file, "labeller")
        layout(self.network.to(worker.device))
        self.learner = Learner(self.network, worker, options)
        self.state = self.learner.state("labeller")
        self.mirror = mirrored_classes(self.table) if config.augmentation.mirror else None
        if self.mirror is None and config.augmentation.mirror:
            log.warning("not mirrored: a structure of one side has no counterpart in the label table")
        self.class_of = torch.from_numpy(self.table.class_of)
        self.train, self.validation = inputs.scans("train"), inputs.scans("validation")

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """This worker's images (B, 1, X, Y, Z), classes (B, X, Y, Z) and places of a step, on its device."""
        options, spacing = self.config.optimisation, self.cohort.volume.spacing_mm
        multiple = self.network.coarsest
        boxes, places = [], []
        for index in self.worker.share(batch_indices(len(self.train), options.batch_size, step, options.seed)).tolist():
            image, labels = (torch.from_numpy(array)[None, None] for array in self.train.scan(index))
            image, classes = padded(image, multiple)[0, 0], self.class_of[padded(labels, multiple)[0, 0].long()]
            box = augmented(image, classes, self.config.augmentation, spacing, self.mirror, multiple)
            whole = grid_places([size // multiple for size in image.shape])
            first = [start // multiple for start in box.start]
            cells = [size // multiple for size in box.image.shape]
            boxes.append(box)
            places.append(whole[:, :, *(slice(f, f + n) for f, n in zip(first, cells, strict=True))])
        device = self.worker.device
        images = torch.stack([box.image for box in boxes])[:, None].to(device)
        return images, torch.stack([box.classes for box in boxes]).to(device), torch.cat(places).to(device)

    def step(self, step: int) -> dict[str, Tensor]:
        """One update."""
        images, classes, places = self.batch(step)
        cells = space_to_depth(classes[:, None], self.network.cell).movedim(1, -1).flatten(0, -2)
        tissue = space_to_depth(images, self.network.cell).amax(1).flatten() > 0
        chosen = (tissue | cells.any(1) | (torch.rand(len(cells), device=cells.device) < _AIR)).nonzero()[:, 0]
        with autocast(self.worker.device, self.precision):
            scores = self.learner.parallel(images, places)
        scores = scores.flatten(0, 3)[chosen].float()
        values = label_losses(scores.flatten(0, 1), cells[chosen].flatten(), self._balance(step))
        loss = values["cross_entropy"] + self.config.dice_weight * values["dice_loss"]
        values["gradient_norm"] = self.learner.update(loss)
        return {"loss": loss.detach(), **values}

    def _balance(self, step: int) -> float:
        """Falls to 0 by the middle of the training: structures that count for more than their size come out too large."""
        if self.config.start_from is not None:
            return 0.0
        return 0.5 * max(0.0, 1 - 2 * step / self.config.optimisation.steps)

    def labeller(self) -> VolumeLabeller:
        """The averaged weights, as generation uses them."""
        return VolumeLabeller(self.learner.averaged(), self.table.indices, self.worker.device)

    def validate(self) -> list[dict[str, float]]:
        """Dice of each structure, and their mean, of at most 32 validation scans, one at a time on the device."""
        labeller, rows = self.labeller(), []
        for index in self.worker.part(_spread(len(self.validation), VALIDATED_AT_MOST)):
            image, labels = self.validation.scan(index)
            scores = dice(labeller(image[None])[0], labels, self.table.indices).tolist()
            named = {f"dice_{label.key}": score for label, score in zip(self.table.labels, scores, strict=True)}
            there = {name: score for name, score in named.items() if math.isfinite(score)}
            rows.append({"dice": math.fsum(there.values()) / max(1, len(there))} | there)
        return rows

    def figures(self) -> dict[str, Any]:
        """Validation scans (top), their label maps, and those of the labeller (below)."""
        scans = [self.validation.scan(index) for index in range(min(4, len(self.validation)))]
        labeller, top = self.labeller(), max(self.table.indices)
        made = [labeller(image[None])[0] for image, _ in scans]
        rows: list[list[npt.NDArray[Any]]] = [
            [image for image, _ in scans],
            [labels / top for _, labels in scans],
            [labels / top for labels in made],
        ]
        return {"labels": grid([[np.asarray(one, np.float32) for one in row] for row in rows])}

    def record(self, finished: Finished) -> LabellerRun:
        """Write the averaged weights; returns the record of the training."""
        return LabellerRun(
            config_digest=finished.config_digest,
            architecture=self.config.architecture,
            volume=self.cohort.volume,
            labels=self.table,
            cohort_fingerprint=self.cohort.fingerprint,
            scans=len(self.train),
            validation_scans=len(_spread(len(self.validation), VALIDATED_AT_MOST)),
            steps=self.config.optimisation.steps,
            weights_sha256=write_weights(self.learner.averaged(), self.worker.folder / LABELLER.file),
            metrics=finished.metrics,
            elapsed_s=finished.elapsed_s,
        )


def _spread(count: int, at_most: int) -> list[int]:
    """Evenly spread positions: cohorts are often sorted."""
    return [int(i) for i in np.unique(np.linspace(0, count - 1, min(count, at_most)).round())]


def check(config: LabellerTrainConfig) -> Inputs:
    """Everything that can be refused before a worker starts, and what was read for it. Raises UserError."""
    return check_labelled(config, LABELLER.file)


TRAINING = Training("labeller", check, LabellerTask, LabellerRun)
