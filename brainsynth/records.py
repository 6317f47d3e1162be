"""Strict frozen records ⇄ JSON, and their digests. The only module that knows pydantic.

A *record* is a frozen, keyword-only dataclass: everything that crosses a process or is stored (configs, plans,
commit records, bundles). JSON is canonical (sorted keys, no spaces), so equal records have equal digests.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError

from brainsynth.errors import UserError, other_version, problems_error

T = TypeVar("T")
SCHEMA_VERSION = 1
"""Of every sealed record. A field that joins with a default (`left_out_at`) does not raise it; any other change does,
and `python -m tests.stored` then keeps what the new version writes."""
MAX_RECORD_BYTES, MAX_RECORD_VALUES = 32 << 20, 200_000
"""A commit record of a thousand samples is under 1 MB. Parsed JSON takes up to thirty times its text."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def record(cls: type[T]) -> type[T]:
    """Class decorator: a frozen, keyword-only, slotted dataclass that refuses unknown fields and NaN when read."""
    cls.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True, slots=True)(cls)


def left_out_at(default: Any) -> Any:
    """Annotation of a field that joined later: at its default it is not written, so older records keep their digests."""
    return Field(exclude_if=lambda value: bool(value == default))


_KIND = "kind="


def of_kind(kind: str) -> Any:
    """Annotation of one record of a union whose records are told apart by their field `kind`."""
    return Tag(_KIND + kind)


def told_apart_by_kind(default: str, kinds: tuple[str, ...]) -> Any:
    """Annotation of such a union. A record that joined later has a `kind`; without one it is the `default`."""

    def tag(value: Any) -> str:
        found = value.get("kind", default) if isinstance(value, dict) else getattr(value, "kind", default)
        return f"{_KIND}{found}"

    names = " or ".join(repr(kind) for kind in kinds)
    return Discriminator(tag, custom_error_type="unknown_kind", custom_error_message=f"kind: Input should be {names}")


def named_kind(step: str | int) -> str | None:
    """The kind that a step of a problem's location names: pydantic puts the record of a union in between."""
    return str(step).removeprefix(_KIND) if str(step).startswith(_KIND) else None


def without_kinds(loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The location of a problem as the user wrote it."""
    return tuple(step for step in loc if named_kind(step) is None)


_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}


def _adapter(cls: Any) -> TypeAdapter[Any]:
    if cls not in _ADAPTERS:
        _ADAPTERS[cls] = TypeAdapter(cls)
    return _ADAPTERS[cls]


def to_dict(obj: Any) -> dict[str, Any]:
    """The record as plain JSON types."""
    plain: dict[str, Any] = _adapter(type(obj)).dump_python(obj, mode="json")
    return plain


def canonical_json(value: Any) -> bytes:
    """Sorted keys, no white space, UTF-8, no NaN: equal values have equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(obj: Any) -> str:
    """sha256 (hex) of a record's, or of any plain value's, canonical JSON."""
    value = to_dict(obj) if hasattr(obj, "__dataclass_fields__") else obj
    return hashlib.sha256(canonical_json(value)).hexdigest()


def validation_problems(error: ValidationError) -> list[tuple[tuple[str | int, ...], str, str]]:
    """Every problem of a failed read as (location, kind, message)."""
    return [(tuple(item["loc"]), item["type"], item["msg"]) for item in error.errors(include_url=False)]


def from_dict(cls: type[T], value: Any, where: str) -> T:
    """Read a record strictly from plain JSON types; `where` names the source in the error."""
    try:
        read: T = _adapter(cls).validate_json(json.dumps(value), strict=True)
        return read
    except ValidationError as error:
        found = validation_problems(error)
        raise problems_error(
            f"{where} is not a valid {cls.__name__}",
            [f"{'.'.join(map(str, without_kinds(loc))) or '(whole)'}: {message}" for loc, _, message in found],
        ) from None


def validate_strict(cls: type[T], value: Any) -> T:
    """As `from_dict`, but lets pydantic's own error through (the config loader maps it to lines)."""
    read: T = _adapter(cls).validate_json(json.dumps(value), strict=True)
    return read


def seal(obj: Any) -> bytes:
    """A record as pretty JSON together with its own digest, so that a flipped bit is noticed when it is read."""
    body = to_dict(obj)
    content = {"record": body, "schema": _schema(type(obj))}
    sealed = {"sha256": digest(content), **content}
    data = _pretty(sealed)
    if _too_large(data):
        raise UserError(f"a {type(obj).__name__} of {len(data)} bytes is too large for a record; make smaller shards")
    return data


def _pretty(sealed: Any) -> bytes:
    return (json.dumps(sealed, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _too_large(data: bytes) -> bool:
    return len(data) > MAX_RECORD_BYTES or sum(data.count(mark) for mark in (b",", b"[", b"{")) > MAX_RECORD_VALUES


def _schema(cls: Any) -> str:
    return f"{cls.__name__}/{SCHEMA_VERSION}"


def unseal(cls: type[T], data: bytes, where: str) -> T:
    """Read what `seal` wrote. Raises UserError when it is damaged, OtherVersion when it is of another type or version.

    A record without a schema is of version 1: the first ones were sealed before it was written.
    """
    if _too_large(data):
        raise UserError(f"{where} is damaged: it is too large for a record ({len(data)} bytes)")
    try:
        sealed = json.loads(data)
        body, expected = sealed["record"], sealed["sha256"]
        schema = sealed.get("schema", f"{cls.__name__}/1")
        strays = set(sealed) - {"record", "schema", "sha256"}
        found = digest({"record": body, "schema": schema} if "schema" in sealed else body)
        exact = _pretty(sealed) == data  # not even white space may change
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{where} is damaged: it is not a sealed JSON record ({type(error).__name__})") from None
    if strays or found != expected or not exact:
        raise UserError(f"{where} is damaged: its content does not match its own sha256")
    if schema != _schema(cls):
        raise other_version(where, schema, _schema(cls))
    return from_dict(cls, body, where)
