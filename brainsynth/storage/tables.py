"""Tables: a file that a user names, or a stored Parquet file; both judged (untrusted.py) before pandas opens them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow

from brainsynth.errors import UserError
from brainsynth.storage.untrusted import check_parquet, check_table_file


def stored_table(data: bytes) -> pd.DataFrame:
    """The table in the bytes of a Parquet file. Raises ValueError, with the reason, for anything else."""
    try:
        file = io.BytesIO(data)
        check_parquet(file)
        return pd.read_parquet(file)
    except (OSError, ValueError, TypeError, LookupError, pyarrow.ArrowException) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def read_table(path: str, what: str, ids: Sequence[str] = ("sample_id",)) -> pd.DataFrame:
    """A .csv, .tsv or .parquet table; `n/a` (BIDS) and empty cells are missing values. Raises UserError.

    Columns named in `ids` are text, so that subject 007 stays 007; a column is judged whole, so that it has one type.
    """
    suffix = Path(path).suffix.lower()
    try:
        if suffix in (".parquet", ".csv", ".tsv"):
            check_table_file(Path(path))
        if suffix == ".parquet":
            return pd.read_parquet(path)
        if suffix in (".csv", ".tsv"):
            separator = "\t" if suffix == ".tsv" else ","
            return pd.read_csv(path, sep=separator, na_values=["n/a"], dtype=dict.fromkeys(ids, str), low_memory=False)
    except FileNotFoundError:
        raise UserError(f"{what}: there is no table at {path}") from None
    except (OSError, ValueError, pd.errors.ParserError) as error:
        raise UserError(f"{what}: {path} cannot be read as a table: {error}") from None
    raise UserError(f"{what}: {path} must end in .csv, .tsv or .parquet")
