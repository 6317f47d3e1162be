"""xarray over dask: the whole dataset as one lazy array with names on its axes. Needs xarray and dask."""

from __future__ import annotations

from typing import Any

import dask.array
import numpy as np
import numpy.typing as npt
import xarray

from brainsynth.reading.stored_array import DSEG
from brainsynth.reading.volumes import Volumes


class _Sliced:
    """What dask slices: (n, X, Y, Z) float32, of label maps uint8; reads the chunks that a slice touches and no others."""

    def __init__(self, dataset: Volumes, labels: bool = False) -> None:
        self.dataset, self.read = dataset, dataset.label_map if labels else dataset.patch
        self.shape = (len(dataset), *dataset.shape)
        self.dtype, self.ndim = np.dtype(np.uint8 if labels else np.float32), 1 + len(dataset.shape)

    def __getitem__(self, key: Any) -> npt.NDArray[Any]:
        chosen = [np.arange(n)[part] for n, part in zip(self.shape, key, strict=True)]
        first, *rest = [np.atleast_1d(places) for places in chosen]
        if not all(places.size for places in (first, *rest)):
            return np.empty([len(places) for places in (first, *rest)], self.dtype)
        lows = [int(places.min()) for places in rest]
        sizes = [int(places.max()) + 1 - low for places, low in zip(rest, lows, strict=True)]
        within = np.ix_(*(places - low for places, low in zip(rest, lows, strict=True)))
        boxes = np.stack([self.read(int(index), lows, sizes)[within] for index in first])
        return boxes[tuple(slice(None) if places.ndim else 0 for places in chosen)]


def labelled_array(dataset: Volumes) -> xarray.DataArray:
    """(subject, x, y, z), or (subject, channel, x, y, z) of latents; x, y, z in mm for volumes; covariates by subject.

    `np.reshape(array.attrs["affine"], (4, 4))` maps voxels to mm. Raises ValueError for a dataset without volumes, or with a
    covariate that is named as an axis is.
    """
    if not len(dataset):
        raise ValueError(f"{dataset.uri} has no volumes to label")
    volumes = _Sliced(dataset)
    lazy = dask.array.from_array(volumes, chunks=(1, *dataset.shape), asarray=False, name=False)
    space = ["x", "y", "z"][: len(dataset.shape)]
    names = ["subject", *[f"axis{i}" for i in range(len(dataset.shape) - len(space))], *space]
    table = dataset.table.set_index("sample_id").drop(columns="row")
    taken = sorted(set(names) & set(dataset.covariates))
    if taken:
        raise ValueError(f"{dataset.uri}: the covariate {taken[0]!r} is named as an axis of the array: use `.table`")
    coordinates: dict[str, Any] = {"subject": table.index.to_numpy()}
    if len(dataset.shape) == 3:
        for axis, name in enumerate(space):
            step, origin = dataset.affine[axis, axis], dataset.affine[axis, 3]
            coordinates[name] = (name, origin + step * np.arange(dataset.shape[axis]), {"units": "mm"})
    for name in dataset.covariates:
        coordinates[name] = ("subject", table[name].to_numpy(), {"units": dataset.units[name]})
    # What netCDF can hold, for `.to_netcdf()`: an attribute there is a text, a number or a list of numbers.
    attributes = {
        "affine": dataset.affine.ravel().tolist(),
        "axes": "RAS+",
        "synthetic": int(dataset.manifest["synthetic"]),
    }
    return xarray.DataArray(lazy, dims=names, coords=coordinates, name=dataset.array_name, attrs=attributes)


def labelled_pair(dataset: Volumes) -> xarray.Dataset:
    """Images and label maps, on the same coordinates. The names of the structures are flags of the CF conventions.

    Raises ValueError as `labelled_array` does, and for a dataset without label maps.
    """
    if not dataset.has_labels:
        raise ValueError(f"{dataset.uri} holds no label maps")
    images = labelled_array(dataset)
    chunks = (1, *dataset.shape)
    lazy = dask.array.from_array(_Sliced(dataset, labels=True), chunks=chunks, asarray=False, name=False)
    flags = {
        "flag_values": [one["index"] for one in dataset.label_table],
        "flag_meanings": " ".join("_".join(one["name"].split()) for one in dataset.label_table),
    }
    maps = images.copy(data=lazy).rename(DSEG)
    maps.attrs |= flags
    return xarray.Dataset({dataset.array_name: images, DSEG: maps})
