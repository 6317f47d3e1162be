"""Measure a dataset and real scans with the same instruments, and report whether it looks like them and obeys its labels.

Run the same command again to resume.
"""

import sys

from brainsynth.config.cli import Stage, job
from brainsynth.config.evaluation import EvaluateConfig
from brainsynth.executors.preflight import check_layout


def stage(config: EvaluateConfig) -> Stage[EvaluateConfig]:
    check_layout(config.runtime)
    from brainsynth.stages import evaluate

    return evaluate.evaluate, evaluate.describe_evaluate


if __name__ == "__main__":
    sys.exit(job(EvaluateConfig, stage, __doc__))
