"""Read a dataset: index access, a torch `Dataset`, covariates as a DataFrame. Needs only zarr and NumPy.

pandas is imported by `.table`, torch by `.torch()`, obstore for remote URIs: each only when asked for. Workers of a
torch DataLoader open the array themselves, so fork, forkserver and spawn all work; on an object store, whose client does
not survive a fork, forkserver and spawn. Credentials of one come from the environment, as for writing.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from brainsynth.storage.quality import FOLDER, choose, read_measured
from brainsynth.storage.untrusted import check_zarr_array, plain_json

if TYPE_CHECKING:
    import pandas as pd
    import zarr

_FIELDS = {"schema_version", "arrays", "affine", "covariates", "kinds", "units", "files"}
_INTEGER_MAX = {"uint16": 65535.0, "uint8": 255.0}


class SyntheticDataset:
    """The committed volumes of a finished dataset; rejected and failed rows are left out.

    `dataset[i]` is a dict: `image` float32 (X, Y, Z) in [0, 1] (for latents: the first array, (C, X, Y, Z)), `sample_id`,
    `affine` float64 (4, 4) voxel → world in mm (RAS+), and one entry per covariate (float or str; NaN or "" if missing).
    """

    def __init__(
        self, uri: str, split: str | None = None, array: str | None = None, measured: str | bool = False
    ) -> None:
        self.uri = uri
        manifest = _read_manifest(uri)
        self.manifest = manifest
        self.array_name = array or manifest["arrays"][0]
        if not self.array_name.isidentifier():
            raise ValueError(f"{uri}: {ascii(self.array_name)[:80]} is no name of an array")
        self.affine: npt.NDArray[np.float64] = np.array(manifest["affine"])
        self.covariates: tuple[str, ...] = tuple(manifest["covariates"])
        self.units: dict[str, str] = manifest["units"]
        self._numeric = {name: kind == "continuous" for name, kind in manifest["kinds"].items()}
        self._participants = [
            line
            for line in csv.DictReader(_read_participants(uri, manifest).splitlines(), delimiter="\t")
            if line["status"] == "ok" and (split is None or line.get("split") == split)
        ]
        if split is not None and not self._participants:
            raise ValueError(f"{uri} has no subjects in the split {split!r}")
        self.rows = np.array([int(line["row"]) for line in self._participants], dtype=np.int64)
        self._measured = choose(_list(uri, FOLDER), measured, uri) if measured else None
        self._opened: tuple[int, zarr.Array[Any]] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a dataset with {len(self)} volumes")
        line = self._participants[index]
        sample: dict[str, Any] = {
            "image": self.volume(index),
            "affine": self.affine.copy(),
            "sample_id": line["participant_id"].removeprefix("sub-"),
        }
        for name in self.covariates:
            sample[name] = _value(line[name], self._numeric[name])
        return sample

    def volume(self, index: int) -> npt.NDArray[np.float32]:
        """The `index`-th volume, float32. Raises ValueError when its stored data is lost."""
        row = int(self.rows[index])
        stored = self._stored(row)
        # No volume is constant (see describe_sample), so where integers are all fill value the shard is gone.
        if not (np.isfinite(stored).all() if stored.dtype.kind == "f" else stored.any()):
            raise ValueError(
                f"{self.uri}: the volume of row {row} is lost or damaged; run `brainsynth verify {self.uri}`"
            )
        return stored.astype(np.float32) / np.float32(_INTEGER_MAX.get(stored.dtype.name, 1.0))

    def volumes(self, indices: Sequence[int] | None = None) -> npt.NDArray[np.float32]:
        """(n, …) float32 volumes, all of them by default."""
        chosen = range(len(self)) if indices is None else indices
        return np.stack([self.volume(index) for index in chosen])

    @property
    def sample_ids(self) -> list[str]:
        """Ids in order."""
        return [line["participant_id"].removeprefix("sub-") for line in self._participants]

    @property
    def table(self) -> pd.DataFrame:
        """sample_id, row and covariates (physical units), one line per volume, as a pandas DataFrame.

        Opened with `measured`, what was measured on each image stands beside it, as `measured_…` columns.
        """
        import pandas as pd

        lines: list[dict[str, Any]] = []
        for line in self._participants:
            values = {name: _value(line[name], self._numeric[name]) for name in self.covariates}
            lines.append({"sample_id": line["participant_id"].removeprefix("sub-"), "row": int(line["row"]), **values})
        table = pd.DataFrame(lines, columns=["sample_id", "row", *self.covariates])
        for name in (name for name in self.covariates if not self._numeric[name]):
            table[name] = table[name].mask(table[name] == "")
        if self._measured is None:
            return table
        found, _ = read_measured(_read(self.uri, self._measured), self._measured, self.manifest["shards_digest"])
        return table.merge(found, how="left", on="sample_id", validate="one_to_one")

    def torch(self) -> Any:
        """A `torch.utils.data.Dataset` of the same samples; `image` is a float32 tensor (1, X, Y, Z)."""
        from brainsynth.storage.torch_dataset import TorchDataset

        return TorchDataset(self)

    def _stored(self, row: int) -> npt.NDArray[Any]:
        if not _is_remote(self.uri):
            array = self._array()
            shard = "/".join(["c", str(row // (array.shards or array.chunks)[0]), *["0"] * (array.ndim - 1)])
            _file(self.uri, f"dataset.zarr/{self.array_name}/{shard}")
            return np.asarray(array[row])
        from brainsynth.storage.object_store import read_through

        return read_through(self.uri, lambda: np.asarray(self._array()[row]))

    def _array(self) -> zarr.Array[Any]:
        # One handle per process: a handle made before a fork must not be used after it.
        if self._opened is None or self._opened[0] != os.getpid():
            import zarr

            path = f"dataset.zarr/{self.array_name}"
            check_zarr_array(_read(self.uri, f"{path}/zarr.json"), f"{self.uri}/{path}/zarr.json")
            self._opened = (os.getpid(), zarr.open_array(_zarr_store(self.uri), path=path, mode="r", zarr_format=3))
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


def open_dataset(
    uri: str, split: str | None = None, array: str | None = None, measured: str | bool = False
) -> SyntheticDataset:
    """Open a finished dataset (generated, prepared or latents) at a path or object-store URI.

    Args:
        uri: the dataset's root folder.
        split: `train` or `validation` of a prepared cohort; all by default.
        array: which array; the first (`t1w`) by default.
        measured: also measured values that `jobs/evaluate.py` published, in `.table`: True for the only table, or the start
            of one's digest.

    Raises:
        FileNotFoundError: there is no finished dataset at `uri`.
        ValueError: its manifest is damaged, or there is not exactly one such table of measured values.
        UserError: an object store refuses access, has no such bucket or does not answer; a ValueError, too.
    """
    return SyntheticDataset(str(uri), split=split, array=array, measured=measured)


def _read_manifest(uri: str) -> dict[str, Any]:
    try:
        data = _read(uri, "dataset.json")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no finished dataset at {uri}: dataset.json is missing (run the job that makes it again to resume)"
        ) from None
    try:
        sealed = plain_json(data, "dataset.json")
        record: dict[str, Any] = sealed["record"]
        # As records.digest does, which needs pydantic.
        body = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
        if hashlib.sha256(body).hexdigest() != sealed["sha256"]:
            raise ValueError("digest")
        if not isinstance(record, dict) or _FIELDS - set(record):
            raise ValueError("fields")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{uri}/dataset.json is damaged; run the job that made it again") from None
    if record.get("schema_version") != 1:
        raise ValueError(f"{uri} has schema version {record.get('schema_version')}; this brainsynth reads version 1")
    return record


def _read_participants(uri: str, manifest: dict[str, Any]) -> str:
    data = _read(uri, "participants.tsv")
    if hashlib.sha256(data).hexdigest() != manifest["files"]["participants.tsv"]:
        raise ValueError(f"{uri}/participants.tsv is not the table that dataset.json names; run the job again")
    return data.decode()


def _is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def _read(uri: str, key: str) -> bytes:
    if _is_remote(uri):
        from brainsynth.storage.object_store import ObjectStore

        return ObjectStore(uri).read(key)
    return _file(uri, key).read_bytes()


def _list(uri: str, folder: str) -> list[str]:
    if _is_remote(uri):
        from brainsynth.storage.object_store import ObjectStore

        return [key for key, _ in ObjectStore(uri).list(folder)]
    return sorted(f"{folder}/{file.name}" for file in _file(uri, folder).glob("*"))


def _file(uri: str, key: str) -> Path:
    """A file of a local dataset; nothing in it may be a link that leads out of it."""
    root = Path(_path(uri))
    file = root / key
    if not file.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{file} is reached by a symbolic link that leaves the dataset: remove the link")
    return file


def _path(uri: str) -> str:
    return "/" + uri.removeprefix("file://").lstrip("/") if uri.startswith("file://") else os.path.expanduser(uri)


def _zarr_store(uri: str) -> Any:
    if _is_remote(uri):
        from zarr.storage import ObjectStore

        from brainsynth.storage.object_store import ATTEMPTS, open_client

        # Zarr asks the client directly: here the client repeats by itself, and reading twice does no harm.
        return ObjectStore(open_client(uri, retries=ATTEMPTS - 1), read_only=True)
    return _path(uri)


def _value(text: str, numeric: bool) -> float | str:
    if text in ("", "n/a"):
        return math.nan if numeric else ""
    return float(text) if numeric else text
