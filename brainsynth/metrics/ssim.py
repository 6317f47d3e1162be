"""Structural similarity of pairs of volumes: MS-SSIM and 4-G-R-SSIM in 3D, and the random pairs to score.

Between random pairs of one dataset they measure diversity: the target is the mean between real scans of other subjects,
not 0, and a mean above it says that the images are too alike. Only values with the same grid, crop, window, scales and
data range compare; empty margins count as perfectly alike and raise them all.

The Gaussian window is separable here, which 4-G-R-SSIM needs anyway. MONAI's `compute_ms_ssim` gives the same figures with
a full 3D kernel, 15 times slower, and refuses four scales on volumes that hold them; it is what the tests compare with.

Volumes are (X, Y, Z), or (N, X, Y, Z) to score N pairs at once, as arrays or tensors; tensors stay on their device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from brainsynth.errors import UserError

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the scales, fine to coarse (Wang, Simoncelli & Bovik 2003, section 3.2)."""
_SIGMA = 1.5
_K1, _K2 = 0.01, 0.03
_EDGE, _SMOOTH = 0.12, 0.06
_FLAT = 1e-6


def ms_ssim(
    first: Any,
    second: Any,
    data_range: float = 1.0,
    window: int = 11,
    weights: Sequence[float] = MS_SSIM_WEIGHTS,
    scales: int | None = None,
) -> torch.Tensor:
    """Multi-scale structural similarity (Wang, Simoncelli & Bovik 2003, equation 7), in 3D.

    Contrast-structure of every scale but the last, SSIM of the last (Wang, Bovik, Sheikh & Simoncelli 2004, equation 13),
    each mean cut off at 0, to the power of its weight, and multiplied. Between scales: the mean of 2 × 2 × 2 voxels. SSIM is
    under a Gaussian window (sigma 1.5 voxels) that lies wholly inside the volume, with C₁ = (0.01 L)², C₂ = (0.03 L)²;
    variances are those of the window (no n - 1).

    All sides must hold the window at the coarsest scale: window · 2^(scales - 1) voxels, which is 176 for the published
    five scales and window 11. For 160 × 224 × 160, window 7 (at least 112) keeps the five scales.

    Args:
        first: volume or volumes; symmetric in the two.
        second: as many, of the same shape.
        data_range: L, the largest minus the smallest possible intensity.
        window: odd side of the window in voxels.
        weights: exponents, fine to coarse.
        scales: use only the first `scales` weights, rescaled to their old sum; None for all.

    Returns:
        (N,) float64, or () for one pair; in [0, 1], 1 for identical volumes.

    Raises:
        UserError: the volumes are too small (the text names the least side and what else would do), their shapes differ,
            NaN or Inf.
    """
    used = list(weights[: len(weights) if scales is None else scales])
    if not used or (scales is not None and not 1 <= scales <= len(weights)) or min(used) < 0 or not sum(used) > 0:
        raise UserError(f"scales = {scales} must be between 1 and the number of weights, {len(weights)}, none negative")
    exponents = [weight * sum(weights) / sum(used) for weight in used]
    x, y, single = _volumes(first, second, window, len(used), torch.float32)
    scores = torch.ones(len(x), dtype=torch.float64, device=x.device)
    for n in range(len(x)):
        a, b = x[n], y[n]
        for scale, exponent in enumerate(exponents):
            similarity, contrast = _similarity(a, b, data_range, window)
            last = scale == len(exponents) - 1
            scores[n] *= (similarity if last else contrast).clamp(min=0) ** exponent
            if not last:
                a, b = (functional.avg_pool3d(v[None, None], 2)[0, 0] for v in (a, b))
    return scores[0] if single else scores


