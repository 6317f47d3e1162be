"""How near the latents of a few-step student come to those of its teacher's reference, with intervals."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv3d

from brainsynth.bundle.spec import MeasuredInterval, StepFidelity
from brainsynth.errors import UserError
from brainsynth.metrics.frechet import GaussianStats, frechet_distance
from brainsynth.metrics.intervals import ConfidenceInterval, bootstrap_interval
from brainsynth.models.sampling import draw_noise

FILTERS, SEED, RESAMPLES = 8, 200, 1000


def latent_features(latents: Tensor) -> Tensor:
    """(B, 16) float32: mean and standard deviation over the cells of 8 fixed random 3³ filters, rectified.

    Their only use is to be the same for the sets that are compared; the filters are `draw_noise` of one seed.
    """
    filters = draw_noise([SEED], (FILTERS, latents.shape[1], 3, 3, 3))[0] / (27 * latents.shape[1]) ** 0.5
    responses = torch.relu(conv3d(latents.float(), filters, padding=1)).flatten(2)
    return torch.cat([responses.mean(2), responses.std(2)], 1)


def measure_steps(latents: Tensor, reference: Tensor) -> StepFidelity:
    """How near latents (B, C, X, Y, Z) come to the reference's of the same rows and noises.

    The error is the root mean square difference relative to the reference's root mean square. The Fréchet distance is of
    `latent_features`, each in units of its standard deviation over the reference; the same rows are drawn again from both
    sets, so that it is 0 for equal latents.

    Raises:
        UserError: too few rows for the covariance of 16 features, or latents that are not finite.
    """
    if len(latents) <= 2 * FILTERS or not torch.isfinite(latents).all():
        raise UserError(f"need more than {2 * FILTERS} held-out latents, all finite, to measure a student on")
    rows = len(reference)
    squares = (latents - reference).double().pow(2).reshape(rows, -1).mean(1).numpy()
    power = reference.double().pow(2).reshape(rows, -1).mean(1).numpy()
    made, wanted = latent_features(latents), latent_features(reference)
    scale = wanted.std(0).clamp(min=1e-12)
    features = [(z / scale).double().numpy() for z in (made, wanted)]
    interval = functools.partial(bootstrap_interval, paired=True, resamples=RESAMPLES)
    error = interval(lambda e, p: float(np.sqrt(e.mean() / p.mean())), [squares, power])
    distance = interval(lambda x, y: frechet_distance(GaussianStats.of(x), GaussianStats.of(y)), features)
    return StepFidelity(latent_error=_measured(error), frechet=_measured(distance))


def _measured(interval: ConfidenceInterval) -> MeasuredInterval:
    return MeasuredInterval(value=interval.value, low=interval.low, high=interval.high)
