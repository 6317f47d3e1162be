"""The command line that every job shares: --config, --set a.b=c, --dry-run; user mistakes end with exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable

from brainsynth.errors import UserError
from brainsynth.progress import INTERRUPTED, INTERRUPTED_TEXT

DAMAGED, USER_MISTAKE = 1, 2
PIPE_CLOSED = 141


def add_config_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """--config, --set and --dry-run."""
    parser.add_argument("--config", required=required, metavar="FILE", help="YAML; `make docs` lists every key")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.SUB=VALUE", help="override one key")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, report what would be done, write nothing"
    )


def guarded(action: Callable[[], object]) -> int:
    """Run an action; a user's mistake is one clear message on standard error and exit code 2.

    Returns the exit code: the action's own where it returns one, else 0.
    """
    try:
        result = action()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt:
        print(INTERRUPTED_TEXT, file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:
        # A worker's UserError arrives wrapped by Ray: find it, so that it reads the same as in this process.
        cause = next((e for e in _chain(error) if isinstance(e, UserError)), None)
        if cause is None:
            raise
        print(f"error: {cause}", file=sys.stderr)
        return USER_MISTAKE
    return result if isinstance(result, int) else 0


def _chain(error: BaseException) -> Iterable[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        inner = getattr(seen, "cause", None)
        yield from [inner] if isinstance(inner, BaseException) else []
        seen = seen.__cause__ or seen.__context__
