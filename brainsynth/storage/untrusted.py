"""What others wrote is judged before a library reads it: JSON, the metadata of a Zarr array, tables.

zarr and pyarrow open whatever a file asks for, by codecs and types that somebody registered, in whatever size it states.
Our own files need few of those. Everything here raises ValueError, with the reason. Needs neither pandas nor pydantic.
"""

from __future__ import annotations

import base64
import json
import math
import os
from pathlib import Path
from typing import IO, Any

MAX_JSON_BYTES = 32 << 20
MAX_SAMPLE_BYTES = 2 << 30
"""One sample of one array; a chunk is at most a sample. 512×512×512 float32 is a quarter of it."""
MAX_TABLE_BYTES, MAX_FOOTER_BYTES, MAX_CELLS, MAX_UNPACKED = 1 << 30, 64 << 20, 200_000_000, 2 << 30
_CODECS = {"sharding_indexed", "bytes", "blosc", "zstd", "crc32c", "gzip"}
_ITEM_BYTES = {"float16": 2, "float32": 4, "uint16": 2, "uint8": 1}


def plain_json(data: bytes, where: str) -> Any:
    """Parsed JSON. Nesting without end is a ValueError like any other damage, not a RecursionError."""
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"{where} is damaged: {len(data)} bytes are too many")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged: not plain JSON ({type(error).__name__})") from None


def check_zarr_array(data: bytes, where: str) -> None:
    """The zarr.json of an array such as we write: Zarr v3, plain numbers, known codecs, samples of a size that fits."""
    try:
        document = plain_json(data, where)
        if document["zarr_format"] != 3 or document["node_type"] != "array":
            raise ValueError(f"{where} is refused: not a Zarr v3 array")
        if not set(document) <= {*_FIELDS}:
            raise ValueError(f"{where} is refused: unknown fields {ascii(sorted(set(document) - {*_FIELDS}))[:200]}")
        if document.get("storage_transformers"):
            raise ValueError(f"{where} is refused: storage transformers are not allowed")
        item = _ITEM_BYTES.get(str(document["data_type"]))
        if item is None:
            raise ValueError(f"{where} is refused: data type {ascii(document['data_type'])[:80]}")
        shape, chunk = document["shape"], document["chunk_grid"]["configuration"]["chunk_shape"]
        if not (1 <= len(shape) == len(chunk) <= 8 and all(type(n) is int and n >= 1 for n in [*shape, *chunk])):
            raise ValueError(f"{where} is refused: shape {ascii(shape)[:80]} in shards of {ascii(chunk)[:80]}")
        if math.prod(shape[1:]) * item > MAX_SAMPLE_BYTES or any(
            c > s for c, s in zip(chunk[1:], shape[1:], strict=True)
        ):
            raise ValueError(f"{where} is refused: a sample of shape {ascii(shape[1:])[:80]} is too large")
        _check_codecs(document["codecs"], shape, where)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} is damaged: {type(error).__name__} {ascii(str(error))[:80]}") from None


_FIELDS = (
    "zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs",
    "attributes", "dimension_names", "storage_transformers",
)  # fmt: skip


def _check_codecs(codecs: Any, shape: list[int], where: str) -> None:
    for codec in codecs:
        name, settings = str(codec["name"]), codec.get("configuration") or {}
        if name not in _CODECS:
            raise ValueError(f"{where} is refused: codec {ascii(name)[:80]} is not one of {', '.join(sorted(_CODECS))}")
        if name == "sharding_indexed":
            inner = settings["chunk_shape"]
            if len(inner) != len(shape) or not all(type(n) is int and n >= 1 for n in inner):
                raise ValueError(f"{where} is refused: chunks of {ascii(inner)[:80]}")
            _check_codecs(settings["codecs"], shape, where)
            _check_codecs(settings["index_codecs"], shape, where)


def check_table_file(path: Path) -> None:
    """A table's file, before pandas opens it. Raises FileNotFoundError for anything but a file, an address for instance."""
    if not path.is_file():
        raise FileNotFoundError(path)
    if path.stat().st_size > MAX_TABLE_BYTES:
        raise ValueError(f"larger than {MAX_TABLE_BYTES >> 20} MiB")
    if path.suffix.lower() == ".parquet":
        with open(path, "rb") as file:
            check_parquet(file)


def check_parquet(file: IO[bytes]) -> None:
    """A Parquet table of plain columns and a size that fits.

    An Arrow extension type is built by code that somebody registered (Ray Data does) as soon as pyarrow opens the file, so
    those are looked for in the bytes of the footer.
    """
    import pyarrow
    import pyarrow.parquet

    if any(mark in _footer(file) for mark in _EXTENSION_MARKS):
        raise ValueError("a column is of an Arrow extension type; save the table with plain columns")
    try:
        file.seek(0)
        footer = pyarrow.parquet.read_metadata(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(str(error)) from None
    unpacked = sum(footer.row_group(index).total_byte_size for index in range(footer.num_row_groups))
    if footer.num_rows * footer.num_columns > MAX_CELLS or not 0 <= unpacked <= MAX_UNPACKED:
        raise ValueError(f"it declares {footer.num_rows} rows of {footer.num_columns} columns, {unpacked} bytes")
    file.seek(0)


def _footer(file: IO[bytes]) -> bytes:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    tail = file.read(8)
    length = int.from_bytes(tail[:4], "little")
    if size < 12 or tail[4:] != b"PAR1" or not 0 < length <= min(size - 12, MAX_FOOTER_BYTES):
        raise ValueError("not a Parquet file")
    file.seek(size - 8 - length)
    return file.read(length)


def _base64_marks(word: bytes) -> tuple[bytes, ...]:
    """What a text that holds the word looks like in base64, from each of the three places at which it may begin."""
    return tuple(base64.b64encode(bytes(skip) + word)[(0, 2, 3)[skip] : -4] for skip in range(3))


# The Arrow schema is in the footer as base64.
_EXTENSION_MARKS = (b"ARROW:extension", *_base64_marks(b"ARROW:extension:name"))
