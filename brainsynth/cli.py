"""`brainsynth VERB`: for whoever holds a dataset, or the published weights. Making a dataset is the jobs' work (jobs/)."""

from __future__ import annotations

import argparse
import logging
import random
import sys

from brainsynth.config.cli import configure_logging, guarded
from brainsynth.errors import UserError
from brainsynth.export.plan import FORMATS, plan_export
from brainsynth.reading.splits import SPLITS
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import open_store, resolve_uri
from brainsynth.storage.repair import garbage, lost_summary, repair
from brainsynth.storage.verify import verify_dataset
from brainsynth.verbs.cases import add_case_verbs
from brainsynth.verbs.release import add_release_verb
from brainsynth.verbs.view import add_view_verb

log = logging.getLogger(__name__)
DAMAGED = 1


def main() -> None:
    """Exit code 0: whole; 1: something is damaged, lost or different; 2: a mistake in the command or its input."""
    arguments = _parser().parse_args()
    configure_logging()
    code = 0

    def run() -> None:
        nonlocal code
        code = arguments.run(arguments)

    sys.exit(guarded(run) or code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="brainsynth", description="Synthetic 3D brain MRI at scale.")
    verbs = parser.add_subparsers(dest="verb", required=True)

    verify = verbs.add_parser("verify", help="read everything back; name what is lost, damaged, misplaced or left over")
    verify.add_argument("--repair", action="store_true", help="re-plan exactly what is damaged; then run the job again")
    verify.add_argument("--failed", action="store_true", help="with --repair: re-plan the rows that failed, too")
    verify.set_defaults(run=_verify)

    gc = verbs.add_parser("gc", help="remove what dead attempts left, judged by the commit records alone")
    gc.add_argument("--dry-run", action="store_true", help="only list it")
    gc.set_defaults(run=_gc)

    again = verbs.add_parser("regenerate", help="make rows again, alone, and compare their voxels with what is stored")
    again.add_argument("--bundle", required=True, help="the bundle that the dataset was made with")
    again.add_argument("--row", action="append", default=[], metavar="ID", help="sample_id or row number; repeatable")
    again.add_argument("--random", type=int, default=0, metavar="N", help="that many rows drawn at random, too")
    again.add_argument("--gpu", action="store_true", help="on a GPU, as they were made")
    again.set_defaults(run=_regenerate)

    published = verbs.add_parser("import-bundle", help="make a bundle of the paper's published weights (docs/)")
    published.add_argument("--autoencoder", required=True, metavar="FILE", help="the zoo's models/autoencoder.pt")
    published.add_argument("--diffusion", required=True, metavar="FILE", help="the zoo's models/model.pt")
    published.add_argument("--output", required=True, metavar="FOLDER", help="the bundle, new")
    published.add_argument("--inference", metavar="FILE", help="the zoo's configs/inference.json, compared as data")
    published.add_argument("--covariates", metavar="TABLE", help="people from whose joint distribution rows are drawn")
    published.add_argument("--licence", help="of weights of your own in the published architecture")
    published.add_argument("--training-data", help="what your own weights were trained on, in a sentence")
    published.add_argument("--origin-mm", nargs=3, type=float, metavar=("X", "Y", "Z"), help="place of the first voxel")
    published.set_defaults(run=_import_bundle)

    report = verbs.add_parser("report", help="write report.html and report.json of a generated dataset anew")
    report.add_argument("--bundle", help="the bundle it was made with: shows the distribution of its covariates, too")
    report.set_defaults(run=_report)

    export = verbs.add_parser("export", help="copy volumes into other formats, checked as they are read; resumes")
    export.add_argument("--to", required=True, choices=FORMATS, help="the format")
    export.add_argument(
        "--output", required=True, metavar="FOLDER", help="a new or empty folder, or the same to resume"
    )
    export.add_argument("--where", metavar="CONDITION", help="only these subjects, such as \"age > 60 and sex == 'F'\"")
    export.add_argument("--split", choices=SPLITS, help="only this fixed part")
    export.add_argument("--partial", action="store_true", help="of an unfinished or damaged dataset, what is whole")
    export.add_argument("--workers", type=int, default=0, metavar="N", help="so many volumes at a time, on Ray")
    export.set_defaults(run=_export)

    add_case_verbs(verbs)
    add_release_verb(verbs)
    view = add_view_verb(verbs)
    for verb in (verify, gc, again, report, export, view):
        verb.add_argument("uri", help="the dataset's folder: a path or an object-store URI")
    return parser


