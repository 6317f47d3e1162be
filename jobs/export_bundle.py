"""Export a trained model as a bundle: all that generation needs.

Run the same command again to resume.
"""

import sys

from brainsynth.config.cli import job
from brainsynth.config.schema import ExportConfig
from brainsynth.executors import stages

if __name__ == "__main__":
    sys.exit(job(ExportConfig, stages.make_bundle, stages.describe_bundle, __doc__))
