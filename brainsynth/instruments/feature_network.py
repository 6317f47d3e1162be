"""The network that gives a volume its features, as a measuring process loads it: from its file, whose digest must hold."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from brainsynth.errors import UserError
from brainsynth.instruments.alignment import to_working_grid
from brainsynth.models.embedder import EMBEDDING_SIZE, Embedder, load_embedder
from brainsynth.models.medicalnet import FEATURES, MedicalNet, load_medicalnet
from brainsynth.records import record
from brainsynth.storage.filesystem import open_store
from brainsynth.volume import VolumeSpec

F32 = npt.NDArray[np.float32]


@record
class FeatureNetwork:
    """Which network, and where its weights are."""

    kind: Literal["medicalnet", "embedder"]
    folder: str
    """Path or object-store URI of the folder that holds the file."""
    key: str
    """The file's name in it."""
    sha256: str

    @property
    def width(self) -> int:
        """Features per volume."""
        return FEATURES if self.kind == "medicalnet" else EMBEDDING_SIZE

    @property
    def name(self) -> str:
        """As a report calls it."""
        if self.kind == "medicalnet":
            return f"MedicalNet ResNet-50, {FEATURES} features"
        return f"brainsynth's embedder, {EMBEDDING_SIZE} features"

    def load(self, device: torch.device) -> MedicalNet | Embedder:
        """The network, ready to measure. Raises UserError when its file is gone, damaged or another one than was planned."""
        data = open_store(self.folder).read(self.key)
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise UserError(f"features: {self.folder}/{self.key} changed while the dataset was being measured")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / Path(self.key).name
            file.write_bytes(data)
            return load_medicalnet(file, device) if self.kind == "medicalnet" else load_embedder(file, device)


@torch.inference_mode()
def features_of(network: MedicalNet | Embedder, volume: F32, grid: VolumeSpec) -> F32:
    """(d,) features of an (X, Y, Z) volume on `grid`; the embedder sees it at 4 mm, MedicalNet on its own grid."""
    if isinstance(network, Embedder):
        embedding: F32 = network.embed(to_working_grid(volume, grid)[None])[0]
        return embedding
    device = next(network.parameters()).device
    return np.asarray(network(torch.from_numpy(volume)[None].to(device))[0].cpu().numpy())
