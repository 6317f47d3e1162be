"""The command line that every job shares: --config, --set a.b=c, --dry-run; user mistakes end with exit code 2."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from brainsynth.config.load import load_config
from brainsynth.errors import UserError

T = TypeVar("T")
USER_MISTAKE = 2
INTERRUPTED = 130


def configure_logging() -> None:
    """Our own lines on standard output, with the time; other libraries' only from warnings on."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    logging.getLogger("brainsynth").setLevel(logging.INFO)


def in_minutes(seconds: float) -> str:
    """Seconds as every progress line shows them: 4m05s."""
    return f"{seconds // 60:.0f}m{int(seconds % 60):02d}s"


Stage = tuple[Callable[[T], object], Callable[[T], str]]
"""What a job does with its config, and what it says for --dry-run."""


def job(
    cls: type[T],
    load_stage: Callable[[T], Stage[T]],
    doc: str | None,
    exit_code: Callable[[Any], int] = lambda result: 0,
) -> int:
    """Read the config of a job from the command line, then run its stage, or describe it for --dry-run.

    `load_stage` is given the config when it proved right, looks at the layout, and only then imports the stage: neither a
    misspelt key nor a layout that cannot run must wait for torch. Returns the exit code: of a run that came to an end,
    what `exit_code` makes of its result, for jobs whose verdict gates what comes next.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file; every key is documented in brainsynth/config")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.SUB=VALUE", help="override one key")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, say what would be done, write nothing"
    )
    arguments = parser.parse_args()
    configure_logging()

    code = 0

    def go() -> None:
        nonlocal code
        config = load_config(arguments.config, cls, arguments.set)
        run, describe = load_stage(config)
        if arguments.dry_run:
            print(describe(config))
        else:
            code = exit_code(run(config))

    return guarded(go) or code


def guarded(action: Callable[[], object]) -> int:
    """Run an action; a user's mistake is one clear message on standard error and exit code 2."""
    try:
        action()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is finished", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        # A worker's UserError arrives wrapped by Ray: find it, so that it reads the same as in this process.
        cause = next((e for e in _chain(error) if isinstance(e, UserError)), None)
        if cause is None:
            raise
        print(f"error: {cause}", file=sys.stderr)
        return USER_MISTAKE
    return 0


def _chain(error: BaseException) -> Iterable[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        inner = getattr(seen, "cause", None)
        yield from [inner] if isinstance(inner, BaseException) else []
        seen = seen.__cause__ or seen.__context__
