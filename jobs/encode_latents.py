"""Encode a prepared cohort once, and measure the latents' shift and scale.

Run the same command again to resume.
"""

import sys

from brainsynth.config.cli import Stage, job
from brainsynth.config.schema import EncodeConfig
from brainsynth.executors.preflight import check_layout


def stage(config: EncodeConfig) -> Stage[EncodeConfig]:
    check_layout(config.runtime)
    from brainsynth.stages import line as stages

    return stages.encode_latents, stages.describe_encode


if __name__ == "__main__":
    sys.exit(job(EncodeConfig, stage, __doc__))
