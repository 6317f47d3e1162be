"""Train local generators on crops: L1 at first, then with a critic of each of them.

The critic's loss is relativistic (1807.00734, with the gradient penalty of 2501.05441 by finite differences): how much more
like a scan does the real crop look than the generated one, given the same condition?
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import relu, softplus

from brainsynth.config.labelling import RendererTrainConfig
from brainsynth.config.training import AutoencoderTrainConfig, CropsConfig
from brainsynth.models.critic import LocalCritic
from brainsynth.models.device import able, autocast, layout
from brainsynth.report.montage import grid
from brainsynth.training.image_quality import closeness, sharpness
from brainsynth.training.learner import Learner, adamw, descend
from brainsynth.training.loop import Worker
from brainsynth.training.state import TrainingState

VALIDATED, JUDGED = 8, 12
"""Scans that are made in a validation, and crops of each split that the critics judge then."""
PROBE = 0.02
"""SD of the noise that must not change a critic's mind."""
CRITIC_CLIP = 5.0
Values = dict[str, Tensor]
N = TypeVar("N", bound=nn.Module)
"""Its `forward` takes the conditions of the batches and returns a volume for each; from fresh noise, may be negative."""


class Batch(Protocol):
    """Crops: a dataclass of tensors."""

    target: Tensor

    @property
    def condition(self) -> tuple[Tensor, ...]:
        """What generator and critic see."""


B = TypeVar("B", bound=Batch)


class Split(Protocol[B]):
    """Draws the crops of a split, by torch's random numbers."""

    def __len__(self) -> int:
        """Number of scans."""

    def indices(self, batch_size: int, step: int, seed: int) -> npt.NDArray[np.int64]:
        """The scans of a global batch."""

    def batches(self, scans: npt.NDArray[np.int64] | Tensor) -> list[B]:
        """For each generator a crop of each of these scans."""


