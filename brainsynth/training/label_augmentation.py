"""Other pictures of a labelled scan: pose, size, warp, mirror; contrast, bias field, blur, noise. Boxes of them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from brainsynth.config.labelling import LabelAugmentation
from brainsynth.labels import LabelTable
from brainsynth.training.warping import blur, warp_grid

_SIDES = {"left": "right", "right": "left", "l": "r", "r": "l", "lh": "rh", "rh": "lh"}
_BIAS_POINTS = 4  # control points of a bias field along each axis
_FWHM = 2.3548  # of a Gaussian with sigma 1


@dataclasses.dataclass(frozen=True)
class LabelledBox:
    """A box of a scan, as training sees it."""

    image: Tensor
    """(X, Y, Z) float32 in [0, 1]."""
    classes: Tensor
    """(X, Y, Z) int64: 0 is background, k the k-th label of the table."""
    start: tuple[int, int, int]
    """Its first voxel, in the scan."""


def mirrored_classes(table: LabelTable) -> Tensor | None:
    """(K,) for each class the one of the other side, itself where a name has no side; None where a side has no other.

    Names are compared as lower-case words: `Left-Thalamus` is the other side of `Right-Thalamus`.
    """
    words = [tuple(re.findall(r"[a-z0-9]+", label.name.lower())) for label in table.labels]
    other = [tuple(_SIDES.get(word, word) for word in name) for name in words]
    if any(name not in words for name in other):
        return None
    return torch.tensor([0, *(1 + words.index(name) for name in other)])


def random_box(image: Tensor, box_xyz: Sequence[int] | None, multiple: int) -> tuple[slice, ...]:
    """A box around a random place of the (X, Y, Z) image that is not empty, from a multiple of `multiple` voxels on."""
    slices = []
    for axis, size in enumerate(image.shape):
        length = size if box_xyz is None else min(box_xyz[axis], size)
        planes = image.amax([other for other in range(3) if other != axis]).nonzero()
        low, high = (int(planes[0]), int(planes[-1])) if len(planes) else (0, size - 1)
        middle = low + (high - low) * torch.rand(()).item()
        start = min(max(0, round(middle - length / 2)), size - length) // multiple * multiple
        slices.append(slice(start, start + length))
    return tuple(slices)


def augmented(
    image: Tensor,
    classes: Tensor,
    options: LabelAugmentation,
    spacing_mm: tuple[float, ...],
    mirror: Tensor | None,
    multiple: int,
) -> LabelledBox:
    """A box of another picture of the same brain. All random numbers are torch's own.

    Args:
        image: (X, Y, Z) in [0, 1].
        classes: (X, Y, Z) uint8.
        mirror: class of the other side, by class; None mirrors nothing.
        multiple: the box begins at a multiple of these voxels.
    """
    if mirror is not None and torch.rand(()) < 0.5:
        image, classes = image.flip(0), mirror[classes.flip(0).long()].to(torch.uint8)
    box = random_box(image, options.box_xyz, multiple)
    if torch.rand(()) < options.warp_probability:
        turn, shift, size = 2 * torch.rand(3, 3) - 1
        grid = warp_grid(
            image.shape,
            box,
            spacing_mm,
            turn=turn * math.radians(options.turn_degrees),
            shift_mm=shift * options.shift_mm,
            scale=torch.exp(size * math.log(options.size_ratio)),
            warp_mm=options.warp_mm,
        )
        moved = functional.grid_sample(image[None, None], grid, align_corners=False)
        labels = functional.grid_sample(classes[None, None].float(), grid, mode="nearest", align_corners=False)
        image, classes = moved[0, 0], labels[0, 0]
    else:
        image, classes = image[box], classes[box]
    start = (box[0].start, box[1].start, box[2].start)
    return LabelledBox(other_contrast(image, options, spacing_mm), classes.long(), start)


def other_contrast(image: Tensor, options: LabelAugmentation, spacing_mm: tuple[float, ...]) -> Tensor:
    """The (X, Y, Z) image with another bias field, contrast, sharpness and noise."""
    points = torch.randn(1, 1, *(_BIAS_POINTS,) * 3) * options.bias * torch.rand(())
    field = functional.interpolate(points, size=tuple(image.shape), mode="trilinear", align_corners=True)[0, 0]
    image = image * field.exp_()
    fwhm = float(options.blur_mm * torch.rand(()))
    if fwhm > 0.5 * min(spacing_mm):
        image = blur(image[None], fwhm / _FWHM, spacing_mm)[0]
    gamma = math.exp((2 * torch.rand(()).item() - 1) * math.log(options.gamma))
    gain = math.exp((2 * torch.rand(()).item() - 1) * math.log(options.gain))
    image = gain * image.clamp_min(0) ** gamma
    noise = torch.randn_like(image) * (options.noise * torch.rand(()).item())
    where_tissue = torch.rand(()) < 0.5  # stripped brains have none outside; decoders leave a haze there
    return (image + noise * (image > 0) if where_tissue else image + noise).clamp(0, 1)
