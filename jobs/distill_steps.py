"""Train a bundle's denoiser to need one, two or four evaluations a volume, guidance included, in a new bundle.

Run the same command again to resume.
"""

import sys

from brainsynth.config.cli import Stage, job
from brainsynth.config.distillation import StepDistillConfig
from brainsynth.executors.preflight import check_layout


def stage(config: StepDistillConfig) -> Stage[StepDistillConfig]:
    check_layout(config.runtime)
    from brainsynth.stages import line as stages

    return stages.distill_steps, stages.describe_step_distillation


if __name__ == "__main__":
    sys.exit(job(StepDistillConfig, stage, __doc__))
