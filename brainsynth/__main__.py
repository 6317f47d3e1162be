"""The command `brainsynth`. Importing takes a second; Ctrl-C during that second is not a crash."""

import sys
from collections.abc import Sequence


def main(words: Sequence[str] | None = None) -> None:
    """See `brainsynth.cli.main`."""
    try:
        from brainsynth.cli import main as command
    except KeyboardInterrupt:
        sys.exit(130)  # the shell's code for SIGINT
    command(words)


if __name__ == "__main__":
    main()
