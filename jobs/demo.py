"""Run the whole line on procedural brains: phantoms, two trainings, generation, verification, report.

Run the same command again to resume.
"""

import argparse
import sys
from pathlib import Path

from brainsynth.config.cli import configure_logging, guarded

if __name__ == "__main__":
    # Worker processes import this file again: below the guard, torch and Ray stay out of them.
    from brainsynth.demo import run_demo

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, default=Path("configs/demo"), help="folder with the seven config files")
    arguments = parser.parse_args()
    configure_logging()
    sys.exit(guarded(lambda: run_demo(arguments.configs)))