def four_g_r_ssim(first: Any, second: Any, window: int = 11) -> torch.Tensor:
    """4-G-R-SSIM in 3D: local correlation of gradient magnitudes, averaged over four kinds of region in equal parts.

    In the names of Renieblas et al. 2017 ("Structural similarity index family …") it is 4-G-r*:

    - G (Chen, Yang & Xie 2006): both volumes are replaced by g = |∂x| + |∂y| + |∂z| of the 3D Sobel operator, which is
      (-1, 0, 1) along its axis and (1, 2, 1) along both others, without padding.
    - R (Rouse & Hemami 2008): of SSIM only the structure, without constants. Under the window of `ms_ssim` on the gradient
      maps, r* = σ_xy / (σ_x σ_y); 1 where both deviations are 0 and 0 where only one is. 0 means below 10⁻⁶ of the
      largest gradient of the two, so that rounding is not taken for structure.
    - 4 (Li & Bovik 2010): with g_x of the first, the reference, and t = 0.12 max g_x, u = 0.06 max g_x, a voxel is a
      *preserved edge* where g_x > t and g_y > t, a *changed edge* where only one of them is above t, *smooth* where
      g_x < u and g_y <= t, and *texture* elsewhere.

    The score is the mean of r* within each region, averaged with weights of 0.25; where a region is empty, the others share
    its weight. It is not symmetric, and ignores intensity scale and contrast. Smooth background counts a quarter, however
    it is filled: noise there gives about 0, exact zeros in both give 1. The authors of the figures published for brain
    generators released no complete code, so compare only with real pairs scored by this function.

    Args:
        first: reference volume or volumes.
        second: as many, of the same shape.
        window: odd side of the window in voxels.

    Returns:
        (N,) float64, or () for one pair; in [-1, 1], 1 for identical volumes.

    Raises:
        UserError: shapes differ, a side is shorter than the window + 2, NaN or Inf.
    """
    x, y, single = _volumes(first, second, window, 1, torch.float64, margin=2)
    scores = torch.stack([_four_component(a, b, window) for a, b in zip(x, y, strict=True)])
    return scores[0] if single else scores


