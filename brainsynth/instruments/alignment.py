"""Brings any T1w volume into one pose and turns it into a vector that shows whose brain it is, not how it was imaged.

A copy of a scan may be shifted, turned, mirrored, blurred, noisy or of another contrast. So each volume is aligned rigidly
to the training cohort's mean (inverse compositional Gauss-Newton, Baker & Matthews 2004, with the intensity scale and offset
of each volume fitted on the way), its intensities become ranks (no gamma curve changes them), local contrast is normalised
between 4 mm and 12 mm (finer detail is lost to blur and noise, coarser is shared by everyone), and a fixed random
projection shortens the result (Johnson & Lindenstrauss 1984: distances keep their ratios whatever the data). Nothing but
the mean is fitted to the training scans, so a scan that was in training and one that was not are described alike: the
calibration of the audit rests on that.

All works on a grid of 4 mm, or the volume's own if coarser; X runs from left to right, as everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn import functional

from brainsynth.errors import UserError
from brainsynth.volume import VolumeSpec, resample

F32 = npt.NDArray[np.float32]

WORKING_MM = 4.0
DIMENSIONS = 512
"""Length of a descriptor: random projection then moves distances by about 1/√(2 · 512) = 3 %."""

_POSE_SMOOTHING_MM = 6.0
_FINE_MM, _COARSE_MM = 4.0, 12.0
_CONTRAST_FLOOR = 0.1  # of the strongest local contrast: flat regions are not blown up to noise
_ITERATIONS = 12
_STEP = 2  # every second voxel of each axis is enough for six numbers
_FOREGROUND, _BRAIN = 0.1, 0.25  # of the mean's largest value
_BATCH = 32
_MIN_MASK = 64


def working_grid(volume: VolumeSpec) -> VolumeSpec:
    """The grid on which the audit compares volumes: 4 mm over the same box, or `volume` itself when it is coarser."""
    spacing = np.asarray(volume.spacing_mm)
    if (spacing > 0.99 * WORKING_MM).all():
        return volume
    coarse = np.maximum(spacing, WORKING_MM)
    shape = np.maximum(1, np.rint(np.asarray(volume.shape_xyz) * spacing / coarse)).astype(int)
    centre = np.asarray(volume.origin_mm) + (np.asarray(volume.shape_xyz) - 1) * spacing / 2
    x, y, z = (int(n) for n in shape)
    sx, sy, sz = (float(s) for s in coarse)
    ox, oy, oz = (float(o) for o in centre - (shape - 1) * coarse / 2)
    return VolumeSpec(shape_xyz=(x, y, z), spacing_mm=(sx, sy, sz), origin_mm=(ox, oy, oz), dtype=volume.dtype)


def to_working_grid(volume: F32, grid: VolumeSpec) -> F32:
    """(X, Y, Z) intensities on `grid` → float32 on `working_grid(grid)`."""
    return resample(volume, grid.affine, working_grid(grid))


@dataclass(frozen=True, slots=True, kw_only=True)
class CanonicalFrame:
    """The pose that all volumes are brought to: the mirror-symmetric mean of the training scans."""

    template: F32
    """(X, Y, Z) mean intensity, equal to its own mirror image along X."""
    spacing_mm: tuple[float, float, float]

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """(X, Y, Z) where descriptors look: the template's bright part and a voxel around it, mirror-symmetric."""
        mean = torch.from_numpy(self.template)
        smoothed = _smooth(mean[None], (1.0, 1.0, 1.0))[0]
        inside = (_smooth((smoothed > _BRAIN * mean.max()).float()[None], (0.5, 0.5, 0.5))[0] > 0.5).numpy()
        return np.asarray(inside & inside[::-1])


