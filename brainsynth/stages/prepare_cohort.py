"""Scans → prepared cohort."""

from __future__ import annotations

import logging

from brainsynth.cohort.prepare import CohortWork, plan_cohort
from brainsynth.cohort.rerun import changed_rows, copies, rows_to_read_again
from brainsynth.config.schema import PrepareConfig
from brainsynth.errors import UserError
from brainsynth.executors.dataset import dry_run, make_dataset
from brainsynth.manifest import LEFT_OUT_KEY
from brainsynth.storage.commit import check_plan
from brainsynth.storage.repair import replan

log = logging.getLogger(__name__)


def run(config: PrepareConfig) -> None:
    """Scans → prepared cohort. Raises UserError when not one scan is usable."""
    work = plan_cohort(config)
    for warning in work.warnings:
        log.warning(warning)
    if _is_there(work):
        _look_again(work, config.reread_changed)
    manifest = make_dataset(work, config.runtime)
    _name_left_out(work)
    same = copies(work.store, work.plan, work.samples)
    if same:
        log.warning(
            "the same scan under more than one name, byte for byte (perhaps on both sides of the split): %s%s; "
            "delete the rows that are wrong",
            ", ".join(same[:10]),
            ", …" if len(same) > 10 else "",
        )
    if manifest.num_rejected:
        log.info("rejected scans, each with its reason: %s/rejects.tsv", config.output)
    if manifest.num_ok == 0:
        raise UserError(f"no scan of the cohort is usable; the reasons are in {config.output}/rejects.tsv")


def _is_there(work: CohortWork) -> bool:
    """True when the output holds this plan. Raises UserError when it holds another one."""
    try:
        return check_plan(work.store, work.plan)
    except UserError as error:
        if "identity.intensity_rule: the folder has None" not in str(error):
            raise UserError(f"{error}{changed_rows(work.store, work.samples)}") from None
        raise UserError(
            f"{error}\nThe cohort was made before intensity rules had names: `intensity_rule: percentiles` in the config "
            "resumes it, another output folder makes one by the rule of today"
        ) from None


def _name_left_out(work: CohortWork) -> None:
    """left_out.tsv: what lies in a BIDS folder and is in no row of its table."""
    if work.left_out:
        lines = ["path\treason", *("\t".join(line) for line in work.left_out)]
        work.store.write(LEFT_OUT_KEY, ("\n".join(lines) + "\n").encode())
        log.warning(
            "%d folders and files are in no row of the table: %s/%s", len(work.left_out), work.root, LEFT_OUT_KEY
        )
    else:
        work.store.delete(LEFT_OUT_KEY)


def _look_again(work: CohortWork, reread_changed: bool) -> None:
    """Re-plan rows whose files are there now; of files that changed, say so, or read them again where that was asked for."""
    rows = rows_to_read_again(work.store, work.plan, work.samples, work.late)
    again = [*rows.refused, *(rows.changed if reread_changed else ())]
    if rows.changed and not reread_changed:
        names = ", ".join(work.samples["sample_id"].iloc[list(rows.changed[:10])])
        log.warning(
            "%d scans changed on disk since they were prepared, and the cohort keeps what it has of them: %s%s; to read "
            "them again: the same command with --set reread_changed=true",
            len(rows.changed),
            names,
            ", …" if len(rows.changed) > 10 else "",
        )
    if again:
        log.info("%d scans are read again: their files are there now, or changed", len(again))
        replan(work.store, work.plan, again)


def describe(config: PrepareConfig) -> str:
    """What prepare_cohort would make."""
    return dry_run(plan_cohort(config), config.runtime)
