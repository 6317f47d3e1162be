"""`brainsynth cohort`: a described cohort as a table (docs/cases.md)."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import pandas as pd

from brainsynth.bundle.files import bundle_folder, read_bundle
from brainsynth.covariates.described import draw_cohort
from brainsynth.covariates.sweep import refuse_outside
from brainsynth.errors import UserError
from brainsynth.places import user_path
from brainsynth.storage.filesystem import LocalStore


def command(arguments: argparse.Namespace) -> int:
    """Draws the table, or finds it made by the same request."""
    path = user_path(arguments.output, "--output")
    _check_name(path)
    bundle = read_bundle(bundle_folder(arguments.bundle))
    if bundle.distribution is None:
        raise UserError(
            f"the bundle {bundle.name} has no covariate distribution to draw from; write a table of your own"
        )
    described = (arguments.only, arguments.spread, arguments.quantiles_of)
    rows, about = draw_cohort(bundle.distribution, arguments.rows, arguments.seed, *described)
    outside = bundle.extrapolated(rows)
    if not arguments.allow_extrapolation:
        refuse_outside(rows, outside, bundle.covariates.names)
    about |= {"bundle": bundle.digest, "extrapolated": int(outside.sum())}
    there = _write(path, rows.assign(extrapolated=outside), about)
    numbers = [c.name for c in bundle.covariates.covariates if c.kind == "continuous"]
    for name in numbers:
        print(f"  {name}: {rows[name].min():.4g} to {rows[name].max():.4g}")
    share = about["share_of_distribution"]
    matching = f"{share:.2%} of the distribution satisfies the conditions"
    already = ", as it is there already" if there else ""
    print(f"{len(rows)} rows ({matching}), {outside.sum()} extrapolated: {path}{already}")
    return 0


def _check_name(path: Path) -> None:
    if path.suffix.lower() not in (".csv", ".tsv", ".parquet"):
        raise UserError(f"--output {path}: give a name that ends in .csv, .tsv or .parquet")


def _write(path: Path, table: pd.DataFrame, about: dict[str, Any]) -> bool:
    """The table, and the request as JSON next to it. True when the same request had written both before.

    Raises UserError, and changes nothing, where either file holds something else.
    """
    kind = path.suffix.lower()
    if kind == ".parquet":
        buffer = io.BytesIO()
        table.to_parquet(buffer, index=False)
        data = buffer.getvalue()
    else:
        text = table.to_csv(sep="\t" if kind == ".tsv" else ",", index=False, lineterminator="\n")
        data = text.encode()
    folder = LocalStore(path.absolute().parent)
    files = {path.name: data, path.with_suffix(".json").name: (json.dumps(about, indent=1) + "\n").encode()}
    new = {name: content for name, content in files.items() if not (folder.path / name).exists()}
    for name in files:
        if name not in new and folder.read(name) != files[name]:
            raise UserError(
                f"--output: {folder.path / name} is there already and holds something else than this command makes; give "
                f"a new name, or remove {' and '.join(files)}"
            )
    for name, content in new.items():
        folder.write(name, content)
    return not new
