"""YAML file → frozen record, strictly: every problem at once, each with file, line and a suggestion."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from brainsynth.errors import UserError, problems_error
from brainsynth.records import named_kind, validate_strict, validation_problems, without_kinds

T = TypeVar("T")
Location = tuple[str | int, ...]
# A config is one page. PyYAML takes time that grows with tokens, and with depth squared, before it says anything.
_MAX_BYTES, _MAX_TOKENS, _MAX_DEPTH, _MAX_NUMBER = 1 << 18, 20_000, 24, 64
_OPENS = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
_CLOSES = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)


class _Loader(yaml.SafeLoader):
    """Safe YAML with the 1.2 float rule: PyYAML alone reads `1e-4` as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def load_config(path: str | Path, cls: type[T], overrides: Sequence[str] = ()) -> T:
    """The config file at `path` as a `cls`, with `key.sub=value` overrides applied.

    Raises:
        UserError: with every unknown, missing, duplicated and mistyped key, by file and line.
    """
    source = Path(path)
    try:
        with open(source, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise UserError(f"the config {source} is larger than {_MAX_BYTES} bytes; a config is one page of YAML")
        text = data.decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read the config {source}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"the config {source} is not UTF-8 text") from None
    lines: dict[Location, str] = {}
    problems: list[str] = []
    root = _compose(text, str(source))
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{source}: a config is a mapping of keys to values")
    value = _build(root, (), lambda mark: f"{source}:{mark.line + 1}", lines, problems)
    return _validated(value, cls, overrides, lines, problems, source)


def build_config(value: dict[str, Any], cls: type[T], overrides: Sequence[str] = (), source: str = "config") -> T:
    """The config of plain values, such as those of command-line options, with overrides applied. Raises as `load_config`."""
    return _validated(value, cls, overrides, {}, [], Path(source))


def _validated(
    value: dict[str, Any],
    cls: type[T],
    overrides: Sequence[str],
    lines: dict[Location, str],
    problems: list[str],
    source: Path,
) -> T:
    for override in overrides:
        problems += _apply(override, value, lines)
    try:
        config = validate_strict(cls, value)
    except ValidationError as error:
        for loc, kind, message in validation_problems(error):
            problems.append(_explain(cls, loc, kind, message, lines, source))
    if problems:
        raise problems_error(f"{source} cannot be used", sorted(problems, key=_line_order))
    return config


def _compose(text: str, source: str) -> yaml.Node | None:
    """The syntax tree of a plain document. Raises UserError."""
    try:
        depth = 0
        for count, token in enumerate(yaml.scan(text, Loader=_Loader)):
            where = f"{source}:{token.start_mark.line + 1}"
            if isinstance(token, yaml.AliasToken | yaml.AnchorToken | yaml.TagToken):
                raise UserError(f"{where}: anchors, aliases and tags are not allowed in a config")
            depth += isinstance(token, _OPENS) - isinstance(token, _CLOSES)
            if depth > _MAX_DEPTH:
                raise UserError(f"{source}: not valid YAML: nested too deeply")
            if count > _MAX_TOKENS:
                raise UserError(f"{where}: the config holds too many words; long lists belong into a table")
        return yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{source}:{line}: not valid YAML: {error.reason}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    except RecursionError:
        raise UserError(f"{source}: not valid YAML: nested too deeply") from None


def _build(
    node: yaml.Node, loc: Location, place: Callable[[yaml.Mark], str], lines: dict[Location, str], problems: list[str]
) -> Any:
    """The plain value of a node; notes where each location stands and which keys are given twice."""
    lines[loc] = place(node.start_mark)
    if isinstance(node, yaml.MappingNode):
        built: dict[str, Any] = {}
        for key_node, value_node in node.value:
            where = place(key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode):
                problems.append(f"{where}: a key is a plain word")
                continue
            key = str(key_node.value)
            if key in built:
                first = lines[(*loc, key)]
                problems.append(f"{where}: {_dotted((*loc, key))}: duplicated key, first given at {first}")
                continue
            built[key] = _build(value_node, (*loc, key), place, lines, problems)
            lines[(*loc, key)] = where
        return built
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*loc, index), place, lines, problems) for index, item in enumerate(node.value)]
    return _scalar(node)


