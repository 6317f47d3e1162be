"""Train the autoencoder on a prepared cohort.

Run the same command again to resume.
"""

import sys

from brainsynth.config.cli import Stage, job
from brainsynth.config.training import AutoencoderTrainConfig


def stage() -> Stage[AutoencoderTrainConfig]:
    from brainsynth.executors import stages

    return stages.train_autoencoder, stages.describe_autoencoder


if __name__ == "__main__":
    sys.exit(job(AutoencoderTrainConfig, stage, __doc__))
