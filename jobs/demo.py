"""Generate 64 brains with the model that travels with brainsynth, verify them and write a report.

With --train: the whole line on procedural brains instead (phantoms, two trainings, generation, verification, report).
Run the same command again to resume.
"""

import argparse
import sys
from pathlib import Path

from brainsynth.config.cli import configure_logging, guarded

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="the whole line, trainings included")
    parser.add_argument("--configs", type=Path, help="folder with the config files")
    arguments = parser.parse_args()
    configure_logging()

    def run() -> None:
        # Worker processes import this file again: here, torch and Ray stay out of them, and Ctrl-C is met while they load.
        from brainsynth.stages.demo import run_demo, run_training_demo

        if arguments.train:
            run_training_demo(arguments.configs or Path("configs/demo-train"))
        else:
            run_demo(arguments.configs or Path("configs/demo"))

    sys.exit(guarded(run))
