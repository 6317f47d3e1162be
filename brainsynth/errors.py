"""Exceptions that callers distinguish. UserError: jobs print it and leave with exit code 2."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """A mistake in a config, an input or a layout. The message says what, where and how to fix it."""


class OtherVersion(UserError):
    """What another version of brainsynth wrote: it is whole, and must be neither repaired nor replaced."""


class StoreError(UserError):
    """A folder or a server cannot be read or written now (permissions, disk, network): the data may be whole."""


class WorkerBroken(RuntimeError):
    """This process can do no more work (its accelerator is gone, for instance): it must end, and a fresh one take over."""


def other_version(where: str, found: object, understood: str) -> OtherVersion:
    """The error about a record of a schema that this brainsynth does not read."""
    return OtherVersion(
        f"{where} is a record {ascii(found)[:80]}, this brainsynth reads {understood!r}: use the version that wrote it, "
        "or a newer one"
    )


def problems_error(headline: str, problems: Sequence[str], limit: int = 20) -> UserError:
    """One error that lists every problem found, so that a user can fix them all at once."""
    shown = [f"  {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        shown.append(f"  … and {len(problems) - limit} more")
    return UserError("\n".join([f"{headline} ({len(problems)} problem{'s' if len(problems) > 1 else ''})", *shown]))
