"""The command `brainsynth`. Importing takes a second; Ctrl-C during that second is not a crash."""

from collections.abc import Sequence

from brainsynth.progress import importing


def main(words: Sequence[str] | None = None) -> None:
    """See `brainsynth.cli.main`."""
    with importing():
        from brainsynth.cli import main as command
    command(words)


if __name__ == "__main__":
    main()
