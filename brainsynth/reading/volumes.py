"""The volumes of a dataset: by index, whole or boxes of them; covariates as a DataFrame. Needs NumPy, numcodecs and crc32c.

What else is needed is imported when it is asked for: pandas by `.table`, zarr for an array of another layout than ours,
obstore for an object store. The adapters to torch, MONAI, Ray and others take a `Volumes`; `dataset.py` has their methods.
"""

from __future__ import annotations

import contextlib
import math
import operator
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast, overload

import numpy as np
import numpy.typing as npt

from brainsynth.reading.cache import Cache
from brainsynth.reading.files import is_remote, list_files, local_path, read_file
from brainsynth.reading.manifest import committed, finished
from brainsynth.reading.query import Query
from brainsynth.reading.splits import fixed_split
from brainsynth.reading.stored_array import DSEG, INTEGER_MAX, StoredArray
from brainsynth.storage.measured import FOLDER, choose, read_measured

if TYPE_CHECKING:
    import pandas as pd


_LABEL_VOLUME = "label_volume_"


class Volumes:
    """The committed volumes of a dataset; rejected and failed rows are left out.

    `dataset[i]` is a dict: `image` float32 (X, Y, Z) in [0, 1] (for latents: the first array, (C, X, Y, Z)), `sample_id`,
    `affine` float64 (4, 4) voxel → world in mm (RAS+), and one entry per covariate (float or str; NaN or "" if missing).
    A dataset with label maps has `labels`, too: uint8 (X, Y, Z).
    """

    def __init__(
        self,
        uri: str,
        split: str | None = None,
        array: str | None = None,
        measured: str | bool = False,
        where: str | None = None,
        partial: bool = False,
        labels: bool = True,
        cache: str | None = None,
    ) -> None:
        self.uri = uri = uri if "://" in uri else os.path.abspath(local_path(uri))  # a worker may run in another folder
        cache = cache if cache is not None and is_remote(uri) else None
        self.manifest, lines = self._open(uri, partial, cache)
        manifest = self.manifest
        self.array_name: str = array or manifest["arrays"][0]
        if not self.array_name.isidentifier():
            raise ValueError(f"{uri}: {ascii(self.array_name)[:80]} is not the name of an array")
        self.label_table: list[dict[str, Any]] = (manifest.get("labels") or {}).get("labels", [])
        """One dict a structure: `index`, the integer in a label map, `name`, and `abbreviation` and `color` if there are."""
        self.has_labels = labels and bool(self.label_table) and self.array_name == manifest["arrays"][0]
        """Whether samples have `labels`."""
        self.affine: npt.NDArray[np.float64] = np.array(manifest["affine"])
        self.covariates: tuple[str, ...] = tuple(manifest["covariates"])
        self.units: dict[str, str] = manifest["units"]
        self._numeric = {name: kind == "continuous" for name, kind in manifest["kinds"].items()}
        known = {name: self._numeric[name] for name in self.covariates}
        known |= dict.fromkeys(self._label_volumes(lines[0]) if lines else (), True)
        chosen = None if where is None else Query(where, known)
        self._participants = [
            line
            for line in lines
            if line["status"] == "ok"
            and (split is None or _split(line) == split)
            and (chosen is None or chosen(self._values(line) | self._label_volumes(line)))
        ]
        if split is not None and not self._participants:
            where_too = "" if where is None else f" where {where}"
            filled = ", ".join(sorted({_split(line) for line in lines if line["status"] == "ok"})) or "none"
            raise ValueError(f"{uri} has no subjects in the split {split!r}{where_too}; splits with subjects: {filled}")
        self.rows = np.array([int(line["row"]) for line in self._participants], dtype=np.int64)
        if measured and "shards_digest" not in manifest:
            raise ValueError(f"{uri} is not finished: nothing was measured on it yet")
        self._measured = choose(list_files(uri, FOLDER), measured, uri) if measured else None
        digest = manifest.get("shards_digest")  # an unfinished dataset has none: what it holds may still change
        self._cache = None if cache is None or digest is None else Cache(cache, digest)
        self._array: StoredArray | None = None
        self._labels: StoredArray | None = None

    @staticmethod
    def _open(uri: str, partial: bool, cache: str | None) -> tuple[dict[str, Any], list[dict[str, str]]]:
        try:
            return finished(uri, cache)
        except FileNotFoundError:
            if not partial:
                raise
            return committed(uri)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice | Iterable[Any]) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: Any) -> Any:
        """One sample; of a slice, a list of numbers or a mask, a list of samples. Raises TypeError for anything else."""
        places = chosen_places(index, len(self))
        return [self[place] for place in places] if isinstance(places, list) else self._sample(places)

    def _sample(self, index: int) -> dict[str, Any]:
        labels = {"labels": self.label_map(index)} if self.has_labels else {}
        return self.facts(index) | {"image": self.volume(index)} | labels

    def facts(self, index: int) -> dict[str, Any]:
        """`dataset[index]` without its image."""
        self.row(index)
        line = self._participants[operator.index(index)]
        return {
            "affine": self.affine.copy(),
            "sample_id": _sample_id(line),
            **self._values(line),
        }

    def volume(self, index: int) -> npt.NDArray[np.float32]:
        """The `index`-th volume, float32. Raises ValueError when its stored data is lost."""
        return self._intensities(self.stored(index))

    def patch(self, index: int, start: Sequence[int], size: Sequence[int] | int) -> npt.NDArray[np.float32]:
        """The box of `size` voxels from voxel `start` on of the `index`-th volume, float32; only its chunks are read."""
        return self._intensities(self.stored(index, start, size))

    def volumes(self, indices: slice | Iterable[Any] | None = None) -> npt.NDArray[np.float32]:
        """(n, …) float32 volumes, all of them by default; `indices` is a slice, a list of numbers or a mask."""
        chosen: Any = slice(None) if indices is None else list(indices) if isinstance(indices, tuple) else indices
        places = chosen_places(chosen, len(self))
        images = [self.volume(place) for place in (places if isinstance(places, list) else [places])]
        return np.stack(images) if images else np.empty((0, *self.shape), np.float32)

    def stored(
        self, index: int, start: Sequence[int] | None = None, size: Sequence[int] | int | None = None
    ) -> npt.NDArray[Any]:
        """As `volume` or `patch`, in the stored dtype: floats are intensities, integers are ×255 or ×65535."""
        return self.array.read(self.row(index), self.array.box(start, size))

    def label_map(
        self, index: int, start: Sequence[int] | None = None, size: Sequence[int] | int | None = None
    ) -> npt.NDArray[np.uint8]:
        """The label map of the `index`-th volume, or of a box of it: 0 is background, the others are of `label_table`.

        Raises ValueError when it is lost, or the dataset has none.
        """
        if not self.label_table:
            raise ValueError(f"{self.uri} holds no label maps")
        if self._labels is None:
            self._labels = StoredArray(self.uri, DSEG, self._cache)
        return np.asarray(self._labels.read(self.row(index), self._labels.box(start, size)), np.uint8)

    @property
    def label_volumes(self) -> pd.DataFrame:
        """The volume of each structure in ml, counted in the label maps: one line per volume, by sample_id."""
        import pandas as pd

        rows = [list(self._label_volumes(line).values()) for line in self._participants]
        index = pd.Index(self.sample_ids, name="sample_id")
        return pd.DataFrame(rows, index, [one["name"] for one in self.label_table], dtype=np.float64)

    @property
    def array(self) -> StoredArray:
        """The stored voxels, by row."""
        if self._array is None:
            self._array = StoredArray(self.uri, self.array_name, self._cache)
        return self._array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample: (X, Y, Z) of a volume."""
        return self.array.shape

    @property
    def shards(self) -> npt.NDArray[np.int64]:
        """(n,) which shard each sample lies in."""
        return self.rows // self.array.samples_per_shard

    def row(self, index: int) -> int:
        """The row of the `index`-th sample. Raises IndexError."""
        place = chosen_places(index, len(self))
        if isinstance(place, list):
            raise TypeError(f"one volume is asked for by one number, not by {_shown(index)}")
        return int(self.rows[place])

    @property
    def sample_ids(self) -> list[str]:
        """Ids in order."""
        return [_sample_id(line) for line in self._participants]

    @property
    def splits(self) -> list[str]:
        """`train`, `validation` or `test` of each sample: the cohort's own, else by the id (splits.py)."""
        return [_split(line) for line in self._participants]

    @property
    def table(self) -> pd.DataFrame:
        """sample_id, row and covariates (physical units), one line per volume, as a pandas DataFrame.

        Opened with `measured`, it also holds what was measured on each image, as `measured_…` columns.
        """
        import pandas as pd

        lines: list[dict[str, Any]] = []
        for line in self._participants:
            sample_id = _sample_id(line)
            lines.append({"sample_id": sample_id, "row": int(line["row"]), **self._values(line)})
        table = pd.DataFrame(lines, columns=["sample_id", "row", *self.covariates])
        for name in (name for name in self.covariates if not self._numeric[name]):
            table[name] = table[name].mask(table[name] == "")
        if self._measured is None:
            return table
        measured, _ = read_measured(read_file(self.uri, self._measured), self._measured, self.manifest["shards_digest"])
        return table.merge(measured, how="left", on="sample_id", validate="one_to_one")

    def _values(self, line: dict[str, str]) -> dict[str, float | str]:
        return {name: _value(line[name], self._numeric[name]) for name in self.covariates}

    def _label_volumes(self, line: dict[str, str]) -> dict[str, float | str]:
        """The columns that are volumes of structures in ml, in the order of the label table."""
        columns = [name for name in line if name.startswith(_LABEL_VOLUME)] if self.label_table else []
        return {name: _value(line[name], True) for name in columns}

    def check_intensities(self) -> None:
        """Raises ValueError where the array has none: labels divided by 255 would pass for an image."""
        if self.array_name == DSEG:
            raise ValueError(
                f"{self.uri}: {DSEG} holds label maps and no intensities: open the dataset without array= for "
                'sample["labels"], or read them by .label_map(i)'
            )

    def _intensities(self, stored: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        self.check_intensities()
        image = stored.astype(np.float32)
        return image if stored.dtype.kind == "f" else image / np.float32(INTEGER_MAX[stored.dtype.name])


def chosen_places(index: Any, count: int) -> int | list[int]:
    """A number of `count` volumes; of a slice, a list of numbers or a mask, a list of them.

    Raises IndexError for numbers, and masks, that do not fit; TypeError for anything else.
    """
    if isinstance(index, slice):
        return list(range(*index.indices(count)))
    if isinstance(index, bool | np.bool_ | str | bytes | tuple | dict | set) or index is None:
        raise TypeError(_no_index(index))
    with contextlib.suppress(TypeError):
        place = operator.index(index)
        if not -count <= place < count:
            raise IndexError(f"index {place} of a dataset with {count} volumes")
        return place
    try:
        several = np.asarray(index if hasattr(index, "__array__") else list(index))
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(_no_index(index)) from None
    mixed = several.dtype.kind != "b" and isinstance(index, list) and any(isinstance(v, bool | np.bool_) for v in index)
    if several.ndim != 1 or (several.dtype.kind not in "biu" and several.size) or mixed:
        raise TypeError(_no_index(index))
    if several.dtype.kind == "b":
        if len(several) != count:
            raise IndexError(f"a mask of {len(several)} values for a dataset with {count} volumes")
        if hasattr(index, "iloc"):
            several = several[_places_of_labels(index.index, count)]
        return [int(place) for place in np.flatnonzero(several)]
    return [cast(int, chosen_places(int(place), count)) for place in several]


def _places_of_labels(labels: Any, count: int) -> npt.NDArray[np.intp]:
    """Where in a Series of pandas each volume's row is: rows of `dataset.table` that were sorted keep their labels."""
    places = np.argsort(labels, kind="stable")
    if not np.array_equal(np.asarray(labels)[places], np.arange(count)):
        raise IndexError(
            f"a mask of pandas whose labels are not those of dataset.table, 0 to {count - 1}: of values in the dataset's "
            "order, give mask.to_numpy()"
        )
    return places


def _no_index(index: Any) -> str:
    return (
        f"a dataset is indexed by a number, a slice, a list of numbers or a mask, not by {_shown(index)}; "
        "of an id: dataset[dataset.sample_ids.index('syn000001')]"
    )


def _shown(index: Any) -> str:
    return f"{type(index).__name__} {' '.join(ascii(index).split())[:60]}"


def _sample_id(line: dict[str, str]) -> str:
    return line["participant_id"].removeprefix("sub-")


def _split(line: dict[str, str]) -> str:
    return line["split"] if "split" in line else fixed_split(_sample_id(line))


def _value(text: str, numeric: bool) -> float | str:
    if text in ("", "n/a"):
        return math.nan if numeric else ""
    return float(text) if numeric else text
