"""`brainsynth VERB`: one command for every job (stages/jobs.py) and every tool. The words are here, the work in `stages/`.

A verb's module is imported when its words, and for a job its config, proved right: no typing error waits for torch.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, get_args

from brainsynth.config.job import add_config_arguments, guarded
from brainsynth.config.load import load_config
from brainsynth.config.schema import SHIPPED_BUNDLE, ExportFormat, GenerateConfig, SynthesisConfig
from brainsynth.errors import UserError
from brainsynth.progress import configure_logging, print_on_any_terminal
from brainsynth.reading.splits import SPLITS
from brainsynth.stages.jobs import JOBS, named_extra, run_job, stage
from brainsynth.version import __version__


def main(words: Sequence[str] | None = None) -> None:
    """Exit code 0: whole; 1: something is damaged, lost or different; 2: a mistake in the command or its input."""
    print_on_any_terminal()
    arguments = parser().parse_args(words)
    configure_logging()
    sys.exit(guarded(functools.partial(arguments.run, arguments)))


class _Once(argparse._StoreAction):
    """An option that stores one value: another value of it is a contradiction, not a correction."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        given: dict[str, Any] = namespace.__dict__.setdefault("given", {})
        if given.setdefault(self.dest, values) != values:
            parser.error(f"{option} is given twice: {given[self.dest]} and {values}")
        super().__call__(parser, namespace, values, option)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register("action", None, _Once)

    def error(self, message: str) -> NoReturn:
        """One line, as every mistake of a user."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of an option that takes a whole number of decimal digits, `least` or more."""

    def number(text: str) -> int:
        if not re.fullmatch(r"[-+]?[0-9]{1,400}", text):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
        if int(text) < least or (most is not None and int(text) > most):
            raise argparse.ArgumentTypeError(
                f"{text}: must be at least {least}{'' if most is None else f' and at most {most}'}"
            )
        return int(text)

    return number


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    made = _Parser(prog="brainsynth", description="Synthetic 3D brain MRI at scale.")
    made.add_argument("--version", action="version", version=f"brainsynth {__version__}")
    verbs = made.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, job in JOBS.items():
        words = verbs.add_parser(name, help=job.summary, description=f"{job.summary}. Run it again to resume.")
        add_config_arguments(words, required=name != "generate")
        if name == "generate":
            _generate(words)
        words.set_defaults(run=_run_job)
    for name, (summary, add_words, on_dataset) in TOOLS.items():
        words = verbs.add_parser(name, help=summary, description=summary)
        add_words(words)
        if on_dataset:
            words.add_argument("uri", help="the dataset's folder: a path or an object-store URI")
        words.set_defaults(run=_run_tool)
    return made


def _run_job(arguments: argparse.Namespace) -> int:
    if arguments.verb == "generate":
        with named_extra(arguments.verb):
            config = _generate_config(arguments)
    else:
        config = load_config(arguments.config, JOBS[arguments.verb].config, arguments.set)
    return run_job(arguments.verb, config, arguments.dry_run)


def _generate_config(arguments: argparse.Namespace) -> SynthesisConfig:
    """From the file, or from options: then sampler and gate are those that the bundle recommends."""
    options = {name: getattr(arguments, name) for name in ("count", "table", *_WITHOUT_CONFIG)}
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if arguments.config is not None:
        if given:
            raise UserError(f"{', '.join(given)}: only without --config; with it, change keys by --set")
        return load_config(arguments.config, GenerateConfig, arguments.set)
    if arguments.count is not None and arguments.table is not None:
        raise UserError("generate: give --count N or --table FILE, not both")
    if (arguments.count is None and arguments.table is None) or arguments.output is None:
        raise UserError("generate: give --config FILE, or --output FOLDER with --count N or --table FILE")
    _check_set(arguments)
    rows = {"table": arguments.table} if arguments.count is None else {"draw": arguments.count}
    from brainsynth.bundle.recommended import recommended_generation

    return recommended_generation(
        arguments.output,
        arguments.bundle or SHIPPED_BUNDLE,
        rows,
        seed=arguments.seed or 0,
        workers=arguments.workers,
        gpus=arguments.gpus or 0,
        overrides=arguments.set,
    )