def _verify(arguments: argparse.Namespace) -> int:
    if arguments.failed and not arguments.repair:
        raise UserError("--failed changes what --repair re-plans: give both")
    store = open_store(resolve_uri(arguments.uri, "uri"))
    report = verify_dataset(store, progress=_progress)
    print(report.summary())
    if arguments.repair:
        lost = repair(store, report, failed=arguments.failed)
        print(lost_summary(lost) if lost or not report.ok else "nothing to repair")
    return 0 if report.ok else DAMAGED


def _gc(arguments: argparse.Namespace) -> int:
    store = open_store(resolve_uri(arguments.uri, "uri"))
    keys = garbage(store)
    for key in keys:
        print(f"{'would remove' if arguments.dry_run else 'removed'} {key}")
        if not arguments.dry_run:
            store.delete(key)
    print(f"{len(keys)} objects that no commit record refers to")
    return 0


def _regenerate(arguments: argparse.Namespace) -> int:
    from brainsynth.stages.regenerate import regenerate, rows_named

    uri = resolve_uri(arguments.uri, "uri")
    rows = rows_named(open_store(uri), arguments.row)
    if arguments.random:
        total = read_plan(open_store(uri)).num_samples
        rows += random.Random(0).sample(range(total), min(arguments.random, total))
    if not rows:
        raise UserError("name at least one row: --row ID, or --random N")
    different = 0
    for found in regenerate(uri, arguments.bundle, rows, arguments.gpu):
        different += not found.same_voxels
        verdict = "same voxels" if found.same_voxels else "DIFFERENT"
        stored = "" if found.as_recorded else "; what is STORED is not what its record says"
        print(
            f"{found.sample_id} (row {found.row}): {verdict}, largest difference {found.largest_difference:.2g}{stored}"
        )
    print(f"{len(rows) - different} of {len(rows)} rows have the voxels that their records name")
    return DAMAGED if different else 0


def _import_bundle(arguments: argparse.Namespace) -> int:
    from brainsynth.stages.published import import_bundle

    own = (arguments.licence, arguments.training_data)
    if (own[0] is None) != (own[1] is None):
        raise UserError("--licence and --training-data describe weights of your own: give both")
    spec = import_bundle(
        arguments.autoencoder,
        arguments.diffusion,
        arguments.output,
        inference=arguments.inference,
        covariates=arguments.covariates,
        own=None if own[0] is None else own,
        origin_mm=None if arguments.origin_mm is None else tuple(arguments.origin_mm),
    )
    print(f"bundle {spec.name}: {arguments.output} (digest {spec.digest[:12]}), licence {spec.licence}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from brainsynth.evaluation.dataset_report import report_dataset

    uri = resolve_uri(arguments.uri, "uri")
    read_plan(open_store(uri))  # a folder that holds no dataset is told as for the other verbs
    report_dataset(uri, None, arguments.bundle)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from brainsynth.stages.export import run_export

    chosen = (arguments.where, arguments.split, arguments.partial)
    export = plan_export(arguments.uri, arguments.output, arguments.to, *chosen)
    done = run_export(export, arguments.partial, arguments.workers)
    print(f"{done.subjects - len(done.left_out)} volumes as {done.format}: {export.output}")
    if done.left_out:
        print(f"left out, damaged: {', '.join(done.left_out)}")
    if export.plan.kind == "generated" and export.model is None:
        print("the dataset does not say under which licence its model is: it was made before brainsynth recorded that")
    return 0


def _progress(done: int, total: int) -> None:
    if done % max(1, total // 20) == 0 and total >= 100:
        log.info("%d/%d shards", done, total)
