"""The dashboard asks for what we export, in queries that Prometheus can read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest

from brainsynth.executors.metrics import DEVICE_STAGES, NAMES

FILE = Path(__file__).parents[2] / "cluster" / "grafana" / "brainsynth.json"
DASHBOARD: dict[str, Any] = json.loads(FILE.read_text())
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
LABELS = {"dataset", "kind", "outcome", "stage"}
OF_RAY = {"NodeAddress", "WorkerId"}
EXPORTED = {f"ray_{name}" for name in NAMES}


def nodes(expression: Any) -> Iterator[Any]:
    """Every part of a query."""
    yield expression
    for name in ("lhs", "rhs", "expr"):
        part = getattr(expression, name, None)
        if part is not None:
            yield from nodes(part)
    for part in getattr(expression, "args", None) or ():
        yield from nodes(part)
    selector = getattr(expression, "vector_selector", None)
    if selector is not None:
        yield from nodes(selector)


def parse(query: str) -> Any:
    """As Grafana would send it: variables filled in."""
    return promql_parser.parse(query.replace("$dataset", ".*").replace("$window", "5m"))


def selectors(query: str) -> list[Any]:
    return [part for part in nodes(parse(query)) if isinstance(part, promql_parser.VectorSelector)]


@pytest.mark.parametrize(("title", "query"), QUERIES, ids=[title for title, _ in QUERIES])
def test_query_asks_for_what_is_exported(title: str, query: str) -> None:
    found = selectors(query)
    assert found
    for selector in found:
        assert selector.name in EXPORTED, title
        labels = {matcher.name for matcher in selector.matchers.matchers}
        assert "dataset" in labels <= LABELS, title
    assert query.count("ray_") == len(found)  # none was missed
    for part in nodes(parse(query)):
        by = getattr(part, "modifier", None)
        if isinstance(part, promql_parser.AggregateExpr) and by is not None:
            assert set(by.labels) <= LABELS | OF_RAY


def test_all_that_is_exported_is_shown() -> None:
    assert {selector.name for _, query in QUERIES for selector in selectors(query)} == EXPORTED


def test_device_stages_are_those_of_the_code() -> None:
    (query,) = [query for title, query in QUERIES if title == "Device-busy share"]
    assert f'stage=~"{"|".join(DEVICE_STAGES)}"' in query


def test_dashboard_is_one_that_grafana_can_lay_out() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for cell in [(x, y) for x in range(place["x"], place["x"] + place["w"])
                     for y in range(place["y"], place["y"] + place["h"])]:  # fmt: skip
            assert cell not in taken, panel["title"]
            taken.add(cell)
        assert panel["datasource"]["uid"] == "${datasource}"  # nobody else's Prometheus has our id
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert set(variables) == {"datasource", "dataset", "window"}
    assert variables["dataset"]["query"]["query"] == "label_values(ray_brainsynth_volumes_total, dataset)"


@pytest.mark.parametrize(
    "wrong", ["sum(rate(ray_brainsynth_volumes_total[5m])", "rate(ray_brainsynth_volumes_total)", "sum by () x y"]
)
def test_the_parser_catches_mistakes(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        promql_parser.parse(wrong)