class AdversarialTask(abc.ABC, Generic[N, B]):
    """One step, validation and figures of generators, all of which take part in every step."""

    name: ClassVar[str]
    """Of the network, in checkpoints."""
    pictures: ClassVar[str]
    """Name of the figure."""

    def __init__(
        self,
        config: AutoencoderTrainConfig | RendererTrainConfig,
        crops: CropsConfig,
        worker: Worker,
        network: N,
        critics: Sequence[LocalCritic],
    ) -> None:
        self.worker, self.options, self.losses, self.crops_config = worker, config.optimisation, config.losses, crops
        self.precision = able(worker.device, self.options.precision)
        layout(network.to(worker.device))
        self.critics = Critics(critics)
        layout(self.critics.to(worker.device))
        self.learner = Learner(network, worker, self.options)
        self._critics = worker.parallel(self.critics)
        rate = self.losses.discriminator_learning_rate
        self.critic_optimizer = adamw(self.critics, rate, 0.0, betas=(0.0, 0.99))
        self.critic_optimizer.param_groups[0]["lr_factor"] = rate / self.options.learning_rate
        self.state = TrainingState(
            {self.name: network, "discriminator": self.critics},
            {self.name: self.learner.average},
            {self.name: self.learner.optimizer, "discriminator": self.critic_optimizer},
        )
        self.splits: dict[str, Split[B]] = {split: self.split(split) for split in ("train", "validation")}

    @abc.abstractmethod
    def split(self, split: str) -> Split[B]:
        """The crops of a split."""

    @abc.abstractmethod
    def made(self, network: N, index: int) -> tuple[Tensor, Tensor]:
        """A whole validation scan and what the network makes of what it is given of it, always with the same noise."""

    def step(self, step: int) -> Values:
        """One update of all generators, and of their critics once they take part."""
        options, weights, crops = self.options, self.losses, self.splits["train"]
        scans = self.worker.share(crops.indices(options.batch_size, step, options.seed))
        batches = [self._on_device(batch) for batch in crops.batches(scans)]
        since = step - weights.adversarial_start if weights.adversarial_weight > 0 else -1
        self._pace(critics=since >= 0)
        alone = self.crops_config.critics_alone
        # A generator that was trained with critics before would lose its texture to the L1 in the meantime.
        rest = 0 <= since < alone
        with autocast(self.worker.device, self.precision), torch.set_grad_enabled(not rest):
            made = [volume.float() for volume in self.learner.parallel([batch.condition for batch in batches])]
        share = min(1.0, max(0.0, (since - alone + 1) / max(1, alone)))
        values, loss = self.distances(batches, made, share)
        seen = [relu(volume) for volume in made]
        if share > 0:
            judged, matched = self._judged(batches, seen)
            values |= {"adversarial": judged, "matching": matched}
            loss = loss + share * (weights.adversarial_weight * judged + self.crops_config.matching_weight * matched)
        values["gradient_norm"] = loss.new_zeros(()) if rest else self.learner.update(loss)
        if since >= 0:
            values |= self._critic_step(batches, [volume.detach() for volume in seen])
        return {"loss": loss, **values}

    def _on_device(self, batch: B) -> B:
        moved = {name: value.to(self.worker.device) for name, value in vars(batch).items()}
        return type(batch)(**moved)

    def _pace(self, critics: bool) -> None:
        """Without momentum, and in smaller steps, where critics take part: what they say changes with every step."""
        for group in self.learner.optimizer.param_groups:
            group["betas"] = (0.0 if critics else 0.9, 0.99)
            if critics:
                group["lr"] /= 3

    def distances(self, batches: list[B], made: list[Tensor], share: float) -> tuple[Values, Tensor]:
        """To the scan, less and less as the critics come in."""
        l1, square = made[0].new_zeros(2)
        for batch, volume in zip(batches, made, strict=True):
            l1 = l1 + (volume - batch.target).abs().mean()
            square = square + (volume - batch.target).square().mean()
        alone = 1 - share
        loss = (alone + share * self.crops_config.l1_weight) * l1 + alone * self.losses.square_weight * square
        return {"l1": l1}, loss

    def _judged(self, batches: list[B], made: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The adversarial loss and the distance of features, with gradients to the generated crops alone."""
        frozen = {name: parameter.detach() for name, parameter in self.critics.named_parameters()}
        conditions = [batch.condition for batch in batches]
        with autocast(self.worker.device, self.precision):
            with torch.no_grad():
                of_scans = self.critics([batch.target for batch in batches], conditions)
            of_made = functional_call(self.critics, frozen, (made, conditions))
        adversarial = matching = made[0].new_zeros(())
        for (real, real_features), (generated, features) in zip(of_scans, of_made, strict=True):
            for x, y in zip(real, generated, strict=True):
                adversarial = adversarial + softplus(x.float() - y.float()).mean()
            for x, y in zip(real_features[1:], features[1:], strict=True):
                matching = matching + (x.float() - y.float()).abs().mean() / len(features)
        return adversarial, matching

    def _critic_step(self, batches: list[B], made: list[Tensor]) -> Values:
        """Real crops should look more real than generated ones; a little noise should change nothing."""
        both = [torch.cat([batch.target, volume]) for batch, volume in zip(batches, made, strict=True)]
        probed = [torch.cat([pair, pair + PROBE * torch.randn_like(pair)]) for pair in both]
        with autocast(self.worker.device, self.precision):
            judged = self._critics(probed, [_repeated(batch, 4) for batch in batches])
        loss = penalty = made[0].new_zeros(())
        for logits, _ in judged:
            for real, generated, real_again, generated_again in (part.float().chunk(4) for part in logits):
                loss = loss + softplus(generated - real).mean()
                change = torch.cat([real_again - real, generated_again - generated])
                penalty = penalty + change.square().mean()
        total = loss + self.crops_config.penalty_weight * penalty
        descend(total, self.critics, self.critic_optimizer, CRITIC_CLIP)
        return {"discriminator": loss.detach(), "penalty": penalty.detach()}

    def validate(self) -> list[dict[str, float]]:
        """L1, PSNR, SSIM and sharpness ratio of whole scans that are made, and the critics' gap.

        The gap is what critics give real crops more than generated ones. Where it is much larger on training scans, the
        critics know them by heart.
        """
        network, rows = self.learner.averaged(), []
        for index in self.worker.part(range(min(VALIDATED, len(self.splits["validation"])))):
            x, made = self.made(network, index)
            rows.append({**closeness(made, x), "sharpness_ratio": sharpness(made) / max(sharpness(x), 1e-12)})
        if self.worker.rank == 0:
            rows.append({f"critic_gap_{split}": self._gap(network, crops) for split, crops in self.splits.items()})
        return rows

    @torch.no_grad()
    def _gap(self, network: N, crops: Split[B]) -> float:
        """Mean difference of the logits of real and generated crops, the same crops and noise every time."""
        with torch.random.fork_rng([]):
            torch.manual_seed(1)
            batches = [self._on_device(batch) for batch in crops.batches(crops.indices(JUDGED, 0, 1))]
            made = [relu(volume.float()) for volume in network([batch.condition for batch in batches])]
        both = [torch.cat([batch.target, volume]) for batch, volume in zip(batches, made, strict=True)]
        judged = self.critics(both, [_repeated(batch, 2) for batch in batches])
        pairs = [part.float().chunk(2) for logits, _ in judged for part in logits]
        return float(torch.stack([(real - generated).mean() for real, generated in pairs]).mean())

    def figures(self) -> dict[str, Any]:
        """Validation scans (top) and what is made of them (below)."""
        network, count = self.learner.averaged(), min(4, len(self.splits["validation"]))
        pairs = [self.made(network, index) for index in range(count)]
        rows = [[x[0, 0].cpu().numpy() for x in row] for row in zip(*pairs, strict=True)]
        return {self.pictures: grid(rows)}


class Critics(nn.Module):
    """A critic for each generator."""

    def __init__(self, critics: Sequence[LocalCritic]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(critics)

    def forward(self, volumes: list[Tensor], conditions: list[tuple[Tensor, ...]]) -> list[Any]:
        """Of each generator logits and features."""
        return [c(v, *rest) for c, v, rest in zip(self.stages, volumes, conditions, strict=True)]


def _repeated(batch: Batch, times: int) -> tuple[Tensor, ...]:
    """The condition of several sets of the same crops."""
    return tuple(torch.cat([part] * times) for part in batch.condition)
