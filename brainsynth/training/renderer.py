"""Train a renderer on a cohort with label maps, as training/adversarial.py says: crops of scans, given their labels."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import avg_pool3d

from brainsynth.bundle.renderer import RENDERER, structure_ranges
from brainsynth.config.labelling import RendererTrainConfig
from brainsynth.covariates.schema import CovariateSchema
from brainsynth.labels import LabelTable
from brainsynth.models.labeller import padded
from brainsynth.models.renderer import CELL, MapRenderer, Renderer, RendererCritic
from brainsynth.training.adversarial import AdversarialTask
from brainsynth.training.crops import ScanCrops, check_balance, degrade
from brainsynth.training.data import weights_seed
from brainsynth.training.label_augmentation import mirrored_classes
from brainsynth.training.labelled import Inputs, LabelledScans
from brainsynth.training.labelled import check as check_labelled
from brainsynth.training.loop import Worker
from brainsynth.training.losses import excess_energy, gradient_difference
from brainsynth.training.runner import Training
from brainsynth.training.runs import Finished, RendererRun, write_weights
from brainsynth.training.starting import load_start

log = logging.getLogger(__name__)


@dataclasses.dataclass
class LabelledBatch:
    """Crops of scans, and what generator and critic see of them."""

    target: Tensor
    classes: Tensor
    """(B, X, Y, Z) uint8: 0 is background, k the k-th label of the table."""
    places: Tensor
    context: Tensor
    coarse: Tensor
    """Averages of the target; empty where the renderer takes none."""
    degraded: Tensor
    """With noise."""
    shown: Tensor
    """(B,) 1 where the renderer sees them, else 0."""

    @property
    def condition(self) -> tuple[Tensor, ...]:
        """Classes, places, covariates, and averages if there are any."""
        averages = (self.degraded, self.shown) if self.coarse.numel() else ()
        return self.classes, self.places, self.context, *averages


class LabelledCrops(ScanCrops):
    """Crops of a split's scans with their label maps, mirrored or not."""

    def __init__(
        self, scans: LabelledScans, config: RendererTrainConfig, schema: CovariateSchema, table: LabelTable
    ) -> None:
        super().__init__(scans.cohort, schema, config.crops.cells, config.crops.balance)
        self.scans, self.architecture, self.config = scans, config.architecture, config
        self.multiple = max(CELL, config.architecture.coarse)
        self.class_of = torch.from_numpy(table.class_of)
        self.other_side = mirrored_classes(table) if config.flip_left_right else None

    def batches(self, scans: npt.NDArray[np.int64] | Tensor) -> list[LabelledBatch]:
        """A crop of each of these scans; one batch, for the one generator."""
        crops, classes, places = zip(*(self._crop(int(index)) for index in scans), strict=True)
        target, context = torch.stack(crops)[:, None], self.shown(self.contexts[scans])
        coarse = degraded = shown = target.new_zeros(0)
        if self.architecture.coarse:
            coarse = avg_pool3d(target, self.architecture.coarse)
            degraded = degrade(coarse, self.config.crops.noise * torch.rand(len(target)))
            shown = (torch.rand(len(target)) < self.config.coarse_share).float()
        return [LabelledBatch(target, torch.stack(classes), torch.stack(places), context, coarse, degraded, shown)]

    def _crop(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        image, labels = (
            padded(torch.from_numpy(one)[None, None], self.multiple)[0, 0] for one in self.scans.scan(index)
        )
        image, classes = image * self.architecture.intensity_scale, self.class_of[labels.long()]
        if self.other_side is not None and torch.rand(()) < 0.5:
            image, classes = image.flip(0), self.other_side[classes.flip(0).long()].to(torch.uint8)
        where, places = self.place(image, CELL)
        return image[where], classes[where], places


class RendererTask(AdversarialTask[Renderer, LabelledBatch]):
    """What is a renderer's own: it is given the labels."""

    name, pictures = "renderer", "rendered"

    def __init__(self, config: RendererTrainConfig, inputs: Inputs, worker: Worker) -> None:
        self.config, self.inputs = config, inputs
        classes, size = len(inputs.labels.labels) + 1, inputs.cohort.covariates.context_size
        torch.manual_seed(weights_seed(config.optimisation.seed))
        network = Renderer(config.architecture, classes, size)
        load_start(network, config.start_from, RENDERER.file, self.name)
        critic = RendererCritic(config.losses.discriminator_channels, config.architecture, classes, size)
        super().__init__(config, config.crops, worker, network, [critic])
        if config.flip_left_right and mirrored_classes(inputs.labels) is None:
            log.warning("not mirrored: a structure of one side has no counterpart in the label table")

    def split(self, split: str) -> LabelledCrops:
        """The crops of a split."""
        return LabelledCrops(self.inputs.scans(split), self.config, self.inputs.cohort.covariates, self.inputs.labels)

    def distances(
        self, batches: list[LabelledBatch], made: list[Tensor], share: float
    ) -> tuple[dict[str, Tensor], Tensor]:
        """To the scan, with what noise it has not, and of the averages that were shown to the result's."""
        values, loss = super().distances(batches, made, share)
        ((batch,), (volume,)) = batches, made
        values["gradient"] = gradient_difference(volume, batch.target, 1)
        values["energy"] = excess_energy(volume, batch.target)
        weights = self.config.losses
        loss = loss + weights.gradient_weight * values["gradient"] + weights.energy_weight * values["energy"]
        if not batch.coarse.numel():
            return values, loss
        apart = (avg_pool3d(volume, self.config.architecture.coarse) - batch.coarse).abs().flatten(1).mean(1)
        pooled = (apart * batch.shown).mean()
        return values | {"pooled": pooled}, loss + self.config.crops.pooled_weight * pooled

    def made(self, network: Renderer, index: int) -> tuple[Tensor, Tensor]:
        """A validation scan and the image of its label map, as `brainsynth render` makes it with seed 0."""
        crops = self.splits["validation"]
        assert isinstance(crops, LabelledCrops)
        image, labels = crops.scans.scan(index)
        rendered = MapRenderer(network, self.inputs.labels, self.worker.device)(
            labels, crops.contexts[index].numpy(), 0
        )
        return torch.from_numpy(image)[None, None], torch.from_numpy(rendered)[None, None]

    def record(self, finished: Finished) -> RendererRun:
        """Write the averaged weights; returns the record of the training."""
        scans = self.splits["train"]
        assert isinstance(scans, LabelledCrops)
        table, volume = self.inputs.labels, self.inputs.cohort.volume
        maps = (scans.dataset.label_map(index) for index in range(len(scans)))
        return RendererRun(
            config_digest=finished.config_digest,
            architecture=self.config.architecture,
            volume=volume,
            labels=table,
            structures=structure_ranges(maps, table, volume),
            covariates=self.inputs.cohort.covariates,
            cohort_fingerprint=self.inputs.cohort.fingerprint,
            scans=len(scans),
            steps=self.config.optimisation.steps,
            weights_sha256=write_weights(self.learner.averaged(), self.worker.folder / RENDERER.file),
            metrics=finished.metrics,
            elapsed_s=finished.elapsed_s,
        )


def check(config: RendererTrainConfig) -> Inputs:
    """Everything that can be refused before a worker starts, and what was read for it. Raises UserError."""
    inputs = check_labelled(config, RENDERER.file)
    check_balance(config.crops, inputs.cohort.covariates)
    return inputs


TRAINING = Training("renderer", check, RendererTask, RendererRun)
