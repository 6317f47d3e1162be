"""Train the autoencoder on a prepared cohort.

Run the same command again to resume.
"""

import sys

from brainsynth.config.cli import Stage, job
from brainsynth.config.training import AutoencoderTrainConfig
from brainsynth.executors.preflight import check_layout


def stage(config: AutoencoderTrainConfig) -> Stage[AutoencoderTrainConfig]:
    check_layout(config.runtime)
    from brainsynth.stages import line as stages

    return stages.train_autoencoder, stages.describe_autoencoder


if __name__ == "__main__":
    sys.exit(job(AutoencoderTrainConfig, stage, __doc__))
