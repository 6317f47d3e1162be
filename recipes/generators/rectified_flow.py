"""MONAI's rectified flow (MAISI, what NV-Generate ships): latents by its scheduler and U-Net, volumes by its decoder.

`folder` holds `network.json`, `autoencoder.pt` and `diffusion.pt`: keyword arguments of the two networks and the scheduler,
shapes and the codes of contrasts; and their state dicts, as published.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.networks.schedulers.rectified_flow import RFlowScheduler

from brainsynth import Covariate, CovariateSchema, GeneratorSpec, VolumeSpec

FILES = ("network.json", "autoencoder.pt", "diffusion.pt")


class RectifiedFlow:
    """One contrast a row; the networks know no age or sex."""

    def __init__(self, folder: str, steps: int = 30, licence: str = "", training_data: str = "") -> None:
        self.folder, self.steps, self.terms = Path(folder), steps, (licence, training_data)
        self.about: dict[str, Any] = json.loads((self.folder / FILES[0]).read_text())

    def describe(self) -> GeneratorSpec:
        """Its grid is that of `network.json`; its digest covers the three files and the number of steps."""
        content = hashlib.sha256(b"".join((self.folder / name).read_bytes() for name in FILES)).hexdigest()
        contrast = Covariate(name="contrast", kind="categorical", categories=tuple(self.about["contrasts"]))
        licence, training_data = self.terms
        return GeneratorSpec(
            name=self.about["name"],
            volume=VolumeSpec(**self.about["volume"]),
            covariates=CovariateSchema(covariates=(contrast,)),
            licence=licence,
            training_data=training_data,
            content=f"{content}, {self.steps} steps",
        )

    def load(self, device: str) -> None:
        """Weights are read as numbers only."""
        self.device = torch.device(device)
        self.decoder = self._network(AutoencoderKlMaisi(**self.about["autoencoder"]), FILES[1])
        self.unet = self._network(DiffusionModelUNetMaisi(**self.about["diffusion"]), FILES[2])

    def _network(self, network: torch.nn.Module, file: str) -> torch.nn.Module:
        network.load_state_dict(torch.load(self.folder / file, map_location="cpu", weights_only=True))
        return network.eval().to(self.device)

    @torch.no_grad()
    def sample(self, rows: pd.DataFrame, seeds: list[int]) -> npt.NDArray[np.float32]:
        """One row at a time, so that a row never depends on its neighbours."""
        return np.stack([self._one(str(name), seed) for name, seed in zip(rows["contrast"], seeds, strict=True)])

    def _one(self, contrast: str, seed: int) -> npt.NDArray[np.float32]:
        noise = torch.Generator().manual_seed(seed)
        z = torch.randn((1, *self.about["latent_shape"]), generator=noise).to(self.device)
        scheduler = RFlowScheduler(**self.about["scheduler"])
        scheduler.set_timesteps(self.steps, input_img_size_numel=int(np.prod(z.shape[2:])))
        label = torch.tensor([self.about["contrasts"][contrast]], device=self.device)
        spacing = 100 * torch.tensor([self.about["volume"]["spacing_mm"]], device=self.device)
        times = [*scheduler.timesteps.tolist(), 0]
        for time, after in itertools.pairwise(times):
            at = torch.tensor([time], device=self.device)
            velocity = self.unet(z, timesteps=at, class_labels=label, spacing_tensor=spacing)
            z, _ = scheduler.step(velocity, time, z, after)
        image = self.decoder.decode_stage_2_outputs(z / self.about["scale_factor"])
        return image[0, 0].clip(0, 1).float().cpu().numpy()
