"""Fit the Gaussian model of latents in closed form: ridge for the mean, principal components for what persons share.

With few subjects and many cells, the variance of training latents along their own principal components says more than the
truth about the first ones and, worse, calls noise structure in the rest. So each component gets the variance that latents of
subjects have who were left out when the components were found (5 folds by subject); the rest joins the diagonal.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool3d, pad

from brainsynth.models.gaussian_denoiser import GaussianLatents

log = logging.getLogger(__name__)
MAX_ROWS = 2000
_FOLDS = 5
_RIDGE = 0.1
"""On the slopes, for encoded covariates in [0, 1]."""
_CURVED_RIDGE = 10.0
"""On the slopes of products with a covariate on a logarithmic scale. Latents are between linear and logarithmic in it, so
slopes differ between categories of other ranges for that alone, and lead astray outside them (docs/small-cohorts.md)."""
_UNKNOWN_WEIGHT = 1e-3
"""Weight of each row once more with nothing known about it. Where the context says what is known, the mean without
covariates becomes the mean of all; where it does not, this hardly tilts the slopes."""
_LOWEST_VARIANCE = 1e-4


def fit_gaussian(
    model: GaussianLatents,
    z_NCXYZ: Tensor,  # noqa: N803
    context_NK: Tensor,  # noqa: N803
    subjects: list[str],
    mirrored_N: Tensor | None = None,  # noqa: N803
    curved: frozenset[int] = frozenset(),
) -> None:
    """Set the model's buffers from latents of training subjects; at most MAX_ROWS rows, spread evenly, are used.

    Args:
        mirrored_N: which rows are mirror images of scans. The mean is that of scans: brains are not symmetric.
        curved: positions in the context of covariates on a logarithmic scale.

    Raises:
        ValueError: fewer rows than the rank, or fewer subjects than folds.
    """
    chosen = _spread(len(z_NCXYZ))
    z, context, people = z_NCXYZ[chosen], context_NK[chosen], np.array(subjects)[chosen.numpy()]
    length, rank = model.factors.shape
    folds = np.unique(people, return_inverse=True)[1] % _FOLDS
    if len(np.unique(people)) < _FOLDS or (folds != 0).sum() <= rank:
        raise ValueError(f"{len(np.unique(people))} subjects are too few for a covariance of rank {rank}")
    flat = z.flatten(1)
    side = None if mirrored_N is None or not mirrored_N.any() else _side(mirrored_N[chosen])
    rest = _fit_mean(model, flat, context, side, curved)
    covered = rest[:, :length]
    gram = (covered @ covered.T).double()
    held_out = torch.stack([_held_out_variance(gram, folds == fold, rank) for fold in range(_FOLDS)]).mean(0)
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(gram))
    values, vectors = values[:rank], vectors[:, :rank]
    directions = (covered.T @ (vectors / values.sqrt()).float()).contiguous()  # (L, R) orthonormal
    believed = torch.minimum(held_out, values / len(covered)).float()
    left = rest.square().mean(0)
    left[:length] -= (directions.square() * believed).sum(1)
    variance = left.view_as(model.variance)
    smooth = avg_pool3d(pad(variance[None], (1,) * 6, mode="replicate"), 3, 1)[0]
    model.factors.copy_(directions * believed.sqrt())
    model.variance.copy_(smooth.clamp(min=_LOWEST_VARIANCE))
    total = flat.var(0, correction=0).sum()
    log.info(
        "Gaussian model of %d latents: covariates explain %.0f %% of the variance, %d shared components %.0f %%",
        len(flat), 100 * float(1 - rest.square().mean(0).sum() / total), rank, 100 * float(believed.sum() / total),
    )  # fmt: skip


def fit_asymmetry(
    model: GaussianLatents,
    z_NCXYZ: Tensor,  # noqa: N803
    context_NK: Tensor,  # noqa: N803
    mirrored_N: Tensor,  # noqa: N803
) -> None:
    """Set how the mean of mirror images differs from a mean that is kept, from latents of scans and their mirror images.

    A file of weights has no asymmetry, as only training needs it. At most MAX_ROWS rows, spread evenly, are used.
    """
    chosen = _spread(len(z_NCXYZ))
    z, context, side = z_NCXYZ[chosen], context_NK[chosen], _side(mirrored_N[chosen])
    apart = _asymmetry(side[:, None] * model.sided(context), (z - model.mean(context)).flatten(1))
    model.asymmetry.copy_(apart.view_as(model.asymmetry))


def emphasise(model: GaussianLatents, context_NK: Tensor, factors: Mapping[int, float], flagged: bool) -> None:  # noqa: N803
    """Multiply the slopes of the mean along some covariates, about the middle of the people of each category.

    Args:
        context_NK: contexts of the people that it was fitted to.
        factors: position in the context → factor.
        flagged: whether the second half of the context says what is known.
    """
    slopes, behind = model.mean_map, context_NK.shape[1] // 2
    crossed = {other: (number, binary) for number, (binary, other) in enumerate(model.products)}
    for position, factor in factors.items():
        known = context_NK[context_NK[:, position + behind] == 1] if flagged else context_NK
        constant = slopes[1 + position + behind if flagged else 0]
        more = (factor - 1) * slopes[1 + position]
        slopes[1 + position] += more
        constant -= more * known[:, position].mean()
        if position in crossed:
            number, binary = crossed[position]
            with_it = known[:, binary] == 1
            middle, of_others, of_these = (x[:, position].mean() for x in (known, known[~with_it], known[with_it]))
            steeper = (factor - 1) * model.product_map[number]
            first = len(steeper)  # channels
            model.product_map[number] += steeper
            constant[:first] += more[:first] * (middle - of_others)
            slopes[1 + binary, :first] += more[:first] * (of_others - of_these) - steeper * of_these


def _fit_mean(
    model: GaussianLatents,
    flat_ND: Tensor,  # noqa: N803
    context_NK: Tensor,  # noqa: N803
    side_N: Tensor | None,  # noqa: N803
    curved: frozenset[int],
) -> Tensor:
    """Set the buffers of the mean; returns what it leaves of the latents. `side_N`: -1 for mirror images, 1 for scans."""
    length = len(model.factors)
    slopes = _ridge(flat_ND, context_NK, [_RIDGE] * context_NK.shape[1])
    rest = flat_ND - slopes[0] - context_NK @ slopes[1:]
    if model.products:
        known = torch.cat([context_NK, model.multiplied(context_NK)], dim=1)
        of_products = [_CURVED_RIDGE if other in curved else _RIDGE for _, other in model.products]
        finer = _ridge(flat_ND[:, :length], known, [_RIDGE] * context_NK.shape[1] + of_products)
        rest[:, :length] = flat_ND[:, :length] - finer[0] - known @ finer[1:]
        slopes[:, :length] = finer[: len(slopes)]
        model.product_map.copy_(finer[len(slopes) :].view_as(model.product_map))
    model.asymmetry.zero_()
    if side_N is not None:
        sided = side_N[:, None] * model.sided(context_NK)
        apart = _asymmetry(sided, rest)
        rest = rest - sided @ apart
        slopes[0] += apart[0]
        if model.products:
            slopes[1 + model.products[0][0]] += apart[1]
        model.asymmetry.copy_(apart.view_as(model.asymmetry))
    model.mean_map.copy_(slopes.view_as(model.mean_map))
    return rest


def _spread(count: int) -> Tensor:
    """Of that many rows at most MAX_ROWS, spread evenly."""
    return torch.arange(0, count, -(-count // MAX_ROWS))


def _side(mirrored_N: Tensor) -> Tensor:  # noqa: N803
    """(N,): -1 for mirror images, 1 for scans."""
    return 1 - 2 * mirrored_N.float()


def _asymmetry(sided_NS: Tensor, rest_ND: Tensor) -> Tensor:  # noqa: N803
    """(S, D): half of what distinguishes scans from mirror images in what a mean leaves of both."""
    apart: Tensor = torch.linalg.lstsq(sided_NS, rest_ND).solution
    return apart


def _ridge(flat_ND: Tensor, context_NK: Tensor, ridge_K: list[float]) -> Tensor:  # noqa: N803
    """(1 + K, D): intercept and slopes."""
    ones = torch.ones(len(context_NK), 1)
    known = torch.cat([ones, context_NK], dim=1).double()
    normal = known.T @ known
    normal[0, 0] += _UNKNOWN_WEIGHT * len(known)
    normal += torch.diag(torch.tensor([0.0, *ridge_K], dtype=torch.float64))
    right = (known.T.float() @ flat_ND).double()
    right[0] += _UNKNOWN_WEIGHT * flat_ND.sum(0)
    slopes: Tensor = torch.linalg.solve(normal, right).float()
    return slopes


def _held_out_variance(gram_NN: Tensor, out_N: np.ndarray, rank: int) -> Tensor:  # noqa: N803
    """(R,) mean square of left-out rows along the principal components of the others; inner products suffice."""
    inside, outside = torch.from_numpy(np.flatnonzero(~out_N)), torch.from_numpy(np.flatnonzero(out_N))
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(gram_NN[inside][:, inside]))
    along = gram_NN[outside][:, inside] @ (vectors[:, :rank] / values[:rank].clamp(min=1e-12).sqrt())
    variance: Tensor = along.square().mean(0)
    return variance
