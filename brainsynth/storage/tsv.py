"""Tab-separated tables of ours: any text that a covariate's category can be reads back as itself. Needs pandas to write."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def tsv_text(table: pd.DataFrame, header: bool = True, float_format: str | None = None) -> str:
    """The table, `n/a` for a missing value; a cell that holds a tab, a quotation mark or a line end is quoted."""
    # Of the line ends, the csv module quotes only the one that it writes: a carriage return would end the row.
    texts = [name for name in table.columns if getattr(table[name].dtype, "kind", "O") not in "biuf"]
    has_return = any(isinstance(value, str) and "\r" in value for name in texts for value in table[name])
    return str(
        table.to_csv(
            sep="\t",
            index=False,
            header=header,
            na_rep="n/a",
            float_format=float_format,
            lineterminator="\n",
            quoting=csv.QUOTE_ALL if has_return else csv.QUOTE_MINIMAL,
        )
    )


def tsv_lines(data: bytes) -> list[dict[str, str]]:
    """Each row of such a table, by column."""
    # Not str.splitlines, which also splits at U+2028, form feeds and others that a text may hold.
    return list(csv.DictReader(io.StringIO(data.decode(), newline=""), delimiter="\t"))