def fit_frame(volumes: npt.ArrayLike, spacing_mm: tuple[float, float, float], rounds: int = 2) -> CanonicalFrame:
    """The frame of (n, X, Y, Z) training scans on the working grid: their mean, then the mean after alignment to it.

    A few hundred scans are enough for any cohort.

    Raises:
        UserError: no scans, values that are not finite, or a mean without a bright part to hold on to.
    """
    scans = np.asarray(volumes, np.float32)
    if scans.ndim != 4 or not len(scans) or not np.isfinite(scans).all():
        raise UserError(f"a frame needs (n, X, Y, Z) finite training scans, not an array of shape {scans.shape}")
    frame = CanonicalFrame(template=_symmetric(scans.mean(0, dtype=np.float64)), spacing_mm=spacing_mm)
    for _ in range(rounds):
        if int(frame.mask.sum()) < _MIN_MASK:
            raise UserError(
                "the mean of the training scans has no bright part: are the intensities those of T1w brains?"
            )
        aligner = Aligner(frame)
        total = np.zeros(scans.shape[1:])
        for start in range(0, len(scans), _BATCH):
            total += aligner.align(scans[start : start + _BATCH]).volumes.sum(0, dtype=np.float64)
        frame = CanonicalFrame(template=_symmetric(total / len(scans)), spacing_mm=spacing_mm)
    return frame


@dataclass(frozen=True, slots=True, kw_only=True)
class Aligned:
    """Volumes in the canonical pose, and how they got there."""

    volumes: F32
    """(B, X, Y, Z)"""
    rotations: F32
    """(B, 3, 3) canonical → volume, about the centre of the grid."""
    shifts_mm: F32
    """(B, 3) of the same: aligned(p) = volume(R p + t), p in mm from the centre."""


class Aligner:
    """Rigid alignment to a frame. Depends on each volume alone, whatever the batch."""

    def __init__(self, frame: CanonicalFrame) -> None:
        self._spacing = torch.tensor(frame.spacing_mm)
        self._sigma = tuple(_POSE_SMOOTHING_MM / s for s in frame.spacing_mm)
        template = _smooth(torch.tensor(frame.template)[None], self._sigma)[0]
        wide = _smooth((template > _FOREGROUND * template.max()).float()[None], (1.0, 1.0, 1.0))[0] > 0.02
        axes = [(torch.arange(n) - (n - 1) / 2) * s for n, s in zip(template.shape, frame.spacing_mm, strict=True)]
        points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
        slope = torch.stack(torch.gradient(template, spacing=frame.spacing_mm), -1)
        some = tuple(slice(None, None, _STEP) for _ in range(3))
        chosen = wide[some]
        self._points, by = points[some][chosen], slope[some][chosen]
        # d/dω template(exp(ω) p + t) = slope · (ω × p) = ω · (p × slope)
        jacobian = torch.cat([torch.linalg.cross(self._points, by), by], 1)
        self._jacobian = jacobian - jacobian.mean(0)
        values = template[some][chosen]
        self._target = values - values.mean()
        # A hair of damping: a template that is round about an axis has no angle about it.
        normal = (self._jacobian.T @ self._jacobian).double()
        normal += torch.diag(1e-6 * normal.diagonal() + 1e-12)
        self._solve = torch.linalg.solve(normal, self._jacobian.T.double()).float()

    @torch.inference_mode()
    def align(self, volumes: F32) -> Aligned:
        """(B, X, Y, Z) float32 volumes on the frame's grid → the same in its pose.

        Six numbers per volume, twelve steps; a volume that ends up less like the template than it was stays as it was.
        Good for turns of 20° and shifts of 2 cm; beyond that, orient volumes first.
        """
        images = torch.from_numpy(np.ascontiguousarray(volumes, np.float32))
        smooth = _smooth(images, self._sigma)
        turn = torch.eye(3).repeat(len(images), 1, 1)
        shift = torch.zeros(len(images), 3)
        before = self._likeness(self._values(smooth, turn, shift))
        for _ in range(_ITERATIONS):
            values = self._values(smooth, turn, shift)
            scale = (values @ self._target) / values.square().sum(1).clamp_min(1e-12)
            step = (scale[:, None] * values - self._target) @ self._solve.T
            turn = turn @ _rotation(-step[:, :3])
            shift = shift - (turn @ step[:, 3:, None])[:, :, 0]
        kept = self._likeness(self._values(smooth, turn, shift)) >= before
        turn = torch.where(kept[:, None, None], turn, torch.eye(3))
        shift = torch.where(kept[:, None], shift, 0.0)
        moved = _sample(images, turn, shift, self._spacing)
        return Aligned(volumes=moved.numpy(), rotations=turn.numpy(), shifts_mm=shift.numpy())

    def _values(self, images: Tensor, turn: Tensor, shift: Tensor) -> Tensor:
        half = torch.tensor(images.shape[1:]) * self._spacing / 2
        at = ((self._points @ turn.mT + shift[:, None]) / half).flip(-1)
        sampled: Tensor = functional.grid_sample(images[:, None], at[:, None, None], align_corners=False)
        values: Tensor = sampled[:, 0, 0, 0]
        return values - values.mean(1, keepdim=True)

    def _likeness(self, values: Tensor) -> Tensor:
        likeness: Tensor = (values @ self._target) / (values.norm(dim=1) * self._target.norm()).clamp_min(1e-12)
        return likeness


