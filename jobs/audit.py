"""Audit a dataset for copies of the scans that its generator was trained on, for membership and for replayed covariates.

Exit code 0: PASS; 1: FAIL; 2: a mistake in the config or its input. Run the same command again to resume.
"""

import sys

from brainsynth.config.audit import AuditConfig
from brainsynth.config.cli import Stage, job
from brainsynth.executors.preflight import check_layout


def stage(config: AuditConfig) -> Stage[AuditConfig]:
    check_layout(config.runtime)
    from brainsynth.stages import audit

    return audit.audit, audit.describe_audit


if __name__ == "__main__":
    sys.exit(job(AuditConfig, stage, __doc__, exit_code=lambda record: 0 if record.passed else 1))
