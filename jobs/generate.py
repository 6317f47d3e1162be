"""Generate a dataset of synthetic brains from a bundle and covariates.

Run the same command again to resume.
"""

import sys

from brainsynth.config.cli import job
from brainsynth.config.schema import GenerateConfig
from brainsynth.executors import stages

if __name__ == "__main__":
    sys.exit(job(GenerateConfig, stages.generate, stages.describe_generate, __doc__))