class VoxelDescriptor:
    """Aligned volumes → vectors of unit length, as they are and mirrored."""

    def __init__(self, frame: CanonicalFrame, dimensions: int = DIMENSIONS, seed: int = 0) -> None:
        self._mask = torch.from_numpy(frame.mask)
        self._fine = tuple(_FINE_MM / s for s in frame.spacing_mm)
        self._coarse = tuple(_COARSE_MM / s for s in frame.spacing_mm)
        shape = (int(self._mask.sum()), dimensions)
        self._projection = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))

    @torch.inference_mode()
    def describe(self, aligned: F32) -> F32:
        """(B, X, Y, Z) aligned volumes → (B, 2, d) float32: the volume's descriptor and its mirror image's."""
        images = torch.from_numpy(np.ascontiguousarray(aligned, np.float32))
        contrast = self._local_contrast(self._ranks(images))
        both = torch.stack([contrast, contrast.flip(1)], 1)[:, :, self._mask]
        projected = both @ self._projection
        return np.asarray(functional.normalize(projected, dim=-1).numpy())

    def _ranks(self, images: Tensor) -> Tensor:
        """Share of the mask's voxels that are darker, in [0, 1]; 0 outside it. Ties, such as all that is 0, stay ties."""
        inside = images[:, self._mask].contiguous()
        ranks = torch.searchsorted(inside.sort(dim=1).values, inside).float() / inside.shape[1]
        out = torch.zeros_like(images)
        out[:, self._mask] = ranks
        return out

    def _local_contrast(self, images: Tensor) -> Tensor:
        fine = _smooth(images, self._fine)
        detail = fine - _smooth(fine, self._coarse)
        power = _smooth(detail.square(), self._coarse)
        floor = _CONTRAST_FLOOR**2 * power.amax((1, 2, 3), keepdim=True)
        return detail / (power + floor + 1e-12).sqrt()


def _symmetric(mean: npt.NDArray[np.float64]) -> F32:
    return np.ascontiguousarray((mean + mean[::-1]) / 2, np.float32)


def _smooth(images: Tensor, sigma: tuple[float, ...]) -> Tensor:
    """Gaussian filter of (B, X, Y, Z), sigma in voxels per axis, zeros outside; on a CPU SciPy is the quickest at it."""
    return torch.from_numpy(gaussian_filter(images.numpy(), (0, *sigma), mode="constant", truncate=3.0))


def _rotation(vectors: Tensor) -> Tensor:
    """(B, 3) rotation vectors in radians → (B, 3, 3)."""
    x, y, z = vectors.T
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], 1).view(-1, 3, 3)
    rotations: Tensor = torch.linalg.matrix_exp(cross)
    return rotations


def _sample(images: Tensor, turn: Tensor, shift: Tensor, spacing: Tensor) -> Tensor:
    """Trilinear images(R p + t), p in mm from the centre of the grid, zeros outside."""
    half = torch.tensor(images.shape[1:]) * spacing / 2
    # grid_sample counts from -1 to 1 between the outer faces, and its axes run backwards.
    matrix = (turn * half / half[:, None]).flip((1, 2))
    theta = torch.cat([matrix, (shift / half).flip(1)[:, :, None]], 2)
    grid = functional.affine_grid(theta, [len(images), 1, *images.shape[1:]], align_corners=False)
    moved: Tensor = functional.grid_sample(images[:, None], grid, align_corners=False)
    return moved[:, 0]
