"""Conditions on covariates: they mean what pandas says they mean, and nothing else can be said."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from brainsynth.errors import UserError
from brainsynth.reading.query import Query

KINDS = {"age": True, "volume": True, "sex": False, "site": False}


def table(rows: int = 200) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "age": rng.integers(20, 90, rows).astype(float),
            "volume": rng.integers(5, 60, rows).astype(float),
            "sex": rng.choice(["F", "M"], rows),
            "site": rng.choice(["Guys", "HH", "IOP"], rows),
        }
    )


@pytest.mark.parametrize(
    "text",
    [
        "age > 60",
        "age > 60 and sex == 'F'",
        "not (age <= 30 or volume >= 40) and site != 'HH'",
        "30 <= age < 50",
        "age > volume",
        "site in ['HH', 'IOP'] and sex not in ('M',)",
        "volume == 12 or volume == 13.0 or age > -1 and not sex == 'M'",
        "'F' == sex",
        "age < 1e3",
    ],
)
def test_a_condition_chooses_what_pandas_chooses(text: str) -> None:
    rows = table()
    query = Query(text, KINDS)
    chosen = [query(row) for row in rows.to_dict("records")]
    assert chosen == rows.index.isin(rows.query(text).index).tolist()
    assert sum(chosen) > 0


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("__import__('os').system('true') == 0", "neither a name nor a number"),
        ("age.__class__ == 1", "neither a name nor a number"),
        ("@pd.read_csv('x') == 1", "invalid syntax"),
        ("age > @limit", "invalid syntax"),
        ("[x for x in (1,)] == 1", "neither a name nor a number"),
        ("(lambda: 1)() == 1", "neither a name nor a number"),
        ("sex == f'{age}'", "neither a name nor a number"),
        ("sex['F'] == 1", "neither a name nor a number"),
        ("age ** 9 > 1", "neither a name nor a number"),
        ("(y := 3) == 3", "neither a name nor a number"),
        ("age > True", "neither a name nor a number"),
        ("age > 1e400", "neither a name nor a number"),
        ("sex == -'F'", "neither a name nor a number"),
        ("sex == b'F'", "neither a name nor a number"),
        ("age is 3", "something else than"),
        ("'F' in sex", "wants a list"),
        ("age", "is not a comparison"),
        ("print(age)", "is not a comparison"),
        ("1", "is not a comparison"),
        ("age > 60; sex == 'F'", "invalid syntax"),
        ("weight > 60", "there is no 'weight'"),
        ("sex > 60", "compares a number with text"),
        ("age in ['F']", "compares a number with text"),
        ("", "invalid syntax"),
        ("age > 1" + " and age > 1" * 400, "longer than 2000"),
        ("not " * 60 + "age > 1", "nested too deeply"),
        ("(" * 300 + "age > 1" + ")" * 300, "."),
        ("age > 1\0", "."),
    ],
)
def test_anything_else_is_refused(text: str, why: str) -> None:
    with pytest.raises(UserError, match=why) as caught:
        Query(text, KINDS)
    assert "names here: age (number), volume (number), sex (text), site (text)" in str(caught.value)


def test_a_missing_value_fulfils_no_comparison() -> None:
    row = {"age": float("nan"), "volume": 1.0, "sex": "", "site": "HH"}
    for text in ("age > 1", "age != 1", "age <= 1", "sex == ''", "sex != 'F'", "sex not in ['F']", "age == age"):
        assert not Query(text, KINDS)(row)
    assert Query("not age > 1", KINDS)(row)


STRANGE = {
    "age": True,
    "class": False,
    "in": True,
    "None": False,
    "brain volume": True,
    "a`b": False,
    "\ufb01eld": False,
}
VALUES = {"age": 50.0, "class": "A", "in": 3.0, "None": "x", "brain volume": 1100.0, "a`b": "q", "\ufb01eld": "wide"}


@pytest.mark.parametrize(
    "text",
    [
        "`class` == 'A'",
        "`in` in [3, 4] and `brain volume` > 1000 and `age` == age",
        "`None` == 'x' or age > 99",
        "`a``b` == 'q'",
        "`\ufb01eld` == 'wide' and \ufb01eld == 'wide'",
        "`class` != '`age`' and 'A' == `class`",
    ],
)
def test_a_name_that_python_does_not_take_stands_in_backticks(text: str) -> None:
    assert Query(text, STRANGE)(VALUES)
    assert not Query(f"not ({text})", STRANGE)(VALUES)


@pytest.mark.parametrize(
    "text", ["class == 'A'", "`age", "``", "`weight` > 3", "`class` > 3", "age.`class`", "`age > 3` or age"]
)
def test_other_backticks_are_refused(text: str) -> None:
    with pytest.raises(
        UserError, match=r"names here: age \(number\), `class` \(text\), `in` \(number\), `None` \(text\)"
    ):
        Query(text, STRANGE)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("age > 30\n  and age < 60", True),
        ("\n age > 30 \r\n and\tage < 40\n", False),
        ("age > 30  # adults, it's `said`\n and age < 40", False),
        ("age > 30 \\\n and age < 60", True),
        ("`class` in ['B',\n  'A']", True),
        ("`class` == 'A#B'", False),
        ("`class` == 'A\nB'", False),
    ],
)
def test_a_condition_of_several_lines(text: str, holds: bool) -> None:
    assert Query(text, STRANGE)(VALUES) == holds


@pytest.mark.parametrize("text", ["age > 30)\n or (age < 3", "age > 30\nage < 3", "age >\n"])
def test_lines_that_are_no_condition_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="is refused"):
        Query(text, STRANGE)
