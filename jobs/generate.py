"""Generate a dataset of synthetic brains from a bundle and covariates.

Run the same command again to resume.
"""

import sys

from brainsynth.config.cli import Stage, job
from brainsynth.config.schema import GenerateConfig


def stage() -> Stage[GenerateConfig]:
    from brainsynth.executors import stages

    return stages.generate, stages.describe_generate


if __name__ == "__main__":
    sys.exit(job(GenerateConfig, stage, __doc__))
