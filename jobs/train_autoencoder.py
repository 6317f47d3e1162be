"""Train the autoencoder on a prepared cohort.

Run the same command again to resume.
"""

import sys

from brainsynth.config.cli import job
from brainsynth.config.training import AutoencoderTrainConfig
from brainsynth.executors import stages

if __name__ == "__main__":
    sys.exit(job(AutoencoderTrainConfig, stages.train_autoencoder, stages.describe_autoencoder, __doc__))
