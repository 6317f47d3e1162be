"""Train the conditional denoiser on cached latents.

Run the same command again to resume.
"""

import sys

from brainsynth.config.cli import Stage, job
from brainsynth.config.training import DiffusionTrainConfig
from brainsynth.executors.preflight import check_layout


def stage(config: DiffusionTrainConfig) -> Stage[DiffusionTrainConfig]:
    check_layout(config.runtime)
    from brainsynth.stages import line as stages

    return stages.train_diffusion, stages.describe_diffusion


if __name__ == "__main__":
    sys.exit(job(DiffusionTrainConfig, stage, __doc__))