def _check_set(arguments: argparse.Namespace) -> None:
    """Refuse a key of --set that an option has set already, perhaps to something else. Raises UserError."""
    keys = {override.partition("=")[0] for override in arguments.set}
    for option, same in _SAME.items():
        if getattr(arguments, option) is not None and keys & same:
            raise UserError(f"--{option} and --set {min(keys & same)}=… set the same thing: give one of them")


def _run_tool(arguments: argparse.Namespace) -> int:
    code: int = stage(arguments.verb).command(arguments)
    return code


def _generate(words: argparse.ArgumentParser) -> None:
    group = words.add_argument_group(
        "without --config", "sampler and quality gate are those that the bundle recommends"
    )
    group.add_argument(
        "--count", type=whole(1), metavar="N", help="draw N people from the bundle's covariate distribution"
    )
    group.add_argument("--table", metavar="FILE", help="or these people: .csv, .tsv or .parquet, a column a covariate")
    group.add_argument("--output", metavar="FOLDER", help="folder or URI of the dataset; the same again resumes")
    group.add_argument("--bundle", metavar="FOLDER", help=f"the model; {SHIPPED_BUNDLE}, the bundled one, by default")
    group.add_argument("--seed", type=whole(0), metavar="N", help="another number is other people and other brains; 0")
    group.add_argument(
        "--workers", type=whole(0), metavar="N", help="processes; 0: this one, without Ray; 2 by default"
    )
    group.add_argument("--gpus", type=whole(0), metavar="N", help="GPUs, one a worker; 0 by default")


_SAME = {
    "output": {"output"},
    "bundle": {"bundle"},
    "count": {"covariates", "covariates.draw", "covariates.table"},
    "table": {"covariates", "covariates.draw", "covariates.table"},
    "workers": {"runtime", "runtime.workers"},
}
"""Option of `generate` → keys of --set that say the same."""
_WITHOUT_CONFIG = ("output", "bundle", "seed", "workers", "gpus")


def _configs(words: argparse.ArgumentParser) -> None:
    words.add_argument("name", nargs="?", help="an example, such as t1w-2mm; all are listed without it")
    words.add_argument("--output", metavar="FOLDER", help="copy its files into this folder, new")


def _demo(words: argparse.ArgumentParser) -> None:
    words.add_argument("--train", action="store_true", help="the whole line, trainings included, on procedural brains")
    words.add_argument("--configs", metavar="FOLDER", help="folder with the config files")


def _verify(words: argparse.ArgumentParser) -> None:
    words.add_argument("--repair", action="store_true", help="re-plan exactly what is damaged; then run the job again")
    words.add_argument("--failed", action="store_true", help="with --repair: re-plan the rows that failed, too")
    words.add_argument("--public-key", metavar="FILE", help="of a release: also that this Ed25519 key (PEM) signed it")


def _gc(words: argparse.ArgumentParser) -> None:
    words.add_argument("--dry-run", action="store_true", help="only list it")


def _regenerate(words: argparse.ArgumentParser) -> None:
    words.add_argument("--bundle", required=True, help="the bundle that the dataset was made with")
    words.add_argument("--row", action="append", default=[], metavar="ID", help="sample_id or row number; repeatable")
    words.add_argument("--random", type=whole(1), default=0, metavar="N", help="that many rows drawn at random, too")
    words.add_argument("--gpu", action="store_true", help="on a GPU, as they were made")


