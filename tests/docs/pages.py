"""What the documentation's pages ask a reader to type: blocks of code, and the commands of shell blocks and of sentences."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

REPO = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(REPO).as_posix()
    for path in [*REPO.glob("*.md"), *REPO.glob("docs/**/*.md"), *REPO.glob("cluster/**/*.md"),
                 *REPO.glob("brainsynth/**/*.md")]
    if "_build" not in path.parts
)  # fmt: skip
SHELL, PYTHON, YAML, SHOWN = ("bash", "sh", "console"), "python", "yaml", ("text",)
DIRECTIVE = re.compile(r"^\{[a-z-]+\}")
PROGRAMS = ("python", "brainsynth", "make", "ray", "kubectl", "docker", "uv", "pip", "sha256sum")


@dataclass(frozen=True)
class Block:
    """A fenced or an indented block of code."""

    page: str
    line: int
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """One command of a shell block, or one that a sentence or a table quotes; `words` as a shell would split them."""

    page: str
    line: int
    text: str
    quoted: bool

    @property
    def words(self) -> list[str]:
        """Without comments."""
        return shlex.split(self.text, comments=True)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def blocks(page: str) -> list[Block]:
    """Every block of code of a page; an indented one has the language `indented`."""
    tokens = MarkdownIt("commonmark").enable("table").parse((REPO / page).read_text())
    return [
        Block(page, (t.map or [0])[0] + 1, t.info.strip() if t.type == "fence" else "indented", t.content)
        for t in tokens
        if t.type in ("fence", "code_block")
    ]


def commands(page: str) -> list[Command]:
    """Every command of a page in the order of reading."""
    found = [
        Command(page, block.line + offset, part, quoted=False)
        for block in blocks(page)
        if block.language in SHELL
        for offset, text in logical_lines(block.text)
        for part in re.split(r"\s&&\s", text)
    ]
    return sorted(found + quoted_commands(page), key=lambda command: command.line)


def logical_lines(text: str) -> list[tuple[int, str]]:
    """(number in the block, line) with continued lines joined, without comments and empty ones."""
    found, begun, start = [], "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        start = start if begun else number
        begun += line.removesuffix("\\")
        if not line.endswith("\\"):
            if shlex.split(begun, comments=True):
                found.append((start, re.sub(r"\s{2,}#.*$", "", begun).strip()))
            begun = ""
    assert not begun, f"the last line of a block ends in a backslash: {begun}"
    return found


def quoted_commands(page: str) -> list[Command]:
    """Commands in single backticks, whole ones: a program that is known, and at least one word more."""
    text = (REPO / page).read_text()
    masked = re.sub(r"^```.*?^```$", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.DOTALL | re.MULTILINE)
    return [
        Command(page, masked.count("\n", 0, m.start()) + 1, " ".join(m[1].split()), quoted=True)
        for m in re.finditer(r"(?<!`)`([^`]+)`(?!`)", masked)
        if m[1].split()[0] in PROGRAMS and len(m[1].split()) > 1
    ]
