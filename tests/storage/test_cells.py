"""Tables as people save them: every cell comes back as the text it was, or the table is refused with the line."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brainsynth.errors import UserError
from brainsynth.storage.cells import read_cells

HEADER = ["participant_id", "age", "sex", "site", "note"]
ROWS = [
    ["007", "40", "F", "02", "None"],
    ["sub-12", "5.25", "M", "1.0", "NA"],
    ["x 3", "1e2", "F", "FALSE", 'said "no", twice'],
    ["Zoë", "", "M", "n/a", "a, b; c"],
    ["9", "61", "F", "nan", "two\nlines"],
]


def read(folder: Path, data: bytes | str, name: str = "t.csv") -> pd.DataFrame:
    (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return read_cells(str(folder / name), "source.path")


def expected() -> list[list[str | None]]:
    return [[None if cell in ("", "n/a") else cell for cell in row] for row in ROWS]


def test_two_hundred_renderings_of_one_table_are_that_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(16)
    for trial in range(200):
        order = rng.permutation(len(HEADER))
        name, delimiter = [("t.csv", ","), ("t.tsv", "\t"), ("t.CSV", ";"), ("t.csv", "\t")][rng.integers(4)]
        end = str(rng.choice(["\n", "\r\n", "\r"]))
        missing = str(rng.choice(["", "n/a", " "]))
        encoding = str(rng.choice(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "latin-1"]))
        quoting = [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC][rng.integers(3)]
        if end == "\r":
            quoting = csv.QUOTE_ALL  # else Python's writer leaves the line feed of a cell bare
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting)
        writer.writerow([HEADER[i] for i in order])
        for row in expected():
            writer.writerow([missing if row[i] is None else row[i] for i in order])
        said = text.getvalue() + end * int(rng.integers(3))
        table = read(tmp_path, said.encode(encoding), name)
        assert sorted(table.columns) == sorted(HEADER), (trial, name, encoding)
        assert table[HEADER].to_numpy().tolist() == expected(), (trial, name, encoding, quoting, end)
        assert list(table.index) == [2, 3, 4, 5, 6]


REFUSED = {
    "more cells": ("id,age\na,1\nb,2,3\n", "line 3: 3 cells, the header has 2"),
    "fewer cells": ("id,age,sex\na,1\nb,2,F\nc\n", "line 2: 2 cells, the header has 3\n.*line 4: 1 cell, the"),
    "an open quote": ('id,note\na,"motion\nb,ok\n', "line 2: a quotation mark opens a cell there and does not close"),
    "text after a quote": ('id,note\na,"ok" then\n', "line 2: a quotation mark"),
    "two stray quotes": ('id,age,note\na,1,"motion\nb,2,ok\nc,3,ok"\nd,4,x\n', "line 2: .* ends only in line 4"),
    "quotes in one column": ('id,note,age\na,"x,1\nb,y",2\n', "line 2: .* ends only in line 3"),
    "a column twice": ("id,age,age\na,1,2\n", "'age' more than once"),
    "columns without a name": ("id,age,,\na,1,,\n", "columns without a name: 3, 4; delete them, or name them"),
    "nothing": ("", "it is empty"),
    "only blank lines": ("\n\n\n", "it is empty"),
    "a binary file": (b"\x00\x01\x02\x00\xff", "NUL bytes"),
    "two separators": ("id;age\tsex\na;1\tF\n", "has no commas, but tabs and semicolons"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_table_is_refused_with_its_line(tmp_path: Path, kind: str) -> None:
    data, message = REFUSED[kind]
    with pytest.raises(UserError, match=f"(?s){message}"):
        read(tmp_path, data)


def test_tabs_in_a_cell_of_many_lines_are_rows_that_a_quote_swallowed(tmp_path: Path) -> None:
    data = 'id\tage\tnote\na\t1\t"motion\nb\t2\tok\nc\t3\t"\n'
    with pytest.raises(UserError, match="line 2: .* looks like rows of the table"):
        read(tmp_path, data, "t.tsv")


def test_a_quoted_cell_of_many_lines_is_a_text(tmp_path: Path) -> None:
    table = read(tmp_path, 'id,age,note\na,1,"fell asleep,\nwoke up\n\nand left"\nb,2,ok\n')
    assert list(table["note"]) == ["fell asleep,\nwoke up\n\nand left", "ok"]
    assert list(table.index) == [2, 6]


def test_quotes_inside_of_a_cell_are_text(tmp_path: Path) -> None:
    assert list(read(tmp_path, 'id,note\na,5" tall\nb,said "no"\n')["note"]) == ['5" tall', 'said "no"']


@pytest.mark.parametrize(
    "text", ["site\u2028A", "site\x85A", "site\x0cA", "site\u2029A", "東京", "  x", "0100", "1e5", "-", "#N/A"]
)
def test_any_text_is_itself(tmp_path: Path, text: str) -> None:
    table = read(tmp_path, f"id,site,age\na,{text},3\nb,B,4\n")
    assert list(table["site"]) == [text, "B"]


def test_typed_cells_of_parquet_are_written_as_a_person_would(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"id": [1.0, 2.0], "grade": [0.5, None], "flag": [True, False], "name": ["007", "n/a"], "big": [2**60, 1]}
    )
    frame.to_parquet(tmp_path / "t.parquet")
    table = read_cells(str(tmp_path / "t.parquet"), "source.path")
    assert table.to_numpy().tolist() == [["1", "0.5", "True", "007", str(2**60)], ["2", None, "False", None, "1"]]
    assert list(table.index) == [1, 2]


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no table at"):
        read_cells(str(tmp_path / "none.csv"), "source.path")
    with pytest.raises(UserError, match="must end in"):
        read_cells(str(tmp_path / "none.xlsx"), "source.path")
    (tmp_path / "t.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match="cannot be read as a table"):
        read_cells(str(tmp_path / "t.parquet"), "source.path")
