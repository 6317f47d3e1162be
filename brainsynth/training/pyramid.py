"""Train the generators of a pyramid, one a stage, as training/adversarial.py says."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool3d

from brainsynth.bundle.spec import AUTOENCODER_FILE
from brainsynth.config.architectures import PyramidArchitecture
from brainsynth.config.training import AutoencoderTrainConfig, CropsConfig
from brainsynth.models.critic import Critic
from brainsynth.models.pyramid import PyramidAutoencoder
from brainsynth.plan import Plan
from brainsynth.reading.dataset import open_dataset
from brainsynth.training.adversarial import AdversarialTask, Values
from brainsynth.training.crops import Batch, Crops
from brainsynth.training.data import weights_seed
from brainsynth.training.loop import Worker
from brainsynth.training.runs import AutoencoderRun, Finished, write_autoencoder
from brainsynth.training.starting import load_start


class PyramidTask(AdversarialTask[PyramidAutoencoder, Batch]):
    """What is a pyramid's own: it is given the coarse volume, whose cells the result must average to."""

    name, pictures = "autoencoder", "reconstructions"

    def __init__(self, config: AutoencoderTrainConfig, cohort: Plan, worker: Worker) -> None:
        assert isinstance(config.architecture, PyramidArchitecture)
        self.config, self.cohort, self.architecture = config, cohort, config.architecture
        self.crops = config.crops or CropsConfig()
        size = cohort.covariates.context_size
        torch.manual_seed(weights_seed(config.optimisation.seed))
        network = PyramidAutoencoder(self.architecture, size)
        load_start(network, config.start_from, AUTOENCODER_FILE, "autoencoder")
        critics = [Critic(config.losses.discriminator_channels, size) for _ in self.architecture.stages]
        super().__init__(config, self.crops, worker, network, critics)

    def split(self, split: str) -> Crops:
        """The crops of a split."""
        dataset, mirror = open_dataset(self.config.cohort, split=split), self.config.flip_left_right
        return Crops(dataset, self.cohort.covariates, self.architecture, self.crops, mirror)

    def distances(self, batches: list[Batch], made: list[Tensor], share: float) -> tuple[Values, Tensor]:
        """To the scan, and of the averages to the coarse volume."""
        values, loss = super().distances(batches, made, share)
        pooled = made[0].new_zeros(())
        for batch, volume in zip(batches, made, strict=True):
            pooled = pooled + (avg_pool3d(volume, 2) - batch.coarse).abs().mean()
        return values | {"pooled": pooled}, loss + self.crops.pooled_weight * pooled

    @torch.no_grad()
    def made(self, network: PyramidAutoencoder, index: int) -> tuple[Tensor, Tensor]:
        """A validation scan and what is made of its averages, with the same noise for all: what the bundle will do."""
        crops = self.splits["validation"]
        assert isinstance(crops, Crops)
        x = torch.from_numpy(crops.dataset.volume(index))[None, None].to(self.worker.device)
        context = crops.contexts[index : index + 1].to(self.worker.device)
        return x, network.decode(network.encode(x)[0], context, [0]).float().clamp(0, 1)

    def record(self, finished: Finished) -> AutoencoderRun:
        """Write the averaged weights; returns the record of the training."""
        return write_autoencoder(self.learner.averaged(), self.worker.folder, self.config, self.cohort, finished)
