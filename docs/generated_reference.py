"""Two Sphinx directives that write reference pages from the code: keys of the configs, and `--help` of the commands."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import os
import runpy
import sys
import types
import typing
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints
from unittest import mock

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

REPO = Path(__file__).parents[1]
WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null", Any: "anything"}
HELP_COLUMNS = "100"
HOW_TO_READ = """\
## How to read the tables

A key that is **required** has no default. Where a key holds a record, its kind is a link to that record's table, and
`its own defaults` means that the key may be left out whole. `null` is YAML's word for nothing.
"""


class ConfigKeys(SphinxDirective):
    """The keys of every record of some modules: kind, default, meaning. A key of another record's kind links to it."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """One section a record."""
        wanted = [line.split() for line in self.content if line.strip()]
        text = "\n\n".join(section(cls) for module, *names in wanted for cls in records_of(module, names))
        # The first thing of a directive is a heading: MyST loses an anchor that stands before its first section.
        return self.parse_text_to_nodes(f"{HOW_TO_READ}\n\n{text}", allow_section_headings=True)


class CommandHelp(SphinxDirective):
    """What `--help` says of each command, one section a command: `brainsynth VERB`, or the path of a job."""

    has_content = True
    option_spec: ClassVar[dict[str, Any]] = {}

    def run(self) -> list[nodes.Node]:
        """One section a command."""
        text = "\n\n".join(
            f"## `{line}`\n\n```text\n{help_of(line.split())}\n```" for line in self.content if line.strip()
        )
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def records_of(module: str, names: list[str]) -> list[type[Any]]:
    """The records that a module defines, or those of them that are named, in the module's order."""
    found = importlib.import_module(module)
    return [
        cls
        for name, cls in vars(found).items()
        if dataclasses.is_dataclass(cls) and cls.__module__ == module and (name in names or not names)
    ]


def section(cls: type[Any]) -> str:
    """A record as Markdown."""
    documented = ModuleAnalyzer.for_module(cls.__module__).find_attr_docs()
    hints = get_type_hints(cls, include_extras=True)
    rows = [
        f"| `{key.name}` | {cell(kind(hints[key.name]))} | {cell(default(key))} | "
        f"{cell(' '.join(documented.get((cls.__name__, key.name), [])) or first_sentence(hints[key.name]))} |"
        for key in dataclasses.fields(cls)
    ]
    head = ["| key | kind | default | meaning |", "| --- | --- | --- | --- |"]
    title = [f"({anchor(cls)})=", f"## {cls.__name__}", ""]
    return "\n".join([*title, dedented(cls.__doc__ or ""), "", *head, *rows])


def anchor(cls: type[Any]) -> str:
    """Where a record's section is found."""
    return f"config-{cls.__name__.lower()}"


def kind(hint: Any) -> str:
    """A type in words; a record is a link."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return kind(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return ", or ".join(kind(a) for a in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of: {kind(arguments[0])}"
        return f"{len(arguments)} in a list: {kind(arguments[0])}"
    if origin is dict:
        return f"map of {kind(arguments[0])} to {kind(arguments[1])}"
    if dataclasses.is_dataclass(hint):
        return f"[{hint.__name__}](#{anchor(typing.cast(type[Any], hint))})"
    return WORDS[hint]


def first_sentence(hint: Any) -> str:
    """Of the record that a key holds, where the key itself is not explained."""
    return (hint.__doc__ or "").partition(". ")[0].partition("\n")[0] if dataclasses.is_dataclass(hint) else ""


def default(key: dataclasses.Field[Any]) -> str:
    """What holds where the key is left out."""
    value = key.default
    if key.default_factory is not dataclasses.MISSING:
        value = key.default_factory()
    if value is dataclasses.MISSING:
        return "**required**"
    if dataclasses.is_dataclass(value):
        return "`its own defaults`"
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower() if value is not None else 'null'}`"
    if isinstance(value, tuple | dict):
        items = [f"`{item}`" for item in value]
        return ", ".join(items) or "none"
    return f"`{value}`" if value != "" else "empty"


def cell(text: str) -> str:
    """Text that may stand in a table of Markdown."""
    return text.replace("|", "\\|").replace("\n", " ").strip()


def dedented(text: str) -> str:
    """A docstring without the indentation of its later lines."""
    first, *rest = text.split("\n")
    return "\n".join([first, *(line.strip() for line in rest)]).strip()


def help_of(command: list[str]) -> str:
    """What a command prints for `--help`, run in this process."""
    said = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [*command, "--help"]),
        mock.patch.dict(os.environ, {"COLUMNS": HELP_COLUMNS, "NO_COLOR": "1"}),
        contextlib.redirect_stdout(said),
        contextlib.suppress(SystemExit),
    ):
        if command[0] == "brainsynth":
            importlib.import_module("brainsynth.cli").main()
        else:
            runpy.run_path(str(REPO / command[0]), run_name="__main__")
    return said.getvalue().strip()


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("config-keys", ConfigKeys)
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
