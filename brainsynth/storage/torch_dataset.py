"""The reader as a torch map-style dataset."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

from brainsynth.storage.reader import SyntheticDataset


class TorchDataset(Dataset[dict[str, Any]]):
    """`image` float32 (1, X, Y, Z), `affine` float64 (4, 4), `sample_id`, and the covariates."""

    def __init__(self, dataset: SyntheticDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.dataset[index]
        sample["image"] = torch.from_numpy(sample["image"])[None]
        sample["affine"] = torch.from_numpy(sample["affine"])
        return sample
