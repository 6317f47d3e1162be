"""Train a light decoder to make a bundle's decoder's images, and put it into a new bundle beside the own one.

Run the same command again to resume.
"""

import sys

from brainsynth.config.cli import Stage, job
from brainsynth.config.distillation import DistillConfig
from brainsynth.executors.preflight import check_layout


def stage(config: DistillConfig) -> Stage[DistillConfig]:
    check_layout(config.runtime)
    from brainsynth.stages import line as stages

    return stages.distill_decoder, stages.describe_distillation


if __name__ == "__main__":
    sys.exit(job(DistillConfig, stage, __doc__))
