"""Paths as a user writes them, in a config or as an option, and the names of generators, which may be given for one."""

from __future__ import annotations

import re
from pathlib import Path

from brainsynth.errors import UserError

_GENERATOR = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.-]*")
_VARIABLE = re.compile(r"(?:^|/)(\$\w+)|(\$\{\w*\}?)")


def variable_in(path: str) -> str | None:
    """The shell variable in a path, which only a shell would replace; None where there is none."""
    match = _VARIABLE.search(path)
    return (match[1] or match[2]) if match else None


def variable_message(path: str) -> str:
    """Why such a path is refused."""
    return f"{path!r} holds the shell variable {variable_in(path)}, which nobody replaces here; write the path out (~ works)"


def user_path(path: str, what: str) -> Path:
    """The path, with `~` as the home folder. Raises UserError for a shell variable in it, and for a home that is unknown.

    Args:
        what: the config's key or the option, for the error.
    """
    if variable_in(path) is not None:
        raise UserError(f"{what}: {variable_message(path)}")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{what}: {path!r}: there is no such user whose home folder that would be") from None


def is_generator(bundle: str) -> bool:
    """True for the name of a generator's class rather than the folder of a bundle."""
    return _GENERATOR.fullmatch(bundle) is not None
