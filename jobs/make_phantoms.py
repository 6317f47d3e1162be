"""Make a cohort of procedural brains whose true volumes are known.

Run the same command again to resume.
"""

import sys

from brainsynth.config.cli import job
from brainsynth.config.schema import PhantomConfig
from brainsynth.executors import stages

if __name__ == "__main__":
    sys.exit(job(PhantomConfig, stages.make_phantoms, stages.describe_phantoms, __doc__))