def _scalar(node: yaml.Node) -> Any:
    if node.tag != "tag:yaml.org,2002:str" and len(str(node.value)) > _MAX_NUMBER:
        return str(node.value)  # no number is that long, and to make one of a megabyte of digits takes minutes
    loader = _Loader("")
    try:
        value = loader.construct_object(node, deep=True)
    except ValueError:  # looks like a date or a number and is none, such as 2024-13-45
        value = None if node.value is None else str(node.value)
    finally:
        loader.dispose()
    # A date or a byte string has no JSON form: leave the text, so that the type check names it.
    return value if isinstance(value, str | int | float | bool | None) else str(node.value)


def _apply(override: str, value: dict[str, Any], lines: dict[Location, str]) -> list[str]:
    """Set one `a.b=c`; an unknown key is left to the strict check that follows."""
    key, equals, text = override.partition("=")
    where = f"--set {override}"
    if not equals or not all(key.split(".")):
        return [f"{where}: write it as --set key.sub=value"]
    problems: list[str] = []
    found: dict[Location, str] = {}
    target: Any = value
    loc: Location = ()
    try:
        *parents, last = key.split(".")
        for part in parents:
            loc = (*loc, _step(target, part))
            found[loc] = lines.get(loc, where)
            step: Any = loc[-1]
            target = target[step] if isinstance(target, list) else target.setdefault(part, {})
        loc = (*loc, _step(target, last))
        node = _compose(text, where)
        place: Any = loc[-1]  # a list takes only a number, and says so
        target[place] = None if node is None else _build(node, loc, lambda _: where, found, problems)
    except UserError:
        return [f"{where}: the value is not plain YAML"]
    except (IndexError, TypeError, AttributeError, ValueError):
        return [f"{where}: there is no such place in the config"]
    lines.update({**found, loc: where})
    return problems


def _step(target: Any, part: str) -> Any:
    return int(part) if isinstance(target, list) and part.isdecimal() else part


def _explain(cls: type[Any], loc: Location, kind: str, message: str, lines: dict[Location, str], source: Path) -> str:
    siblings = _field_names(cls, loc[:-1])
    loc = without_kinds(loc)
    known = loc
    while known and known not in lines:
        known = known[:-1]
    where = lines.get(known, str(source))
    name = _dotted(loc) or "(whole file)"
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        close = difflib.get_close_matches(str(loc[-1]), siblings, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(siblings)}"
        return f"{where}: {name}: unknown key; {hint}"
    if kind == "missing":
        return f"{where}: {name}: required key is missing"
    # A section is judged whole: what the command line changed in it may be the reason.
    inside = sorted({at for key, at in lines.items() if key[: len(loc)] == loc} - {where}) if known == loc else []
    where = ", with ".join([where, *(at for at in inside if at.startswith("--set "))])
    return f"{where}: {name}: {message.removeprefix('Value error, ')}"


def _field_names(cls: Any, loc: Location) -> list[str]:
    """Names of the fields at a location, following records, tuples, optional types and unions told apart by `kind`."""
    found = [cls]
    for step in loc:
        if (kind := named_kind(step)) is not None:
            found = [one for one in found if kind in typing.get_args(typing.get_type_hints(one)["kind"])]
        elif isinstance(step, str):
            found = [inner for one in found for inner in _records(typing.get_type_hints(one).get(step))]
    return [field.name for one in found if is_dataclass(one) for field in fields(one)]


def _records(hint: Any) -> Iterator[Any]:
    if is_dataclass(hint):
        yield hint
    for inner in typing.get_args(hint):
        yield from _records(inner)


def _dotted(loc: Location) -> str:
    return ".".join(str(part) for part in loc)


def _line_order(problem: str) -> tuple[int, str]:
    found = re.match(r".*?:(\d+): ", problem)
    return (int(found.group(1)) if found else 0, problem)
