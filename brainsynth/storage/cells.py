"""A table that a user names, read strictly: every cell is text, or missing; a schema says later what the texts mean.

Missing are an empty cell and `n/a` (BIDS), nothing else: `None`, `NA`, `nan`, `FALSE`, `02` and `1.0` are texts. Of Parquet,
whose cells have types, whole numbers are written without `.0`. Nothing is dropped: a row with more or fewer cells than the
header, and a quotation mark that swallows rows, are errors with their line.
"""

from __future__ import annotations

import codecs
import csv
import io
import logging
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from brainsynth.errors import UserError, problems_error
from brainsynth.places import user_path
from brainsynth.storage.untrusted import check_table_file

log = logging.getLogger(__name__)
LINE = "line"
"""Name of the index of a table read here: the line of each row in the file (of Parquet: the row, from 1)."""
MISSING = ("", "n/a")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons"}
_QUOTES = 'remove the quotation mark, or write it twice inside of a quoted cell ("")'


def read_cells(path: str, what: str) -> pd.DataFrame:
    """A .csv, .tsv or .parquet table of texts (missing: None), indexed by the line of each row.

    Text is UTF-8, UTF-16 or Windows-1252; a .csv or .tsv file whose header has one column only may be separated by commas,
    tabs or semicolons.

    Args:
        what: the config's key, for the error.

    Raises:
        UserError: with every line that is wrong.
    """
    file, where = user_path(path, what), f"{what}: {path}"
    suffix = file.suffix.lower()
    if suffix not in (*_DELIMITERS, ".parquet"):
        raise UserError(f"{where} must end in .csv, .tsv or .parquet")
    try:
        check_table_file(file)
        if suffix == ".parquet":
            with pq.ParquetFile(file) as parquet:
                return _from_parquet(parquet.read(), where)
        text = _decoded(file.read_bytes(), where)
    except FileNotFoundError:
        raise UserError(f"{what}: there is no table at {path}") from None
    except UserError:
        raise
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"{where} cannot be read as a table: {error}") from None
    return _from_text(text, _DELIMITERS[suffix], where)


def lines_of(lines: Iterable[Any], limit: int = 10) -> str:
    """`line 3` or `lines 3, 5, 8 and 4 more`, for a message."""
    shown = [str(line) for line in lines]
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return f"line{'s' if len(shown) > 1 else ''} {', '.join(shown[:limit])}{more}"


