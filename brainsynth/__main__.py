"""The command `brainsynth`. What it needs takes a second to import: Ctrl-C in that second is no crash either."""

import sys


def main() -> None:
    """See `brainsynth.cli.main`."""
    try:
        from brainsynth.cli import main as command
    except KeyboardInterrupt:
        sys.exit(130)  # what a shell says of SIGINT
    command()


if __name__ == "__main__":
    main()
