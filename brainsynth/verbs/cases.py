"""`brainsynth vary` and `brainsynth cohort`: cases for teaching and for what-if studies (docs/cases.md)."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import pandas as pd

from brainsynth.config.load import load_config
from brainsynth.config.schema import SHIPPED_BUNDLE, GenerateConfig
from brainsynth.covariates.described import draw_cohort
from brainsynth.covariates.sweep import outside_support, refuse_outside
from brainsynth.errors import UserError
from brainsynth.executors.preflight import check_layout
from brainsynth.storage.filesystem import LocalStore, bundle_folder


def add_case_verbs(verbs: Any) -> None:
    """The parsers of both."""
    vary = verbs.add_parser("vary", help="hold a noise and move one or two covariates: a series and its pictures")
    vary.add_argument(
        "--config", required=True, metavar="FILE", help="as for jobs/generate.py: bundle, sampler, runtime"
    )
    vary.add_argument("--set", action="append", default=[], metavar="KEY.SUB=VALUE", help="override one key of it")
    vary.add_argument("--output", required=True, metavar="FOLDER", help="a new folder, or the same to resume")
    vary.add_argument("--sweep", action="append", required=True, metavar="NAME=FROM:TO:POINTS", help="once or twice")
    vary.add_argument("--hold", action="append", default=[], metavar="NAME=VALUE", help="else the median in training")
    vary.add_argument("--seed", type=int, default=0, help="another number is another brain")
    vary.add_argument("--reference", choices=("first", "middle", "last"), default="first", help="of the differences")
    vary.add_argument("--dry-run", action="store_true", help="check everything, say what would be made, write nothing")
    vary.set_defaults(run=_vary)

    cohort = verbs.add_parser("cohort", help="draw a described cohort into a table that generate takes")
    cohort.add_argument("--bundle", default=SHIPPED_BUNDLE, metavar="FOLDER", help="whose distribution is drawn from")
    cohort.add_argument("--rows", required=True, type=int, metavar="N", help="how many")
    cohort.add_argument(
        "--output", required=True, metavar="TABLE", help="a new .csv, .tsv or .parquet file, or of the same request"
    )
    cohort.add_argument(
        "--only", action="append", default=[], metavar="NAME=…", help="sex=F, age=70:80 or volume=q0.9:"
    )
    cohort.add_argument("--spread", action="append", default=[], metavar="NAME=LOW:HIGH", help="values spread evenly")
    cohort.add_argument(
        "--quantiles-of",
        choices=("everyone", "chosen"),
        default="everyone",
        help="chosen: who fulfils the other --only",
    )
    cohort.add_argument("--seed", type=int, default=0)
    cohort.set_defaults(run=_cohort)
    for verb in (vary, cohort):
        verb.add_argument(
            "--allow-extrapolation", action="store_true", help="take rows outside the training support, and mark them"
        )


def _vary(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, GenerateConfig, arguments.set)
    check_layout(config.runtime)
    from brainsynth.stages.vary import Case, describe_case, make_case

    chosen = (arguments.sweep, arguments.hold, arguments.seed, arguments.reference, arguments.allow_extrapolation)
    case = Case(config, arguments.output, *chosen)
    if arguments.dry_run:
        print(describe_case(case))
        return 0
    folder = make_case(case)
    print(
        f"{len(case.rows)} points, {case.outside.sum()} extrapolated: {folder}/grid.png, differences.png, montage.gif"
    )
    return 0


def _cohort(arguments: argparse.Namespace) -> int:
    from brainsynth.models.weights import read_bundle

    path = Path(arguments.output).expanduser()
    _check_name(path)
    bundle = read_bundle(bundle_folder(arguments.bundle))
    if bundle.distribution is None:
        raise UserError(
            f"the bundle {bundle.name} has no covariate distribution to draw from; write a table of your own"
        )
    described = (arguments.only, arguments.spread, arguments.quantiles_of)
    rows, about = draw_cohort(bundle.distribution, arguments.rows, arguments.seed, *described)
    outside = outside_support(bundle.covariates, bundle.distribution, rows)
    if not arguments.allow_extrapolation:
        refuse_outside(rows, outside, bundle.covariates.names)
    about |= {"bundle": bundle.digest, "extrapolated": int(outside.sum())}
    there = _write(path, rows.assign(extrapolated=outside), about)
    numbers = [c.name for c in bundle.covariates.covariates if c.kind == "continuous"]
    for name in numbers:
        print(f"  {name}: {rows[name].min():.4g} to {rows[name].max():.4g}")
    share = about["share_of_distribution"]
    already = ", as it is there already" if there else ""
    print(f"{len(rows)} rows ({share:.2%} of the distribution is so), {outside.sum()} extrapolated: {path}{already}")
    return 0


def _check_name(path: Path) -> None:
    if path.suffix.lower() not in (".csv", ".tsv", ".parquet"):
        raise UserError(f"--output {path}: give a name that ends in .csv, .tsv or .parquet")


def _write(path: Path, table: pd.DataFrame, about: dict[str, Any]) -> bool:
    """The table, and beside it, as JSON, what was asked for. True when the same request had made both before.

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
