"""Generate a dataset of synthetic brains from a bundle and covariates.

Run the same command again to resume.
"""

import sys

from brainsynth.config.cli import Stage, job
from brainsynth.config.schema import GenerateConfig
from brainsynth.executors.preflight import check_layout


def stage(config: GenerateConfig) -> Stage[GenerateConfig]:
    check_layout(config.runtime)
    from brainsynth.stages import line as stages

    return stages.generate, stages.describe_generate


if __name__ == "__main__":
    sys.exit(job(GenerateConfig, stage, __doc__))
