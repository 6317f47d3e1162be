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
from brainsynth.places import user_path, variable_in, variable_message
from brainsynth.records import named_kind, validate_strict, validation_problems, without_kinds

T = TypeVar("T")
Location = tuple[str | int, ...]
# A config is one page. PyYAML takes time that grows with tokens, and with depth squared, before it says anything.
_MAX_BYTES, _MAX_TOKENS, _MAX_DEPTH, _MAX_NUMBER = 1 << 18, 20_000, 24, 64
_PATHS = frozenset(
    {
        "audit",
        "autoencoder",
        "bundle",
        "bundle_output",
        "cohort",
        "dataset",
        "diffusion",
        "embedder",
        "latents",
        "medicalnet",
    }
    | {"output", "path", "perceptual_weights", "reference", "segmenter", "start_from", "table"}
)
"""Keys whose values are paths or URIs."""
_OPENS = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
_CLOSES = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2: PyYAML alone reads `1e-4` as text, `0100` as 64, `1:30` as 90, `no` as false.

    What is not plainly a number is text: a leading zero, `1_000`, `1:30`, a date. `0x10` and `0o17` are numbers.
    """


_Loader.yaml_implicit_resolvers = {}
for _tag, _form, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_form})$"), _first)


def load_config(path: str | Path, cls: type[T], overrides: Sequence[str] = ()) -> T:
    """The config file at `path` as a `cls`, with `key.sub=value` overrides applied.

    Raises:
        UserError: with every unknown, missing, duplicated and mistyped key, by file and line.
    """
    source = user_path(str(path), "--config")
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
    given: dict[str, str] = {}
    for override in overrides:
        key, _, text = override.partition("=")
        if given.setdefault(key, text) != text:
            problems.append(f"--set {override}: {key} is set twice, to {given[key]} before")
        problems += _apply(override, value, lines)
    try:
        config = validate_strict(cls, value)
    except ValidationError as error:
        for loc, kind, message in validation_problems(error):
            hint = _hint(kind, _value_at(value, without_kinds(loc)))
            problems.append(_explain(cls, loc, kind, message + hint, lines, source))
    problems += [
        f"{_place(loc, lines, source)}: {_dotted(loc)}: {variable_message(path)}" for loc, path in _shell_paths(value)
    ]
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
    if node.tag == "tag:yaml.org,2002:int":
        return int(node.value, 0)  # PyYAML's own reads `0o17` as an error
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
    where = _place(loc, lines, source)
    name = _dotted(loc) or "(whole file)"
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        close = difflib.get_close_matches(str(loc[-1]), siblings, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(siblings)}"
        return f"{where}: {name}: unknown key; {hint}"
    if kind == "missing":
        return f"{where}: {name}: required key is missing"
    # A section is judged whole: what the command line changed in it may be the reason.
    inside = sorted({at for key, at in lines.items() if key[: len(loc)] == loc} - {where}) if loc in lines else []
    where = ", with ".join([where, *(at for at in inside if at.startswith("--set "))])
    return f"{where}: {name}: {message.removeprefix('Value error, ')}"


def _shell_paths(value: Any, loc: Location = ()) -> Iterator[tuple[Location, str]]:
    """(location, text) of every path that holds a shell variable: a folder called `$HOME` is never meant."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if isinstance(inner, str) and key in _PATHS and variable_in(inner) is not None:
            yield (*loc, key), inner
        yield from _shell_paths(inner, (*loc, key))


def _place(loc: Location, lines: dict[Location, str], source: Path) -> str:
    """Where a location, or what it is a part of, stands."""
    while loc and loc not in lines:
        loc = loc[:-1]
    return lines.get(loc, str(source))


def _value_at(value: Any, loc: Location) -> Any:
    """What the config has at a location; None where nothing is."""
    for step in loc:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _hint(kind: str, given: Any) -> str:
    """What to write instead of a word that only looks like a truth value or a number."""
    if kind == "bool_type" and str(given).lower() in ("yes", "no", "on", "off", "y", "n"):
        return f"; {given} is text (YAML 1.2): write true or false"
    if kind == "string_type" and isinstance(given, bool | int | float):
        return "; in quotation marks it is text"
    if kind in ("int_type", "int_from_float") and isinstance(given, float) and given.is_integer():
        return f"; write {int(given)}, without a decimal point or an exponent"
    if kind == "tuple_type" and isinstance(given, str | int | float):
        return f"; a list of one is written [{given}]"
    if kind in ("int_type", "float_type") and isinstance(given, str) and re.fullmatch(r"[-+]?[0-9][0-9_:]*", given):
        plain = f" {int(given)}" if given.lstrip("+-").isdecimal() and len(given) <= _MAX_NUMBER else ""
        return f", and {given} is text: write the number{plain} in decimal digits, without leading zeros, _ and :"
    return ""


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
