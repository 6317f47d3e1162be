"""What a user writes of a covariate on the command line, `NAME=…`, as numbers and categories."""

from __future__ import annotations

import numpy as np

from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.errors import UserError

Value = float | str


def split(text: str, schema: CovariateSchema) -> tuple[Covariate, str]:
    """The covariate and what is written of it. Raises UserError."""
    name, equals, given = text.partition("=")
    covariate = next((c for c in schema.covariates if c.name == name.strip()), None)
    if covariate is None or not equals or not given.strip():
        raise UserError(f"{text!r}: write NAME=…, with a covariate of this model: {', '.join(schema.names)}")
    return covariate, given.strip()


def number(text: str, where: str) -> float:
    """A finite number. Raises UserError."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value) or "_" in text:
        raise UserError(f"{where}: {text!r} is not a number")
    return value


def categories(text: str, covariate: Covariate) -> tuple[str, ...]:
    """One category or several, joined by commas. Raises UserError."""
    if text in covariate.categories:  # one that holds a comma itself
        return (text,)
    names = tuple(part.strip() for part in text.split(","))
    strays = [name for name in names if name not in covariate.categories]
    if strays:
        raise UserError(f"{covariate.name}={text}: {', '.join(strays)} is not one of {', '.join(covariate.categories)}")
    return names
