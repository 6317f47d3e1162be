"""One person's scan under other covariates, by the flow of a bundle's denoiser: abduction, action, prediction (Pearl 2009).

Abduction: the scan is encoded, and the flow run from data to noise with the person's own covariates. Action: a covariate is
changed. Prediction: the flow is run back to data and decoded; what the model could not make of the scan itself, the
residual (scan minus reconstruction), is added.

Both directions visit the same times, even in the logit of time: where there is little noise the flow is stiff, and steps of
equal length, or those that are best for sampling, would not lead back.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from brainsynth.bundle.spec import BundleSpec
from brainsynth.errors import UserError
from brainsynth.models import device as devices
from brainsynth.models.bundle_generator import BundleGenerator
from brainsynth.models.sampler_rules import check_inversion
from brainsynth.models.sampling import guided
from brainsynth.models.schedule import Float64s
from brainsynth.models.solvers import flow, heun
from brainsynth.plan import GenerationIdentity
from brainsynth.volume import voxel_sha256

Images = npt.NDArray[np.float32]
_FIRST = 0.003
"""Time that stands for data; that near, no network was trained."""


class Abducted(NamedTuple):
    """What the model makes of an image."""

    noise: Tensor
    """(1, C, X, Y, Z): where the flow starts that leads to the image."""
    reconstruction: Images
    """(X, Y, Z): the image that it leads to."""
    residual: Images
    """The image minus that."""


def inversion_times(steps: int) -> Float64s:
    """`steps` + 1 times from nearly 0 to 1, even in their logit but for the last."""
    logits = np.linspace(-1.0, 1.0, steps) * np.log(1 / _FIRST - 1)
    return np.append(1 / (1 + np.exp(-logits)), 1.0)


class ScanGenerator(BundleGenerator):
    """A bundle whose rows are all one person."""

    def __init__(
        self, folder: Path, spec: BundleSpec, identity: GenerationIdentity, exact_rewrites: bool, scan: Images
    ) -> None:
        super().__init__(folder, spec, identity, exact_rewrites)
        assert identity.scan is not None
        assert identity.sampler is not None
        check_inversion(spec, identity.sampler, identity.decoder)
        if voxel_sha256(scan) != identity.scan.prepared_sha256:
            raise UserError("--scan: these voxels are not those of the dataset's plan")
        self.scan, self.method = scan, identity.sampler.method
        self.own = pd.DataFrame([identity.scan.covariates])
        """The person's own covariates, as a row."""
        self.times = inversion_times(identity.scan.steps)

    def load(self, device: str) -> None:
        """As a bundle, and the scan's noise."""
        super().load(device)
        self.person = self.abduct(self.scan, self.own)

    def sample(self, rows: pd.DataFrame, seeds: list[int]) -> Images:
        """(B, X, Y, Z): the person with each row's covariates. Seeds have no say."""
        return self.predict(self.person, rows)

    @torch.no_grad()
    def abduct(self, image: Images, row: pd.DataFrame) -> Abducted:
        """The noise of an image whose covariates are `row`."""
        with devices.autocast(self.device, self.identity.precision):
            z = self.autoencoder.encode(torch.from_numpy(image)[None, None].to(self.device))
            noise = self._integrate(z, row, self.times)
        reconstruction = self._decoded(noise, row)[0]
        return Abducted(noise, reconstruction, image - reconstruction)

    def predict(self, person: Abducted, rows: pd.DataFrame) -> Images:
        """(B, X, Y, Z): an abducted image with other covariates, its residual added."""
        made = self._decoded(person.noise.expand(len(rows), -1, -1, -1, -1), rows)
        images: Images = np.clip(made + person.residual, 0.0, 1.0)
        return images

    @torch.no_grad()
    def _decoded(self, noise: Tensor, rows: pd.DataFrame) -> Images:
        with devices.autocast(self.device, self.identity.precision):
            z = self._integrate(noise, rows, self.times[::-1])
            images: Images = self.autoencoder.decode(z)[:, 0].cpu().numpy()
        return images

    def _integrate(self, x: Tensor, rows: pd.DataFrame, times: Float64s) -> Tensor:
        context = torch.from_numpy(self.spec.covariates.encode(rows)).to(self.device)
        predict = guided(self.denoiser, context, 1.0)
        if self.method == "heun":
            return heun(predict, x, self.schedule, times)
        return flow(predict, x, self.schedule, times, second_order=self.method == "ab2")
