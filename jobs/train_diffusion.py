"""`brainsynth train-diffusion`, as a file for `ray job submit`."""

import sys

from brainsynth.__main__ import main

if __name__ == "__main__":
    main(["train-diffusion", *sys.argv[1:]])
