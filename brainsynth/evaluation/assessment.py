"""Judge a measured dataset against measured real scans: does it obey its labels (`fidelity`: does it look like them).

Nothing is judged against a number of our own choosing. Each figure is compared with what the same instrument finds on real
scans that it was not fitted on (the validation split), and the verdict is whether the two intervals meet.
"""

from __future__ import annotations

import dataclasses
import logging

from brainsynth.config.evaluation import EvaluateConfig
from brainsynth.covariates.schema import CovariateSchema
from brainsynth.errors import UserError
from brainsynth.evaluation.adherence import Scatter, adherence
from brainsynth.evaluation.structures import structure_columns, structure_effects
from brainsynth.instruments.measured import Measured
from brainsynth.metrics.finding import LEAST, Finding
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import open_store

log = logging.getLogger(__name__)


def assess(config: EvaluateConfig, made_root: str, real_root: str) -> tuple[list[Finding], list[Scatter]]:
    """Adherence: every covariate that has a ruler, its verdicts and its values; then every structure's effect size.

    With `by`, both are judged within each of its categories: rulers are calibrated there, and a figure of all together
    does not hide one of them.

    Raises:
        UserError: the reference has too few scans, or another schema of covariates.
    """
    made, real = Measured(made_root), Measured(real_root)
    schema = read_plan(open_store(made_root)).covariates
    absent = [c for c in schema.names if c not in real.table]
    if absent:
        raise UserError(f"reference: it does not know the covariate(s) {', '.join(absent)} of the dataset")
    if config.by is None:
        return _assess(config, schema, made, real)
    by = next(covariate for covariate in schema.covariates if covariate.name == config.by)
    alone = dataclasses.replace(schema, covariates=(by,))
    rest = dataclasses.replace(schema, covariates=tuple(c for c in schema.covariates if c.name != by.name))
    findings, scatters = adherence(config, alone, made, real, real.split("train"), real.split("validation"))
    for category in by.categories:
        mine, theirs = (one.where(by.name, category) for one in (made, real))
        if len(mine.table) < LEAST:
            log.warning("%s %s: %d measured volumes are too few to judge", by.name, category, len(mine.table))
            continue
        more, values = _assess(config, rest, mine, theirs, f" ({by.name} {category})")
        findings, scatters = findings + more, scatters + values
    return findings, scatters


def _assess(
    config: EvaluateConfig, schema: CovariateSchema, made: Measured, real: Measured, within: str = ""
) -> tuple[list[Finding], list[Scatter]]:
    train, held = real.split("train"), real.split("validation")
    findings, scatters = adherence(config, schema, made, real, train, held, within)
    columns = structure_columns(made.table, real.table)
    tables = made.table, real.table.iloc[train], real.table.iloc[held]
    return findings + structure_effects(columns, schema, *tables, within=within), scatters