def _import_bundle(words: argparse.ArgumentParser) -> None:
    words.add_argument("--autoencoder", required=True, metavar="FILE", help="the zoo's models/autoencoder.pt")
    words.add_argument("--diffusion", required=True, metavar="FILE", help="the zoo's models/model.pt")
    words.add_argument("--output", required=True, metavar="FOLDER", help="the bundle, new")
    words.add_argument("--inference", metavar="FILE", help="the zoo's configs/inference.json, compared as data")
    words.add_argument("--covariates", metavar="TABLE", help="people from whose joint distribution rows are drawn")
    words.add_argument("--licence", help="of weights of your own in the published architecture")
    words.add_argument("--training-data", help="what your own weights were trained on, in a sentence")
    words.add_argument("--origin-mm", nargs=3, type=float, metavar=("X", "Y", "Z"), help="position of the first voxel")


def _report(words: argparse.ArgumentParser) -> None:
    words.add_argument("--bundle", help="the bundle it was made with: shows the distribution of its covariates, too")


def _export(words: argparse.ArgumentParser) -> None:
    words.add_argument("--to", required=True, choices=get_args(ExportFormat), help="the format")
    words.add_argument("--output", required=True, metavar="FOLDER", help="a new or empty folder, or the same to resume")
    words.add_argument("--where", metavar="CONDITION", help="only these subjects, such as \"age > 60 and sex == 'F'\"")
    words.add_argument("--split", choices=SPLITS, help="only this fixed part")
    words.add_argument("--partial", action="store_true", help="of an unfinished or damaged dataset, what is whole")
    words.add_argument("--workers", type=whole(0), default=0, metavar="N", help="this many volumes at a time, on Ray")


def _vary(words: argparse.ArgumentParser) -> None:
    add_config_arguments(words, required=False)
    words.add_argument("--bundle", metavar="FOLDER", help=f"without --config: the model; {SHIPPED_BUNDLE} by default")
    words.add_argument("--output", required=True, metavar="FOLDER", help="a new folder, or the same to resume")
    words.add_argument("--scan", metavar="FILE", help="a person's scan (NIfTI, MGH) in place of a drawn brain")
    words.add_argument("--mask", metavar="FILE", help="of that scan: what is 0 there is not brain")
    words.add_argument("--covariates", metavar="NAME=VALUE,…", help="of that person: every one that the model knows")
    words.add_argument("--sweep", action="append", required=True, metavar="NAME=FROM:TO:POINTS", help="once or twice")
    words.add_argument("--hold", action="append", default=[], metavar="NAME=VALUE", help="else the median in training")
    words.add_argument("--seed", type=whole(0), default=0, help="another number is another brain")
    words.add_argument("--reference", choices=("first", "middle", "last"), default="first", help="of the differences")
    _extrapolation(words)


def _render(words: argparse.ArgumentParser) -> None:
    words.add_argument("--bundle", default=SHIPPED_BUNDLE, metavar="FOLDER", help="the model, with a renderer")
    words.add_argument(
        "--labels", required=True, metavar="FILE", help="the label map (NIfTI, MGH) in world coordinates"
    )
    words.add_argument(
        "--label-table", metavar="FILE", help="where its integers are others: index, name and values of each structure"
    )
    words.add_argument("--covariates", default="", metavar="NAME=VALUE,…", help="one that is left out is unknown")
    words.add_argument("--seed", type=whole(0), default=0, metavar="N", help="another number is another texture")
    words.add_argument("--output", required=True, metavar="FILE", help="the image, new; ends in .nii.gz")
    words.add_argument(
        "--allow-extrapolation", action="store_true", help="take what is far from any label map or person in training"
    )


def _push(words: argparse.ArgumentParser) -> None:
    words.add_argument("release", help="the folder that `brainsynth release` wrote")
    words.add_argument("--to", required=True, metavar="OWNER/NAME", help="an existing dataset repository of the hub")
    words.add_argument("--dry-run", action="store_true", help="check the release and send nothing")


