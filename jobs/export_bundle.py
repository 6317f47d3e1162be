"""Export a trained model as a bundle: all that generation needs.

Run the same command again to resume.
"""

import sys

from brainsynth.config.cli import Stage, job
from brainsynth.config.schema import ExportConfig


def stage(config: ExportConfig) -> Stage[ExportConfig]:
    from brainsynth.stages import line as stages

    return stages.make_bundle, stages.describe_bundle


if __name__ == "__main__":
    sys.exit(job(ExportConfig, stage, __doc__))
