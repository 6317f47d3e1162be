"""Sphinx directives that write reference pages from the code: the keys of the configs, and `--help` of every command."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import types
import typing
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints
from unittest import mock

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

from brainsynth import cli
from brainsynth.stages.jobs import JOBS

WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null", Any: "anything"}
HELP_COLUMNS = "100"
HOW_TO_READ = """\
## How to read the tables

A **required** key has no default. If a key holds a record, its kind links to that record's table, and `its own defaults`
means that the whole key may be omitted. `null` is YAML for no value.
"""


class ConfigKeys(SphinxDirective):
    """The keys of every record of some modules: kind, default, meaning. A key of another record's kind links to it."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """One section a record."""
        wanted = [line.split() for line in self.content if line.strip()]
        text = "\n\n".join(section(cls) for module, *names in wanted for cls in records_of(module, names))
        # A directive starts with a heading: MyST loses an anchor that precedes its first section.
        return self.parse_text_to_nodes(f"{HOW_TO_READ}\n\n{text}", allow_section_headings=True)


class JobConfigs(SphinxDirective):
    """Which record each job's config file is read into, as a table."""

    def run(self) -> list[nodes.Node]:
        """The table."""
        rows = [
            f"| `brainsynth {name}` | [{job.config.__name__}](#{anchor(job.config)}) | {cell(job.summary)} |"
            for name, job in JOBS.items()
        ]
        return self.parse_text_to_nodes(
            "\n".join(["| command | config | what it does |", "| --- | --- | --- |", *rows])
        )


class CommandHelp(SphinxDirective):
    """What `--help` prints for `brainsynth` and each of its commands, one section per command."""

    def run(self) -> list[nodes.Node]:
        """One section per command."""
        text = "\n\n".join(f"## `{name}`\n\n```text\n{words}\n```" for name, words in command_help().items())
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def records_of(module: str, names: list[str]) -> list[type[Any]]:
    """The records that a module defines, or those of them that are named, in the module's order."""
    defining = importlib.import_module(module)
    return [
        cls
        for name, cls in vars(defining).items()
        if dataclasses.is_dataclass(cls) and cls.__module__ == module and (name in names or not names)
    ]


def section(cls: type[Any]) -> str:
    """A record as Markdown."""
    records = [base for base in cls.__mro__ if dataclasses.is_dataclass(base)]  # a key may be inherited
    attributes = {base: ModuleAnalyzer.for_module(base.__module__).find_attr_docs() for base in records}
    documented = {
        key: text for base in records for (name, key), text in attributes[base].items() if name == base.__name__
    }
    hints = get_type_hints(cls, include_extras=True)
    rows = [
        f"| `{key.name}` | {cell(kind(hints[key.name]))} | {cell(default(key))} | "
        f"{cell(' '.join(documented.get(key.name, [])) or first_sentence(hints[key.name]))} |"
        for key in dataclasses.fields(cls)
    ]
    head = ["| key | kind | default | meaning |", "| --- | --- | --- | --- |"]
    title = [f"({anchor(cls)})=", f"## {cls.__name__}", ""]
    return "\n".join([*title, dedented(cls.__doc__ or ""), "", *head, *rows])


def anchor(cls: type[Any]) -> str:
    """The anchor of a record's section."""
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
    """Of the record that a key holds, if the key itself has no explanation."""
    return (hint.__doc__ or "").partition(". ")[0].partition("\n")[0] if dataclasses.is_dataclass(hint) else ""


def default(key: dataclasses.Field[Any]) -> str:
    """The value of a key that is omitted."""
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
    """Text that is safe in a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ").strip()


def dedented(text: str) -> str:
    """A docstring without the indentation of its later lines."""
    first, *rest = text.split("\n")
    return "\n".join([first, *(line.strip() for line in rest)]).strip()


def command_help() -> dict[str, str]:
    """`brainsynth` and each `brainsynth VERB` → its help."""
    with mock.patch.dict(os.environ, {"COLUMNS": HELP_COLUMNS, "NO_COLOR": "1"}):
        whole = cli.parser()
        verbs = next(a for a in whole._actions if isinstance(a, argparse._SubParsersAction)).choices
        return {"brainsynth": whole.format_help().strip()} | {
            f"brainsynth {verb}": parser.format_help().strip() for verb, parser in verbs.items()
        }


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("config-keys", ConfigKeys)
    app.add_directive("job-configs", JobConfigs)
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
