"""Batches that depend on (seed, step) alone, so that a resumed run sees what an undisturbed one would have seen."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from brainsynth.config.training import AutoencoderTrainConfig, DiffusionTrainConfig
from brainsynth.covariates.distribution import check_distribution
from brainsynth.covariates.schema import CovariateSchema
from brainsynth.errors import UserError
from brainsynth.reading.dataset import SyntheticDataset, open_input
from brainsynth.storage.commit import read_plan, read_samples
from brainsynth.storage.filesystem import open_store

CACHE_BYTES = 4 << 30


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> npt.NDArray[np.int64]:
    """Indices of a global batch: positions of an endless sequence of per-epoch permutations of `count` samples."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: np.random.default_rng((seed, int(epoch))).permutation(count) for epoch in set(positions // count)}
    return np.array(
        [orders[epoch][offset] for epoch, offset in zip(positions // count, positions % count, strict=True)]
    )


def weights_seed(seed: int) -> int:
    """The seed of initial weights, of any size: of a larger number torch takes the last 32 bits alone."""
    return seed if 0 <= seed < 1 << 32 else int(np.random.SeedSequence(seed).generate_state(1, np.uint32)[0])


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of everything random within one step of one worker."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)


def check_splits(uri: str, what: str, array: str | None = None) -> None:
    """Raises UserError when a dataset cannot be opened, or has no training or no validation split.

    `what`: the config key that names it; `array`: which of its arrays, the first by default.
    """
    for split in ("train", "validation"):
        open_input(uri, what, split, array)


def check_training(
    config: AutoencoderTrainConfig | DiffusionTrainConfig,
    uri: str,
    what: str,
    schema: CovariateSchema,
    array: str | None = None,
    one_category: bool = False,
) -> None:
    """Raises UserError for data on which this training, or the denoiser's that follows, could not be finished.

    Both splits must hold scans, a batch must not be larger than the training split, and the covariates of the training
    split must be enough for their distribution.
    """
    check_splits(uri, what, array)
    train = open_input(uri, what, "train", array)
    batch = config.optimisation.batch_size
    if batch > len(train):
        raise UserError(
            f"optimisation.batch_size {batch} is more than the {len(train)} scans of the training split of {uri}; give at "
            f"most {len(train)}"
        )
    if isinstance(config, DiffusionTrainConfig) or config.denoiser_follows:
        try:
            check_distribution(_scans(train), schema, f"{what}: the training split of {uri}", one_category)
        except UserError as error:
            hint = (
                ""
                if isinstance(config, DiffusionTrainConfig)
                else "; for an autoencoder alone: denoiser_follows: false"
            )
            raise UserError(f"{error}\n  train-diffusion refuses such a cohort{hint}") from None


def _scans(dataset: SyntheticDataset) -> pd.DataFrame:
    """The rows of a table that are scans, not mirror images of scans."""
    store, table = open_store(dataset.uri), dataset.table
    samples = read_samples(store, read_plan(store)).iloc[table["row"]]
    return table[~samples["mirrored"].to_numpy(bool)] if "mirrored" in samples else table


class Batches:
    """Training batches of a dataset: cached in memory when it is small, else read ahead by threads."""

    def __init__(self, dataset: SyntheticDataset, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        if batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} must be a multiple of the {world_size} workers")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.world_size = rank, world_size
        small = dataset.volume(0).nbytes * len(dataset) <= CACHE_BYTES
        self._cache = dataset.volumes().astype(np.float16) if small else None
        self._pool = None if small else ThreadPoolExecutor(4)
        self._ahead: tuple[int, list[Future[npt.NDArray[np.float32]]]] | None = None

    def indices(self, step: int) -> npt.NDArray[np.int64]:
        """This worker's share of the step's global batch."""
        return batch_indices(len(self.dataset), self.batch_size, step, self.seed)[self.rank :: self.world_size]

    def __call__(self, step: int) -> Tensor:
        """(B, 1, X, Y, Z) float32 images of a step."""
        if self._cache is not None:
            return torch.from_numpy(self._cache[self.indices(step)].astype(np.float32))[:, None]
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = (step, self._submit(step))
        volumes = np.stack([future.result() for future in self._ahead[1]])
        self._ahead = (step + 1, self._submit(step + 1))
        return torch.from_numpy(volumes)[:, None]

    def _submit(self, step: int) -> list[Future[npt.NDArray[np.float32]]]:
        assert self._pool is not None
        return [self._pool.submit(self.dataset.volume, int(index)) for index in self.indices(step)]


def flip_half(x_B1XYZ: Tensor) -> Tensor:  # noqa: N803
    """Mirror each volume left to right with probability one half."""
    flip = torch.rand(x_B1XYZ.shape[0]) < 0.5
    return torch.where(flip.view(-1, 1, 1, 1, 1).to(x_B1XYZ.device), x_B1XYZ.flip(2), x_B1XYZ)
