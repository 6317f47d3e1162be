"""Train the conditional denoiser on cached latents.

Run the same command again to resume.
"""

import sys

from brainsynth.config.cli import job
from brainsynth.config.training import DiffusionTrainConfig
from brainsynth.executors import stages

if __name__ == "__main__":
    sys.exit(job(DiffusionTrainConfig, stages.train_diffusion, stages.describe_diffusion, __doc__))
