"""A dataset as the server hands it out: the document of its rows, and one volume at a time."""

from __future__ import annotations

import hashlib
import threading

from brainsynth.errors import UserError
from brainsynth.export.nifti import nifti_bytes
from brainsynth.export.plan import read_model
from brainsynth.reading.stored_array import StoredArray
from brainsynth.viewer.document import document
from brainsynth.viewer.rows import Rows


class View:
    """Made to be asked by several threads at once; writes nothing."""

    def __init__(self, uri: str, measured: str | bool = True) -> None:
        """Raises UserError as `Rows` does."""
        self._rows = Rows(uri, measured)
        self._model = read_model(self._rows.store, self._rows.plan)
        self._title = "/".join(uri.rstrip("/").split("/")[-2:])  # many a dataset's folder is called `generated`
        try:
            self._image, *self._labels = (StoredArray(uri, array.name) for array in self._rows.plan.arrays)
        except FileNotFoundError as error:
            raise UserError(f"{uri}: the array of the volumes is not there ({error}); run its job again") from None
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from None
        self._lock = threading.Lock()
        self._document, self._version, self._whole = b"", "", frozenset[int]()
        self._remember()

    def __len__(self) -> int:
        """Rows whose fate is known."""
        return len(self._rows.table)

    def document(self) -> tuple[bytes, str]:
        """The document, and a text that differs from version to version. Raises UserError for a damaged record."""
        with self._lock:
            if self._rows.refresh():
                self._remember()
            return self._document, self._version

    @property
    def finished(self) -> bool:
        """Whether no more rows will come."""
        return self._rows.finished

    @property
    def has_labels(self) -> bool:
        """Whether volumes have label maps."""
        return bool(self._labels)

    def keep(self, rows: list[int]) -> None:
        """Show these rows alone, from now on."""
        self._rows.table = self._rows.table[self._rows.table["row"].isin(rows)].reset_index(drop=True)
        self._remember()

    def volume(self, row: int) -> bytes:
        """The volume of a row as an uncompressed float32 NIfTI, equal to what `brainsynth export` writes.

        Raises:
            KeyError: the row has no volume that is committed.
            ValueError: the stored data is lost or damaged; a UserError where the object store does not answer.
        """
        if row not in self._whole:
            raise KeyError(row)
        plan = self._rows.plan
        image = plan.volume.dequantise(self._image.read(row, self._image.box()))
        return nifti_bytes(image, plan.volume, plan.whose)

    def labels(self, row: int) -> bytes:
        """The label map of a row as `volume` gives its image, uint8. Raises KeyError where there is none, too."""
        if row not in self._whole or not self._labels:
            raise KeyError(row)
        (labels,), plan = self._labels, self._rows.plan
        return nifti_bytes(labels.read(row, labels.box()), plan.volume, plan.whose)

    def _remember(self) -> None:
        table = self._rows.table
        self._document = document(self._rows, self._title, self._model)
        self._version = hashlib.sha256(self._document).hexdigest()[:16]
        self._whole = frozenset(table["row"][table["status"] == "ok"].tolist())
