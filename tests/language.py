"""The wording of documentation, messages, docstrings and comments: `python -m tests.language`, a part of `make lint`.

A phrase of PHRASES is an idiom translated from another language, or a word that the field does not use. Code is not read:
neither fenced blocks nor `code` in a sentence.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).parents[1]
PHRASES = {
    r"told(?! apart)": "reported, said, shown",
    r"mend(s|ed|ing)?": "fix, repair",
    r"besides?": "next to, as well as, in addition to",
    r"so (many|much)(?! (as|more|less|longer|larger|better)\b)": "the number itself, `that many`, `as many as`",
    r"travel(s|led|ling)? (along|in|with)": "is bundled with, is stored in",
    r"(brings?|brought|comes?|came) along": "is included",
    r"(an?|the) own": "its own",
    r"(?<!there )(is|are|was|were) no(?= (?!longer|more|less|fewer|one|such|worse|\w+er\b)\w)": "is not a …",
    r"go(es|ing)? on": "resumes, continues",
    r"went on": "resumed, continued",
    r"as ever": "unchanged, as before",
    r"whoever": "anyone who, a user who",
    r"anew": "again",
    r"shall": "must, should, will",
    r"(lies|lay|lie) (below|under|there|beside)": "is in, is stored in",
    r"stands? (here|there|below|above|in(?! for\b|[.,;]))": "is, is listed",
    r"(be|were|was) had": "is available",
    r"by the clock": "wall-clock time",
    r"at the place of": "in place of",
    r"in vain": "without success",
    r"nobody (has )?(yet )?(tried|measured|trained|told|said|knows)": "untested, not measured, unknown",
    r"seldom": "rarely",
    r"amiss|aright": "wrong, correctly",
    r"thereof|therein|hitherto|wherein": "of it, in it, so far, in which",
    r"(says|say|said) nothing of": "does not mention",
}
"""Pattern, between word boundaries and regardless of case → what to write instead."""
BANNED = [(re.compile(rf"\b(?:{pattern})(?!\w)", re.IGNORECASE), use) for pattern, use in PHRASES.items()]
PROSE = ["*.md", "docs/**/*.md", "cluster/**/*.md", "recipes/*.md", "brainsynth/bundled/*/README.md"]
COMMENTED = [
    "configs/**/*.yaml",
    "cluster/**/*.yaml",
    "cluster/**/*.sbatch",
    "cluster/Dockerfile",
    "Makefile",
    "pyproject.toml",
]
PYTHON = ["brainsynth/**/*.py", "jobs/*.py", "benchmarks/*.py", "recipes/**/*.py", "docs/*.py"]
Line = tuple[int, str]


def markdown(text: str) -> Iterator[Line]:
    """Lines outside fenced blocks; code in a sentence is blanked. A line and the next are one where a sentence runs on."""
    blank = lambda m: re.sub(r"[^\n]", " ", m[0])  # noqa: E731
    text = re.sub(r"^( *)```.*?^\1```$", blank, text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"(?<!`)`[^`]+`(?!`)|\]\([^)]*\)", blank, text)
    yield from _paragraphs(enumerate(text.splitlines(), start=1))


def comments(text: str) -> Iterator[Line]:
    """What follows a `#`, consecutive lines as one; a Makefile's help texts are such comments."""
    lines = [(n, re.search(r"(?:^|\s)#+ ?(.*)", line)) for n, line in enumerate(text.splitlines(), start=1)]
    yield from _paragraphs((n, re.sub(r"`[^`]+`", " ", match[1]) if match else "") for n, match in lines)


def python(text: str) -> Iterator[Line]:
    """Strings, docstrings included, with … where a value goes in; and comments."""
    inner = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.JoinedStr):
            inner |= {id(part) for part in ast.walk(node) if part is not node}
            yield node.lineno, "".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values)  # type: ignore[misc]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            for offset, line in _paragraphs(enumerate(node.value.splitlines())):
                yield node.lineno + offset, re.sub(r"`[^`]+`", " ", line)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT]
    yield from _paragraphs((t.start[0], t.string.lstrip("# ")) for t in tokens)


def _paragraphs(lines: Iterator[Line] | enumerate[str]) -> Iterator[Line]:
    """Each line with the beginning of the next, so that a phrase may cross the break."""
    held: Line | None = None
    for number, line in lines:
        if held:
            yield held[0], f"{held[1]}\n{line}" if number == held[0] + 1 else held[1]
        held = (number, line.strip())
    if held:
        yield held


def faults(path: Path) -> Iterator[str]:
    """`file:line: word: use …` for each banned phrase of a file."""
    read = {".md": markdown, ".py": python}.get(path.suffix, comments)
    for number, text in read(path.read_text()):
        first = text.find("\n") if "\n" in text else len(text)
        for pattern, use in BANNED:
            for match in pattern.finditer(text.replace("\n", " ")):
                if match.start() < first:
                    yield f"{path.relative_to(REPO)}:{number}: {match[0].strip()}: use {use}"


def all_faults(patterns: list[str]) -> list[str]:
    """Of every file that matches."""
    files = dict.fromkeys(
        path for pattern in patterns for path in sorted(REPO.glob(pattern)) if "_build" not in path.parts
    )
    return [fault for path in files for fault in faults(path)]


if __name__ == "__main__":
    found = all_faults([*PROSE, *COMMENTED, *PYTHON])
    print("\n".join(found) or "wording: nothing to report")
    sys.exit(bool(found))
