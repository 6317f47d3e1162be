"""Crops of scans at every phase of the grid; for the stages of a pyramid mirrored or not, the coarse volume noised."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import avg_pool3d, relu

from brainsynth.config.architectures import PyramidArchitecture
from brainsynth.config.training import CropsConfig
from brainsynth.covariates.schema import CovariateSchema
from brainsynth.errors import UserError
from brainsynth.models.diffusion import drop_context
from brainsynth.models.pyramid import place_of
from brainsynth.reading.dataset import SyntheticDataset
from brainsynth.training.data import batch_indices

_FOREGROUND, _ENOUGH, _TRIES = 0.1, 0.35, 20
"""At least this share of a crop is brighter than this, if one of the tries has such a crop."""
_WITHOUT_NOISE, _WITHOUT_COVARIATES = 0.2, 0.1
"""Shares of crops whose coarse volume is exact, and whose covariates are not shown."""


@dataclass
class Batch:
    """Crops of one stage: the target, its averages, and what generator and critic see."""

    target: Tensor
    coarse: Tensor
    degraded: Tensor
    level: Tensor
    places: Tensor
    context: Tensor

    @property
    def condition(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The coarse volume with noise, its level, places, covariates."""
        return self.degraded, self.level, self.places, self.context


class ScanCrops:
    """Where crops of a split's scans are, and what is known of the scans; draws by torch's random numbers."""

    def __init__(self, dataset: SyntheticDataset, schema: CovariateSchema, cells: int, balance: str | None) -> None:
        self.dataset, self.cells = dataset, cells
        self.contexts = torch.from_numpy(schema.encode(dataset.table))
        self.hide = _WITHOUT_COVARIATES if schema.missing == "indicator" else 0.0
        self.order = _balanced(dataset, balance)

    def __len__(self) -> int:
        return len(self.dataset)

    def indices(self, batch_size: int, step: int, seed: int) -> npt.NDArray[np.int64]:
        """The scans of a global batch."""
        return self.order[batch_indices(len(self.order), batch_size, step, seed)]

    def shown(self, contexts: Tensor) -> Tensor:
        """Covariates of crops, some of them not shown."""
        return drop_context(contexts, torch.rand(len(contexts)) < self.hide)

    def place(self, volume: Tensor, factor: int) -> tuple[tuple[slice, ...], Tensor]:
        """A crop anywhere in a volume, and the places of its cells of `factor` voxels along each axis."""
        grid = [size // factor for size in volume.shape]
        shape = [min(self.cells, size) for size in grid]
        for _ in range(_TRIES):
            origin = [
                int(torch.randint(0, size - n * factor + 1, ())) for size, n in zip(volume.shape, shape, strict=True)
            ]
            crop = tuple(slice(o, o + n * factor) for o, n in zip(origin, shape, strict=True))
            if (volume[crop][::4, ::4, ::4] > _FOREGROUND).float().mean() > _ENOUGH:
                break
        return crop, place_of(shape, [o / factor for o in origin], grid)


class Crops(ScanCrops):
    """Those of a pyramid; reads scans when they are needed and keeps none."""

    def __init__(
        self,
        dataset: SyntheticDataset,
        schema: CovariateSchema,
        architecture: PyramidArchitecture,
        config: CropsConfig,
        mirror: bool,
    ) -> None:
        super().__init__(dataset, schema, config.cells, config.balance)
        self.architecture, self.noise, self.mirror = architecture, config.noise, mirror

    def batches(self, scans: npt.NDArray[np.int64] | Tensor) -> list[Batch]:
        """For each stage, from the coarsest on, a crop of each of these scans."""
        volumes = [torch.from_numpy(self.dataset.volume(int(i))) * self.architecture.intensity_scale for i in scans]
        if self.mirror:
            volumes = [v.flip(0) if torch.rand(()) < 0.5 else v for v in volumes]
        count = len(self.architecture.stages)
        return [self._stage(volumes, self.contexts[scans], 1 << (count - stage)) for stage in range(count)]

    def _stage(self, volumes: list[Tensor], contexts: Tensor, factor: int) -> Batch:
        """`factor`: voxels of a coarse cell along each axis."""
        where, places = zip(*(self.place(volume, factor) for volume in volumes), strict=True)
        target = torch.stack([volume[crop] for volume, crop in zip(volumes, where, strict=True)])[:, None]
        if factor > 2:
            target = avg_pool3d(target, factor // 2)
        coarse = avg_pool3d(target, 2)
        level = self.noise * torch.rand(len(target)) * (torch.rand(len(target)) > _WITHOUT_NOISE)
        context = self.shown(contexts)
        return Batch(target, coarse, degrade(coarse, level), level, torch.stack(places), context)


def degrade(coarse_B1XYZ: Tensor, level_B: Tensor) -> Tensor:  # noqa: N803
    """White and smooth noise of these SDs, in the air as well: what is drawn has errors of both kinds, everywhere."""
    white = torch.randn_like(coarse_B1XYZ)
    smooth = 3.0 * avg_pool3d(torch.randn_like(coarse_B1XYZ), 3, 1, 1)
    return relu(coarse_B1XYZ + level_B.view(-1, 1, 1, 1, 1) * (0.8 * white + 0.6 * smooth))


def _balanced(dataset: SyntheticDataset, covariate: str | None) -> npt.NDArray[np.int64]:
    """Scans in an order to be gone through again and again: those of rarer values come several times.

    Where the value is not known, a scan comes once.
    """
    everyone = np.arange(len(dataset), dtype=np.int64)
    if covariate is None:
        return everyone
    values = dataset.table[covariate]
    groups = [everyone[values == value] for value in values.dropna().unique()]
    most = max((len(group) for group in groups), default=0)
    return np.concatenate([everyone[values.isna()], *(np.resize(group, most) for group in groups)])


def check_balance(crops: CropsConfig, schema: CovariateSchema) -> None:
    """Raises UserError where `crops.balance` names no binary or categorical covariate."""
    names = [c.name for c in schema.covariates if c.kind != "continuous"]
    if crops.balance is not None and crops.balance not in names:
        raise UserError(
            f"crops.balance: {crops.balance!r} is not a binary or categorical covariate of the cohort; it has "
            f"{', '.join(names) or 'none'}"
        )
