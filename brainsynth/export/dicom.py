"""DICOM: one series a volume, a folder of axial slices (MR Image Storage), marked as Synthetic Data (0008,001C).

Needs pydicom. UIDs follow from the subject and its voxels, so that an export which is made again has the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from brainsynth.export.file_format import ExportedVolume, FileFormat
from brainsynth.volume import voxel_sha256

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

FULL = {"uint8": 255, "uint16": 65535}
"""The stored integer of intensity 1; of volumes of floats it is 2048, on whose steps they are stored."""
_OF_FLOATS = 2048
_MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"
_EMPTY = (
    "PatientBirthDate", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "StudyID", "ScanOptions",
    "RepetitionTime", "EchoTime", "EchoTrainLength", "PositionReferenceIndicator", "PatientPosition",
)  # fmt: skip
"""What every image must have, though it is not known here."""
_EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"


def _write(path: Path, volumes: Iterable[ExportedVolume]) -> None:
    """As a radiologist looks at it: columns to the left of the patient, rows to the back, slices upwards."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import UID

    (volume,) = volumes
    path.mkdir()
    series = f"{volume.sample_id} {voxel_sha256(volume.stored)}"
    pixels = _integers(volume)
    for index in range(pixels.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = UID(_MR_IMAGE)
        meta.MediaStorageSOPInstanceUID = UID(_uid(series, "slice", index))
        meta.TransferSyntaxUID = UID(_EXPLICIT_LITTLE)
        image = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))  # type: ignore[arg-type]
        _identify(image, volume, series, index)
        _place(image, volume, index)
        turned = pixels[::-1, ::-1, index].T
        image.Rows, image.Columns = turned.shape
        image.PixelData = np.ascontiguousarray(turned, dtype="<u2").tobytes()
        image.save_as(path / f"{index:04d}.dcm", enforce_file_format=True)


def _integers(volume: ExportedVolume) -> npt.NDArray[np.uint16]:
    if volume.stored.dtype.kind == "u":
        return volume.stored.astype(np.uint16)
    return np.rint(volume.image * _OF_FLOATS).astype(np.uint16)


def _uid(*of: Any) -> str:
    """A UID of the form 2.25.N (ISO/IEC 9834-8), of what it names."""
    return f"2.25.{int.from_bytes(hashlib.sha256(repr(of).encode()).digest()[:16], 'big')}"


def _identify(image: Dataset, volume: ExportedVolume, series: str, index: int) -> None:
    """Patient, study and series: what was asked of the model stands for what is known of a person."""
    facts: dict[str, Any] = volume.facts
    synthetic, covariates = bool(facts["synthetic"]), facts.get("covariates", {})
    image.SOPClassUID, image.SOPInstanceUID = _MR_IMAGE, _uid(series, "slice", index)
    image.StudyInstanceUID, image.SeriesInstanceUID = _uid(series, "study"), _uid(series, "series")
    image.FrameOfReferenceUID = _uid(series, "frame")
    image.add_new(0x0008001C, "CS", "YES" if synthetic else "NO")  # Synthetic Data
    image.SpecificCharacterSet = "ISO_IR 192"
    image.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
    image.Modality, image.Manufacturer, image.ManufacturerModelName = "MR", "brainsynth", "brainsynth"
    image.PatientName, image.PatientID = f"{'Synthetic^' if synthetic else ''}{volume.sample_id}", volume.sample_id
    age, sex = covariates.get("age"), covariates.get("sex")
    image.PatientSex = sex if sex in ("F", "M", "O") else ""
    if isinstance(age, int | float) and 0 <= age < 1000:
        image.PatientAge = f"{round(age):03d}Y"
    asked = ", ".join(f"{name} {value}" for name, value in covariates.items())
    mark = f"AI-generated, {volume.whose}, not for diagnosis. Asked of the model: " if synthetic else ""
    image.ImageComments = f"{mark}{asked}"[:10240]
    image.StudyDescription, image.SeriesDescription = "Synthetic T1w brain MRI" if synthetic else "T1w brain MRI", "T1w"
    for keyword in _EMPTY:
        setattr(image, keyword, "")
    image.BodyPartExamined = "BRAIN"
    image.ScanningSequence, image.SequenceVariant, image.MRAcquisitionType = "RM", "NONE", "3D"
    image.SeriesNumber, image.InstanceNumber = 1, index + 1


def _place(image: Dataset, volume: ExportedVolume, index: int) -> None:
    """Where the slice is in the patient (LPS+, mm), and how its integers are read."""
    x, y, _ = volume.grid.shape_xyz
    corner = volume.grid.affine @ [x - 1, y - 1, index, 1]
    spacing = volume.grid.spacing_mm
    image.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    image.ImagePositionPatient = [_decimal(value) for value in (-corner[0], -corner[1], corner[2])]
    image.PixelSpacing = [_decimal(spacing[1]), _decimal(spacing[0])]
    image.SliceThickness = image.SpacingBetweenSlices = _decimal(spacing[2])
    full = FULL.get(volume.stored.dtype.name, _OF_FLOATS)
    image.WindowCenter, image.WindowWidth = full // 2, full
    image.SamplesPerPixel, image.PhotometricInterpretation, image.PixelRepresentation = 1, "MONOCHROME2", 0
    image.BitsAllocated, image.BitsStored, image.HighBit = 16, 16, 15


def _decimal(value: float) -> str:
    """A decimal string of DICOM: at most 16 characters."""
    return f"{value + 0.0:.10g}"


FORMAT = FileFormat(
    path="sub-{id}",
    about="`sub-<id>/NNNN.dcm`: a DICOM series of axial slices, Synthetic Data (0008,001C) set, without label maps; "
    "intensity 1 is the integer 2048 (255 or 65535 of datasets that store integers)",
    write=_write,
    holds_labels=False,
    needs="pydicom",
)