def _decoded(data: bytes, where: str) -> str:
    """The text of the file, by its byte order mark, else UTF-8, else Windows-1252."""
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if data.startswith(mark):
            return data.decode(encoding)
    if b"\0" in data[:2] and len(data) % 2 == 0:
        return data.decode("utf-16-be" if data[:1] == b"\0" else "utf-16-le")
    if b"\0" in data:
        raise ValueError("it holds NUL bytes: it is not a text file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        log.warning("%s is not UTF-8 text: it is read as Windows-1252", where)
        return data.decode("cp1252", errors="replace") if _is_cp1252(data) else data.decode("latin-1")


def _is_cp1252(data: bytes) -> bool:
    try:
        data.decode("cp1252")
    except UnicodeDecodeError:
        return False
    return True


def _from_text(text: str, delimiter: str, where: str) -> pd.DataFrame:
    delimiter = _delimiter(text, delimiter, where)
    rows = list(_records(text, delimiter, where))
    if not rows:
        raise UserError(f"{where} cannot be read as a table: it is empty")
    (_, header), *rows = rows
    names = _header([name.strip() for name in header], where)
    wrong = [
        f"line {line}: {len(cells)} cell{'s' if len(cells) > 1 else ''}, the header has {len(names)}"
        for line, cells in rows
        if len(cells) != len(names)
    ]
    if wrong:
        hint = "a cell that contains the separator must be quoted"
        raise problems_error(f"{where}: rows with more or fewer cells than the header; {hint}", wrong)
    index = pd.Index([line for line, _ in rows], name=LINE, dtype="int64")
    cells = {name: [_cell(row[place]) for _, row in rows] for place, name in enumerate(names)}
    return pd.DataFrame(cells, index=index, columns=names, dtype=object)


def _cell(text: str) -> str | None:
    return None if text.strip() in MISSING else text


def _header(names: Sequence[str], where: str) -> list[str]:
    unnamed = [place for place, name in enumerate(names, start=1) if not name]
    if len(unnamed) > 1:
        raise UserError(f"{where}: columns without a name: {', '.join(map(str, unnamed))}; delete them, or name them")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{where}: the header has {', '.join(map(repr, twice))} more than once")
    return [str(name) for name in names]


def _delimiter(text: str, expected: str, where: str) -> str:
    """The separator: the one of the file's suffix, unless only another one separates anything in the header."""
    header = next((line for line in io.StringIO(text, newline=None) if line.strip()), "")
    if expected in header:
        return expected
    others = [other for other in _NAMES if other in header]
    if len(others) > 1:
        raise UserError(
            f"{where}: the header has no {_NAMES[expected]}, but {' and '.join(_NAMES[o] for o in others)}: save the table "
            f"with {_NAMES[expected]}"
        )
    if others:
        log.warning("%s is separated by %s, not %s: it is read so", where, _NAMES[others[0]], _NAMES[expected])
    return others[0] if others else expected


def _records(text: str, delimiter: str, where: str) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of every record that is not blank. Raises UserError for quotation marks that do not close properly."""
    physical = list(io.StringIO(text, newline=""))
    reader = csv.reader(physical, delimiter=delimiter, strict=True)
    columns, first = 0, 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{where}, line {first}: a quotation mark opens a cell there and does not close it properly ({error}): "
                f"{_QUOTES}"
            ) from None
        columns = columns or len(cells)
        lines = physical[first - 1 : reader.line_num]
        if len(lines) > 1 and _swallowed(lines, cells, delimiter, columns):
            raise UserError(
                f"{where}, line {first}: a quotation mark opens a cell there that ends only in line {reader.line_num}, and "
                f"what is in between looks like rows of the table: {_QUOTES}"
            )
        if cells and (len(cells) > 1 or cells[0].strip()):
            yield first, cells
        first = reader.line_num + 1


def _swallowed(lines: Sequence[str], cells: Sequence[str], delimiter: str, columns: int) -> bool:
    """True when a quoted cell of several lines seems to hold rows: a mark that somebody left there, not a text."""
    if columns < 2:
        return False
    inside = [cell for cell in cells if "\n" in cell or "\r" in cell]
    if delimiter == "\t" and any("\t" in cell for cell in inside):
        return True
    whole = [line for cell in inside for line in re.split(r"\r\n|\r|\n", cell)[1:-1]]
    if any(line.count(delimiter) >= columns - 1 for line in whole):
        return True
    ends_in_first_cell = bool(inside) and inside[-1] == cells[0]
    return not ends_in_first_cell and any(line.count(delimiter) == columns - 1 for line in lines[1:])


def _from_parquet(table: pa.Table, where: str) -> pd.DataFrame:
    """Typed cells as texts: 1.0 is `1`, 0.5 is `0.5`, True is `True`.

    Not by way of pandas, in which a column of whole numbers with a gap becomes one of rounded floats.
    """
    table = table.select([name for name in table.column_names if not re.fullmatch(r"__index_level_\d+__", name)])
    names = _header(table.column_names, where)
    index = pd.RangeIndex(1, len(table) + 1, name=LINE)
    cells = {name: [_as_text(value) for value in _values(table.column(place))] for place, name in enumerate(names)}
    return pd.DataFrame(cells, index=index, columns=names, dtype=object)


def _values(column: pa.ChunkedArray) -> list[Any]:
    """Python's own values; of short floats the number that they are the nearest to (0.1, not 0.10000000149011612)."""
    values: list[Any] = column.to_pylist()
    short = {"halffloat": np.float16, "float": np.float32}.get(str(column.type))
    return values if short is None else [None if v is None else float(str(short(v))) for v in values]


def _as_text(value: Any) -> str | None:
    if value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bytes):  # how older writers (Impala, Spark, R) store text: without saying that it is text
        value = value.decode("utf-8")
    if isinstance(value, str):
        return _cell(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    if isinstance(value, Decimal) and value == value.to_integral_value():
        return f"{value:f}".partition(".")[0]
    return str(value)
