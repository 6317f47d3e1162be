"""Prepare real scans: one grid, RAS+, intensities in [0, 1], split by subject; broken scans become rejects.

Run the same command again to resume.
"""

import sys

from brainsynth.config.cli import Stage, job
from brainsynth.config.schema import PrepareConfig
from brainsynth.executors.preflight import check_layout


def stage(config: PrepareConfig) -> Stage[PrepareConfig]:
    check_layout(config.runtime)
    from brainsynth.stages import line as stages

    return stages.prepare_cohort, stages.describe_prepare


if __name__ == "__main__":
    sys.exit(job(PrepareConfig, stage, __doc__))