def pair_indices(n: int, pairs: int, seed: int) -> npt.NDArray[np.int64]:
    """(pairs, 2) random rows i < j of n volumes, uniform over all pairs, none twice; the same for the same seed.

    Time and memory follow `pairs`, not n² (unless `pairs` is a large share of all). Raises UserError when there are fewer
    pairs.
    """
    possible = n * (n - 1) // 2
    if n < 2 or not 1 <= pairs <= possible:
        raise UserError(f"{pairs} different pairs of {n} volumes: there are {max(possible, 0)}")
    numbers = np.random.default_rng(seed).choice(possible, pairs, replace=False)
    # Pair (i, j) has the number j (j - 1) / 2 + i: invert in float64, then correct the rounding.
    j = ((1 + np.sqrt(1 + 8 * numbers.astype(np.float64))) / 2).astype(np.int64)
    j -= j * (j - 1) // 2 > numbers
    j += (j + 1) * j // 2 <= numbers
    return np.stack([numbers - j * (j - 1) // 2, j], axis=1)


def _volumes(
    first: Any, second: Any, window: int, scales: int, dtype: torch.dtype, margin: int = 0
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Both as (N, X, Y, Z) of one type, and whether a single pair was given."""
    x, y = (torch.as_tensor(v).to(dtype) for v in (first, second))
    if x.shape != y.shape or x.ndim not in (3, 4) or 0 in x.shape:
        raise UserError(
            f"volumes must be two (X, Y, Z) or (N, X, Y, Z) of one shape, not {(*x.shape,)} and {(*y.shape,)}"
        )
    if window < 3 or window % 2 == 0:
        raise UserError(f"window = {window} must be odd and at least 3")
    side, least = min(x.shape[-3:]), window * 2 ** (scales - 1) + margin
    if side < least:
        fewer = next((s for s in range(scales - 1, 0, -1) if window * 2 ** (s - 1) <= side), 0)
        hint = f"; this size allows scales={fewer}, or take a smaller window" if fewer else "; take a smaller window"
        raise UserError(
            f"volumes of {'×'.join(map(str, x.shape[-3:]))} voxels are too small for {scales} scale"
            f"{'s' if scales > 1 else ''} with a window of {window}: the smallest side must be {least} or more{hint}"
        )
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise UserError("a volume has NaN or infinite voxels; leave it out and report it")
    return (x[None], y[None], True) if x.ndim == 3 else (x, y, False)


def _gaussian(window: int, like: torch.Tensor) -> list[float]:
    offsets = torch.arange(window, dtype=like.dtype) - (window - 1) / 2
    weights = torch.exp(-((offsets / _SIGMA) ** 2) / 2)
    return [float(w) for w in weights / weights.sum()]


def _correlate(maps: torch.Tensor, kernels: Sequence[Sequence[float]]) -> torch.Tensor:
    """(…, X, Y, Z) correlated with one kernel per axis, inside only: sums of shifted copies, faster than a convolution."""
    for axis, kernel in zip((-3, -2, -1), kernels, strict=True):
        length = maps.shape[axis] - len(kernel) + 1
        total = maps.narrow(axis, 0, length) * kernel[0]
        for shift, weight in enumerate(kernel[1:], start=1):
            if weight:
                total.add_(maps.narrow(axis, shift, length), alpha=weight)
        maps = total
    return maps


def _local_moments(x: torch.Tensor, y: torch.Tensor, window: int) -> tuple[torch.Tensor, ...]:
    """Windowed means of x and y, their variances (>= 0 up to rounding) and covariance, of two (X, Y, Z) maps."""
    kernel = _gaussian(window, x)
    mean_x, mean_y, xx, yy, xy = (_correlate(m, [kernel] * 3) for m in (x, y, x * x, y * y, x * y))
    return mean_x, mean_y, xx - mean_x * mean_x, yy - mean_y * mean_y, xy - mean_x * mean_y


def _similarity(x: torch.Tensor, y: torch.Tensor, data_range: float, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of SSIM and of its contrast-structure part, (2 σ_xy + C₂) / (σ_x² + σ_y² + C₂)."""
    mean_x, mean_y, var_x, var_y, cov = _local_moments(x, y, window)
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    contrast = (2 * cov + c2) / (var_x + var_y + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * contrast).mean(dtype=torch.float64), contrast.mean(dtype=torch.float64)


def _gradient(volume: torch.Tensor) -> torch.Tensor:
    derivative, smooth = (-1.0, 0.0, 1.0), (1.0, 2.0, 1.0)
    axes = ([derivative if axis == along else smooth for axis in range(3)] for along in range(3))
    return torch.stack([_correlate(volume, kernels).abs() for kernels in axes]).sum(dim=0)


def _four_component(x: torch.Tensor, y: torch.Tensor, window: int) -> torch.Tensor:
    grad_x, grad_y = _gradient(x), _gradient(y)
    _, _, var_x, var_y, cov = _local_moments(grad_x, grad_y, window)
    flat = (_FLAT * torch.maximum(grad_x.max(), grad_y.max())) ** 2
    flat_x, flat_y = var_x <= flat, var_y <= flat
    structure = cov / torch.where(flat_x | flat_y, 1.0, var_x * var_y).clamp(min=0).sqrt()
    structure = torch.where(flat_x | flat_y, (flat_x & flat_y).to(cov.dtype), structure.clamp(-1, 1))
    edge, smooth = _EDGE * grad_x.max(), _SMOOTH * grad_x.max()
    half = window // 2
    inner = tuple(slice(half, side - half) for side in grad_x.shape)
    edge_x, edge_y = (grad_x > edge)[inner], (grad_y > edge)[inner]
    is_smooth = (grad_x < smooth)[inner] & ~edge_y
    regions = (edge_x & edge_y, edge_x ^ edge_y, is_smooth, ~(edge_x | edge_y | is_smooth))
    means = [structure[region].mean() for region in regions if region.any()]
    return torch.stack(means).mean()
