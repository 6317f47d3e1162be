"""Judge a measured dataset against measured real scans: does it obey its labels (`fidelity`: does it look like them).

Nothing is judged against a number of our own choosing. Each figure is compared with what the same instrument finds on real
scans that it was not fitted on (the validation split), and the verdict is whether the two intervals meet.
"""

from __future__ import annotations

from brainsynth.config.evaluation import EvaluateConfig
from brainsynth.errors import UserError
from brainsynth.evaluation.adherence import Scatter, adherence
from brainsynth.instruments.measured import Measured
from brainsynth.metrics.finding import Finding
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import open_store


def assess(config: EvaluateConfig, made_root: str, real_root: str) -> tuple[list[Finding], list[Scatter]]:
    """Adherence: every covariate that has a ruler, its verdicts and its values.

    Raises:
        UserError: the reference has too few scans, or another schema of covariates.
    """
    made, real = Measured(made_root), Measured(real_root)
    covariates = read_plan(open_store(made_root)).covariates
    absent = [c for c in covariates.names if c not in real.table]
    if absent:
        raise UserError(f"reference: it does not know the covariate(s) {', '.join(absent)} of the dataset")
    return adherence(config, covariates, made, real, real.split("train"), real.split("validation"))
