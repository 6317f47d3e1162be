"""The table of export formats. A new one is its file, an entry here and its name in `config.schema.ExportFormat`."""

from __future__ import annotations

import dataclasses

from brainsynth.config.schema import ExportFormat
from brainsynth.export import dicom, nifti, nifti_zarr, ome_zarr, webdataset
from brainsynth.export.file_format import FileFormat

FORMATS: dict[ExportFormat, FileFormat] = {
    "nifti": nifti.FORMAT,
    "bids": dataclasses.replace(
        nifti.FORMAT,
        path="sub-{id}/anat/sub-{id}_T1w.nii.gz",
        about="`sub-<id>/anat/sub-<id>_T1w.nii.gz`: float32 NIfTI in the layout of BIDS",
        label_path="derivatives/labels/sub-{id}/anat/sub-{id}_dseg.nii.gz",
        label_folder="derivatives/labels/",
    ),
    "ome-zarr": ome_zarr.FORMAT,
    "nifti-zarr": nifti_zarr.FORMAT,
    "dicom": dicom.FORMAT,
    "webdataset": webdataset.FORMAT,
}
