"""A bundle as a generator: covariates → latents → volumes, by its own networks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from brainsynth.bundle.spec import BundleSpec
from brainsynth.errors import UserError
from brainsynth.models import device as devices
from brainsynth.models.diffusion import attention_of
from brainsynth.models.loading import load_labeller, load_models, load_renderer
from brainsynth.models.sampling import sample_rows
from brainsynth.models.schedule import NoiseSchedule
from brainsynth.plan import GenerationIdentity
from brainsynth.volume import INTEGER_MAX, VolumeSpec


class BundleGenerator:
    """Samples a bundle as a dataset's identity says."""

    def __init__(self, folder: Path, spec: BundleSpec, identity: GenerationIdentity, exact_rewrites: bool) -> None:
        self.folder, self.spec, self.identity, self.exact_rewrites = folder, spec, identity, exact_rewrites
        self.decode_s = 0.0
        """Seconds of decoding so far."""
        self.stored: VolumeSpec | None = None
        """Set: volumes leave the device as this stores them, unless one of the micro-batch is not finite."""

    def describe(self) -> BundleSpec:
        """The bundle's record."""
        return self.spec

    def load(self, device: str) -> None:
        """Read, check and place the networks."""
        self.device = torch.device(device)
        precision = self.identity.precision
        self.autoencoder, self.denoiser = load_models(
            self.folder, self.spec, self.device, precision, self.exact_rewrites, self.identity.decoder
        )
        if self.identity.renderer is not None:
            self.label = load_labeller(self.folder, self.device, self.identity.labeller)
            self.render = load_renderer(self.folder, self.device, self.identity.renderer, precision)
        devices.explain(self.device, precision, self.exact_rewrites, attention_of(self.spec.diffusion))
        self.schedule = NoiseSchedule(self.spec.schedule)

    @torch.no_grad()
    def sample(
        self, rows: pd.DataFrame, seeds: list[int]
    ) -> npt.NDArray[Any] | tuple[npt.NDArray[Any], npt.NDArray[np.uint8]]:
        """(B, X, Y, Z) float32 images in [0, 1], or stored voxels (see `stored`); with their label maps if rendered."""
        if self.identity.sampler is None:
            raise UserError("the plan of a bundle's dataset names no sampler")
        context = torch.from_numpy(self.spec.covariates.encode(rows)).to(self.device)
        shape = self.spec.latents.shape_cxyz
        with devices.autocast(self.device, self.identity.precision):
            z = sample_rows(self.denoiser, context, seeds, shape, self.schedule, self.identity.sampler)
            began = time.monotonic()
            x = self.autoencoder.decode(z, context, seeds)[:, 0]
        if self.identity.renderer is not None:
            rendered = self._rendered(x.float().cpu().numpy(), context.cpu().numpy(), seeds)
            self.decode_s += time.monotonic() - began
            return rendered
        if self.stored is not None and bool(torch.isfinite(torch.stack(torch.aminmax(x))).all().cpu()):
            x = quantised(x, self.stored)
        images: npt.NDArray[Any] = x.cpu().numpy()
        self.decode_s += time.monotonic() - began
        return images

    def _rendered(
        self, images: npt.NDArray[np.float32], context: npt.NDArray[np.float32], seeds: list[int]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
        """Each image made again from its label map, and the maps. One that is not finite stays as it is.

        Both see the image as it would be stored: its rounding hides most of what differs between micro-batches and machines.
        """
        maps, grid = np.zeros(images.shape, np.uint8), self.spec.volume
        for index, (image, row, seed) in enumerate(zip(images, context, seeds, strict=True)):
            if np.isfinite(image).all():
                images[index], maps[index] = self.render.remade(grid.as_stored(image), self.label, row, seed)
        return images, maps


def quantised(images: Tensor, grid: VolumeSpec) -> Tensor:
    """`VolumeSpec.quantise` of finite images, to the last bit, on their device: half as many bytes have to leave it."""
    x = images.float().clamp(0.0, 1.0)
    if grid.dtype in INTEGER_MAX:
        x = (x * INTEGER_MAX[grid.dtype]).round()
    elif grid.step:
        # A tensor: GPUs divide by a number by multiplying with 1 / number, which rounds otherwise.
        step = torch.full((1,), grid.step, device=x.device)
        x = ((x / step).round() * step).clamp(0.0, 1.0)
    return x.to(getattr(torch, grid.dtype))
