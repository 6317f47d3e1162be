"""`brainsynth train-renderer`, as a file for `ray job submit`."""

import sys

try:
    from brainsynth.__main__ import main
except KeyboardInterrupt:  # in the first moment
    sys.exit(130)

if __name__ == "__main__":
    main(["train-renderer", *sys.argv[1:]])
