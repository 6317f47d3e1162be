"""The command `brainsynth`. What it needs takes a second to import; Ctrl-C in that second ends it without a traceback."""

import sys
from collections.abc import Sequence


def main(words: Sequence[str] | None = None) -> None:
    """See `brainsynth.cli.main`."""
    try:
        from brainsynth.progress import importing

        with importing():
            from brainsynth.cli import main as command
    except KeyboardInterrupt:
        sys.exit(130)  # the shell's code for SIGINT
    command(words)


if __name__ == "__main__":
    main()
