"""Measured values, stored next to the manifest: what an evaluation measured on each volume.

The manifest is a fold over commit records and never changes, so what is measured later lies next to it, one Parquet file
per evaluation. The file's name is the digest of its bytes: it is put once, another evaluation has another name, and a
flipped bit shows. It names the state of the dataset that was measured. Needs pyarrow and pandas, only when called.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from typing import TYPE_CHECKING, Any

from brainsynth.storage.untrusted import check_parquet

if TYPE_CHECKING:
    import pandas as pd

    from brainsynth.storage.filesystem import Store

FOLDER = "quality"
_FACTS = b"brainsynth"
_NAME = re.compile(FOLDER + r"/measured-([0-9a-f]{32})\.parquet")


def put_measured(store: Store, table: pd.DataFrame, shards_digest: str, facts: dict[str, Any]) -> str:
    """Store a table of `sample_id` and `measured_…` columns; returns its key. Equal tables and facts are one file.

    Args:
        shards_digest: of the dataset's manifest: the volumes that were measured.
        facts: plain JSON: which instruments, calibrated on what.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    wrong = [c for c in table if c != "sample_id" and not str(c).startswith("measured_")]
    if wrong or "sample_id" not in table:
        raise ValueError(f"a table of measured values holds sample_id and measured_… columns, not {wrong}")
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    about = json.dumps({**facts, "shards_digest": shards_digest}, sort_keys=True)
    buffer = io.BytesIO()
    pq.write_table(arrow.replace_schema_metadata({_FACTS: about.encode()}), buffer, compression="zstd")
    data = buffer.getvalue()
    key = f"{FOLDER}/measured-{hashlib.sha256(data).hexdigest()[:32]}.parquet"
    store.write_new(key, data)
    return key


def is_measured(key: str) -> bool:
    """True for the keys of such tables."""
    return _NAME.fullmatch(key) is not None


def read_measured(data: bytes, key: str, shards_digest: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The table of a stored file, and its facts.

    Raises:
        ValueError: it is damaged, or was measured on another state of the dataset than this digest's.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = _NAME.fullmatch(key)
    if name is None or hashlib.sha256(data).hexdigest()[:32] != name[1]:
        raise ValueError(f"{key} is damaged: its sha256 is not that of its name; delete it and evaluate again")
    try:
        file = io.BytesIO(data)
        check_parquet(file)
        arrow = pq.read_table(file)
        facts = json.loads((arrow.schema.metadata or {})[_FACTS])
        measured = facts.pop("shards_digest")
        table = arrow.to_pandas()
        if "sample_id" not in table or table["sample_id"].duplicated().any():
            raise ValueError("sample_id")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{key} is not a table of measured values ({type(error).__name__}: {error}); delete it"
        ) from None
    if measured != shards_digest:
        raise ValueError(f"{key} was measured on another state of this dataset; delete it and evaluate again")
    return table, facts


def choose(keys: list[str], wanted: str | bool, where: str) -> str:
    """The key of the table that is asked for: by the start of its digest, or the only one (`True`).

    Raises ValueError, with the digests that there are, where that is not exactly one.
    """
    names = {match[1]: key for key in keys if (match := _NAME.fullmatch(key))}
    fitting = [name for name in names if wanted is True or name.startswith(str(wanted))]
    if len(fitting) != 1:
        there = ", ".join(sorted(name[:12] for name in names)) or "none"
        raise ValueError(
            f"{where}: {len(fitting)} tables of measured values fit measured={wanted!r}; there are: {there}; "
            "`brainsynth evaluate` with publish: true makes one"
        )
    return names[fitting[0]]
