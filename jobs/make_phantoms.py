"""Make a cohort of procedural brains whose true volumes are known.

Run the same command again to resume.
"""

import sys

from brainsynth.config.cli import Stage, job
from brainsynth.config.schema import PhantomConfig


def stage(config: PhantomConfig) -> Stage[PhantomConfig]:
    from brainsynth.stages import line as stages

    return stages.make_phantoms, stages.describe_phantoms


if __name__ == "__main__":
    sys.exit(job(PhantomConfig, stage, __doc__))
