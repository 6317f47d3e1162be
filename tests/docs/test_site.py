"""The site builds without a warning, asks no other host for anything, and its hand-written facts are those of the code."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import pkgutil
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import brainsynth
import brainsynth.config
from brainsynth import cli
from brainsynth.config.load import load_config
from brainsynth.stages.jobs import JOBS
from tests.docs.pages import REPO
from tests.docs.sandbox import made_by

FETCHING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src", "embed": "src",
            "object": "data", "link": "href", "use": "href"}  # fmt: skip
NO_FETCH = {"canonical", "next", "prev", "search", "index", "author", "copyright"}
"""Kinds of <link> that a browser does not follow by itself."""


class Fetched(HTMLParser):
    """What a browser loads when it opens a page, and where its links lead."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.assets: list[str] = []
        self.links: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        address = values.get(FETCHING.get(tag, ""))
        if address and (values.get("rel") or "") not in NO_FETCH:
            self.assets.append(address)
        if tag == "a" and values.get("href"):
            self.links.append(values["href"] or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make docs` builds."""
    folder = tmp_path_factory.mktemp("site")
    words = made_by("docs")
    assert words[:3] == ["python", "-m", "sphinx"]
    assert "-W" in words
    command = [sys.executable, *words[1:-1], str(folder)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_no_page_asks_another_host_for_anything(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 35
    assert {page.name: outside for page in pages if (outside := elsewhere(Fetched(page).assets))} == {}
    for sheet in site.rglob("*.css"):
        assert elsewhere(re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", sheet.read_text())) == [], (
            sheet
        )


def elsewhere(addresses: list[str] | list[tuple[str, ...]]) -> list[str]:
    flat = [a for address in addresses for a in ([address] if isinstance(address, str) else address)]
    return [address for address in flat if re.match(r"(?:[a-z]+:)?//", address)]


@pytest.mark.parametrize("page", ["<script src='https://x.org/a.js'>", "<link rel=stylesheet href='//x.org/a.css'>"])
def test_the_search_for_that_finds_it(page: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page)
    assert elsewhere(Fetched(tmp_path / "page.html").assets)


def test_every_link_within_the_site_leads_somewhere(site: Path) -> None:
    lost = []
    for page in site.rglob("*.html"):
        for link in Fetched(page).links:
            path = link.partition("#")[0]
            if path and not re.match(r"[a-z]+:", path) and not (page.parent / path).exists():
                lost.append(f"{page.relative_to(site)}: {link}")
    assert lost == []


def test_the_first_page_leads_to_the_documentation(site: Path) -> None:
    assert "docs/index.html" in (site / "index.html").read_text()
    assert (site / "docs" / "index.html").is_file()


def test_every_key_of_every_config_is_in_the_reference(site: Path) -> None:
    text = (site / "docs/reference/configuration.html").read_text()
    assert 'id="config-generateconfig"' in text
    missing = []
    for module in pkgutil.iter_modules(brainsynth.config.__path__, "brainsynth.config."):
        for name, cls in vars(importlib.import_module(module.name)).items():
            if not dataclasses.is_dataclass(cls) or cls.__module__ != module.name:
                continue
            part = text.partition(f'id="config-{name.lower()}"')[2].partition("</section>")[0]
            missing += [f"{name}.{key.name}" for key in dataclasses.fields(cls) if f">{key.name}<" not in part]
    assert missing == []


def test_every_command_is_in_the_reference(site: Path) -> None:
    text = (site / "docs/reference/command-line.html").read_text()
    verbs = next(a.choices for a in cli.parser()._actions if a.choices)
    assert set(verbs or ()) >= {*JOBS}
    for verb in verbs or ():
        assert f"usage: brainsynth {verb} " in text


def test_every_job_is_in_the_configuration_reference(site: Path) -> None:
    text = (site / "docs/reference/configuration.html").read_text()
    for name, job in JOBS.items():
        assert f">{name}</span>" in text
        assert f'href="#config-{job.config.__name__.lower()}"' in text


def test_the_readme_lists_every_job_as_the_table_of_jobs_does() -> None:
    rows = re.findall(
        r"^\| `brainsynth ([a-z-]+)` \| (.+?) \| `(configs/.+?)` \|$", (REPO / "README.md").read_text(), re.M
    )
    assert [(name, summary) for name, summary, _ in rows] == [(name, job.summary) for name, job in JOBS.items()]
    for name, _, config in rows:
        load_config(REPO / config, JOBS[name].config)


def test_what_a_program_may_call_is_in_the_reference(site: Path) -> None:
    text = (site / "docs/reference/python.html").read_text()
    for name in (*brainsynth.__all__, "SyntheticDataset.torch"):
        assert f'id="brainsynth.{name}"' in text


def messages() -> list[str]:
    """Every text of the package, with … where a value goes in."""
    found = []
    for path in (REPO / "brainsynth").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))  # type: ignore[misc]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_message_that_troubleshooting_quotes_is_one() -> None:
    page = (REPO / "docs" / "troubleshooting.md").read_text()
    quoted, texts = re.findall(r"^### `(.+)`$", page, re.MULTILINE), messages()
    assert len(quoted) >= 30
    assert len(set(quoted)) == len(re.findall("^### ", page, re.MULTILINE))
    patterns = {text: re.compile(".*".join(map(re.escape, text.split("…"))), re.DOTALL) for text in quoted}
    assert [text for text, pattern in patterns.items() if not any(pattern.search(t) for t in texts)] == []
