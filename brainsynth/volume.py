"""VolumeSpec: the grid a volume lives on and how intensities are stored. Axes are X, Y, Z in RAS+ everywhere.

Intensities are in [0, 1]. Stored float values are snapped to a grid of 2^-11, the precision of float16 just below 1: the
worst error is the same as float16's own (2.4e-4) and the files are half as large, because background noise no longer
carries ten relative bits.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from brainsynth.records import record

StoredDtype = Literal["float16", "float32", "uint16", "uint8"]
StoredCodec = Literal["zstd-3", "zstd-1", "lz4"]
"""How chunks are compressed, all by Blosc: which algorithm at which level."""
INTEGER_MAX: dict[str, int] = {"uint16": 65535, "uint8": 255}


@record
class VolumeSpec:
    """Shape, geometry and stored intensity type of every volume of a dataset."""

    shape_xyz: tuple[int, int, int]
    """Voxels along X (to the right), Y (to the front), Z (up)."""
    spacing_mm: tuple[float, float, float]
    """Voxel size in mm along X, Y, Z."""
    origin_mm: tuple[float, float, float]
    """World coordinates (mm, RAS+) of the centre of voxel (0, 0, 0)."""
    dtype: StoredDtype = "float16"
    """`float16` for machine learning; `float32`, `uint16` and `uint8` open in any viewer."""
    step: float = 2.0**-11
    """Floats are rounded to multiples of this; 0 stores them as they are."""

    def __post_init__(self) -> None:
        if min(self.shape_xyz) < 1:
            raise ValueError("shape_xyz must be positive")
        if not all(np.isfinite(self.spacing_mm)) or min(self.spacing_mm) <= 0:
            raise ValueError("spacing_mm must be positive and finite")
        if not 0 <= self.step < 0.5:
            raise ValueError("step must be in [0, 0.5)")

    @property
    def affine(self) -> npt.NDArray[np.float64]:
        """(4, 4) voxel → world matrix in mm, RAS+."""
        matrix = np.diag([*self.spacing_mm, 1.0])
        matrix[:3, 3] = self.origin_mm
        return matrix

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in ml."""
        return float(np.prod(self.spacing_mm)) / 1000.0

    @property
    def tolerance(self) -> float:
        """Largest error of `dequantise(quantise(x))` for x in [0, 1]."""
        if self.dtype in INTEGER_MAX:
            return 0.5 / INTEGER_MAX[self.dtype]
        return max(self.step / 2, 2.0**-12 if self.dtype == "float16" else 2.0**-24)

    def quantise(self, volume: npt.NDArray[np.floating[Any]]) -> npt.NDArray[Any]:
        """Intensities, any shape, in the stored dtype: clipped to [0, 1] and rounded. Raises ValueError on NaN or Inf."""
        if not np.isfinite(volume).all():
            raise ValueError("cannot store a volume with NaN or infinite voxels")
        clipped = np.clip(volume, 0.0, 1.0).astype(np.float32)
        if self.dtype in INTEGER_MAX:
            return np.asarray(np.rint(clipped * INTEGER_MAX[self.dtype]), dtype=self.dtype)
        if self.step:
            clipped = np.rint(clipped / np.float32(self.step)) * np.float32(self.step)
        return np.asarray(np.clip(clipped, 0.0, 1.0), dtype=self.dtype)

    def dequantise(self, stored: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Stored voxels as float32 intensities in [0, 1]."""
        if self.dtype in INTEGER_MAX:
            return stored.astype(np.float32) / np.float32(INTEGER_MAX[self.dtype])
        return stored.astype(np.float32)

    def as_stored(self, volume: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
        """Intensities as they are read again from a dataset. Raises ValueError on NaN or Inf."""
        return self.dequantise(self.quantise(volume))


def voxel_sha256(*stored: npt.NDArray[Any]) -> str:
    """sha256 (hex) of the stored voxels as little-endian C-order bytes, array by array; independent of chunks and codecs."""
    digest = hashlib.sha256()
    for array in stored:
        flat = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(-1)
        digest.update(flat.view(np.uint8).data)
    return digest.hexdigest()


def mirrored(volume: npt.NDArray[Any], spec: VolumeSpec) -> npt.NDArray[Any]:
    """(X, Y, Z) left-right mirrored about the plane x = 0 mm; voxels that come from outside the grid are 0.

    Raises:
        ValueError: that plane lies neither on a voxel nor half-way between two.
    """
    turn = -2 * spec.origin_mm[0] / spec.spacing_mm[0]  # voxel i goes to voxel turn - i
    if abs(turn - round(turn)) > 1e-3:
        raise ValueError(
            "volume.origin_mm: x = 0 mm lies neither on a voxel nor half-way between two, so nothing mirrors"
        )
    source = round(turn) - np.arange(len(volume))
    inside = (source >= 0) & (source < len(volume))
    out = np.zeros_like(volume)
    out[inside] = volume[source[inside]]
    return out


def resample_labels(
    labels: npt.NDArray[np.uint8], affine: npt.NDArray[np.float64], volume: VolumeSpec
) -> npt.NDArray[np.uint8]:
    """A label map by nearest neighbour to the grid of `volume`; crops and pads with 0 where `resample` does."""
    from scipy import ndimage

    if volume.shape_xyz == labels.shape and np.allclose(affine, volume.affine, atol=1e-4):
        return labels
    target_to_source = np.linalg.inv(affine) @ volume.affine
    out: npt.NDArray[np.uint8] = ndimage.affine_transform(
        labels, target_to_source[:3, :3], target_to_source[:3, 3], output_shape=volume.shape_xyz, order=0, cval=0
    )
    return out


def resample(
    data: npt.NDArray[np.float32], affine: npt.NDArray[np.float64], volume: VolumeSpec
) -> npt.NDArray[np.float32]:
    """Trilinear resampling to the grid of `volume`, by world coordinates; crops and pads with 0 as the grids demand.

    A coarser grid is preceded by a Gaussian whose width is that of the lost resolution, so that nothing aliases.
    """
    from scipy import ndimage  # neither readers of datasets nor a config, which holds a grid, need SciPy

    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if volume.shape_xyz == data.shape and np.allclose(affine, volume.affine, atol=1e-4):
        return data
    ratio = np.asarray(volume.spacing_mm) / spacing
    if (ratio > 1.01).any():
        data = ndimage.gaussian_filter(data, np.sqrt(np.maximum(ratio**2 - 1, 0)) / 2.355)
    target_to_source = np.linalg.inv(affine) @ volume.affine
    out: npt.NDArray[np.float32] = ndimage.affine_transform(
        data, target_to_source[:3, :3], target_to_source[:3, 3], output_shape=volume.shape_xyz, order=1, cval=0.0
    )
    return out
