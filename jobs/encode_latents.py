"""Encode a prepared cohort once, and measure the latents' shift and scale.

Run the same command again to resume.
"""

import sys

from brainsynth.config.cli import job
from brainsynth.config.schema import EncodeConfig
from brainsynth.executors import stages

if __name__ == "__main__":
    sys.exit(job(EncodeConfig, stages.encode_latents, stages.describe_encode, __doc__))