def _recipe(words: argparse.ArgumentParser) -> None:
    words.add_argument("--bundle", default=SHIPPED_BUNDLE, metavar="FOLDER", help="that the dataset was made with")
    words.add_argument("--output", required=True, metavar="FILE", help="ends in .recipe")


def _materialise(words: argparse.ArgumentParser) -> None:
    words.add_argument("recipe", help="a file that `brainsynth recipe` wrote, on a path that every worker reaches")
    words.add_argument("--output", required=True, metavar="URI", help="the new dataset")
    words.add_argument("--workers", type=whole(0), default=2, metavar="N", help="0: in this process, without Ray")
    words.add_argument("--cache", metavar="FOLDER", help="where the recipe is unpacked, instead of next to it")


def _cohort(words: argparse.ArgumentParser) -> None:
    words.add_argument("--bundle", default=SHIPPED_BUNDLE, metavar="FOLDER", help="whose distribution is drawn from")
    words.add_argument("--rows", required=True, type=whole(1), metavar="N", help="how many")
    words.add_argument(
        "--output", required=True, metavar="TABLE", help="a new .csv, .tsv or .parquet file, or of the same request"
    )
    words.add_argument("--only", action="append", default=[], metavar="NAME=…", help="sex=F, age=70:80 or volume=q0.9:")
    words.add_argument("--spread", action="append", default=[], metavar="NAME=LOW:HIGH", help="values spread evenly")
    words.add_argument(
        "--quantiles-of",
        choices=("everyone", "chosen"),
        default="everyone",
        help="chosen: who satisfies the other --only",
    )
    words.add_argument("--seed", type=whole(0), default=0)
    _extrapolation(words)


def _extrapolation(words: argparse.ArgumentParser) -> None:
    words.add_argument(
        "--allow-extrapolation", action="store_true", help="take rows outside the training support, and mark them"
    )


def _view(words: argparse.ArgumentParser) -> None:
    words.add_argument("--port", type=whole(0, 65535), default=0, help="of 127.0.0.1; a free one by default")
    words.add_argument("--no-browser", action="store_true", help="only print the address")
    words.add_argument("--static", metavar="FOLDER", help="write a site of files instead, which needs no server")
    words.add_argument("--where", metavar="CONDITION", help='with --static: only these subjects, such as "age > 60"')
    words.add_argument(
        "--measured", metavar="DIGEST", help="of several evaluations, whose measured values: the start of its digest"
    )


TOOLS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], Any], bool]] = {
    "configs": ("list the packaged example configs, or write one out", _configs, False),
    "demo": ("generate brains with the bundled model, verify them and write a report", _demo, False),
    "verify": ("read everything back; name what is lost, damaged, misplaced or left over", _verify, True),
    "gc": ("remove what dead attempts left, judged by the commit records alone", _gc, True),
    "regenerate": ("make rows again, alone, and compare their voxels with what is stored", _regenerate, True),
    "import-bundle": (
        "make a bundle of the paper's published weights (docs/published-weights.md)",
        _import_bundle,
        False,
    ),
    "report": ("write report.html and report.json of a generated dataset again", _report, True),
    "export": ("copy volumes into other formats, checked as they are read; resumes", _export, True),
    "vary": ("one covariate or two varied, noise held fixed: a series and its pictures", _vary, False),
    "render": ("make an image of a label map, by the bundle's renderer (docs/labels.md)", _render, False),
    "push": ("send a release to a dataset repository of the Hugging Face hub; resumes", _push, False),
    "recipe": ("plan, manifest and bundle of a dataset in one file, from which others make its volumes", _recipe, True),
    "materialise": ("make all volumes of a recipe, checked against its manifest; resumes", _materialise, False),
    "cohort": ("draw a described cohort into a table that generate takes", _cohort, False),
    "view": ("look at a dataset in the browser: filter, scroll slices, compare asked with measured", _view, True),
}
"""Verb → what it does, its words, and whether it is about a dataset. Its module in `stages/` has `command(arguments)`."""
