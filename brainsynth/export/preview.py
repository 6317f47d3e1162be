"""The first volumes of a dataset in one Parquet file, which `datasets.load_dataset` and the hub's preview open."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq

from brainsynth.export.nifti import packed_nifti
from brainsynth.reading.dataset import open_dataset
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import open_store

_FEATURES = {"info": {"features": {"nifti": {"_type": "Nifti"}}}}
"""What the library `datasets` reads: the column is decoded by nibabel."""


def preview(uri: str, count: int) -> bytes:
    """Id, covariates, split and NIfTI of the first `count` volumes; none is picked."""
    dataset, plan = open_dataset(uri), read_plan(open_store(uri))
    table = dataset.table[["sample_id", *plan.covariates.names]].assign(split=dataset.splits).iloc[:count]
    volumes = [
        {
            "bytes": packed_nifti(dataset.volume(place), plan.volume, plan.whose),
            "path": f"sub-{name}_T1w.nii.gz",
        }
        for place, name in enumerate(table["sample_id"])
    ]
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    arrow = arrow.append_column("nifti", pa.array(volumes, pa.struct({"bytes": pa.binary(), "path": pa.string()})))
    out = io.BytesIO()
    pq.write_table(
        arrow.replace_schema_metadata({b"huggingface": json.dumps(_FEATURES).encode()}), out, row_group_size=1
    )
    return out.getvalue()
