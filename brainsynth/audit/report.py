"""The page of an audit: the verdict first, then what it rests on; neighbours.tsv, and last audit.json."""

from __future__ import annotations

import numpy as np

from brainsynth.audit.case import Case
from brainsynth.audit.verdict import AUDIT_KEY, NEIGHBOURS_KEY, REPORT_KEY, AuditRecord, Judgement
from brainsynth.instruments.alignment import Aligner, CanonicalFrame, to_working_grid
from brainsynth.records import seal
from brainsynth.report import audit_figures
from brainsynth.report.html import Page
from brainsynth.storage.filesystem import Store

PICTURES = 10


def write_audit(store: Store, case: Case, frame: CanonicalFrame, judgement: Judgement, pictures: bool) -> None:
    """report.html, neighbours.tsv, and audit.json, which makes them true."""
    table = judgement.table.to_csv(sep="\t", index=False, float_format="%.6g", lineterminator="\n")
    store.write(NEIGHBOURS_KEY, table.encode())
    store.write(REPORT_KEY, _page(case, frame, judgement, pictures).render().encode())
    store.write(AUDIT_KEY, seal(judgement.record))


def _page(case: Case, frame: CanonicalFrame, judgement: Judgement, pictures: bool) -> Page:
    audit = judgement.record
    page = Page(
        "brainsynth memorisation audit",
        f"{audit.dataset} · {audit.dataset_shards_digest[:16]} · {audit.volumes} volumes",
    )
    page.text(
        f"This page {'contains real scans' if pictures else 'names participants'}: not for publication.", "warning"
    )
    page.heading(f"Verdict: {audit.verdict}")
    if audit.passed:
        page.text("Nothing found that people outside the training set would not show as well.")
    for reason in audit.reasons:
        page.text(reason, "warning")
    page.table(["criterion", "found", "without copies", "p", "verdict"], _criteria(audit))
    page.text(
        f"Each criterion fails a dataset that gives nobody away with a chance of at most {audit.level:.0%}, so the "
        f"verdict as a whole does with at most {4 * audit.level:.0%}. A volume is flagged by mistake with a chance of "
        f"at most {audit.false_alarm_rate:.2%}.",
        "note",
    )
    _copies(page, case, frame, judgement, pictures)
    _disclosure(page, judgement)
    page.heading("What was audited, and with what")
    page.table(["", ""], _facts(audit))
    return page


def _criteria(audit: AuditRecord) -> list[list[object]]:
    copies, membership, replay = audit.copies, audit.membership, audit.replay
    lowest = min(1.0, copies.worst[0].tail_p_value * copies.volumes)
    few = copies.flagged_p_value >= audit.level
    return [
        ["outright copies", copies.outright, "0", f"{lowest:.2g}", _word(not copies.outright)],
        [
            "flagged volumes",
            copies.flagged,
            f"{copies.flagged_expected:.2f}",
            f"{copies.flagged_p_value:.2g}",
            _word(few),
        ],
        [
            "membership inference, AUC",
            f"{membership.auc.value:.3f} [{membership.auc.low:.3f}, {membership.auc.high:.3f}]",
            f"control [{membership.control_auc_low:.3f}, {membership.control_auc_high:.3f}]",
            f"{membership.p_value:.2g}",
            _word(membership.passed),
        ],
        [
            "participants whose covariates are replayed",
            f"{replay.training_tuples_replayed} of {replay.training_tuples}",
            f"held-out people, by chance: {replay.held_out_tuples_hit} of {replay.held_out_tuples}",
            f"{replay.p_value:.2g}",
            _word(replay.passed),
        ],
    ]


def _word(passed: bool) -> str:
    return "pass" if passed else "FAIL"


def _copies(page: Page, case: Case, frame: CanonicalFrame, judgement: Judgement, pictures: bool) -> None:
    audit, statistic = judgement.record, judgement.table["statistic"].to_numpy()
    copies = audit.copies
    page.heading("How near volumes are to one participant")
    rank = int(np.floor(audit.false_alarm_rate * (len(judgement.null) + 1) + 1e-9))
    page.figure(
        audit_figures.closeness_histogram(judgement.null, statistic, judgement.null[rank - 1]),
        "histogram of the statistic",
    )
    drift = "" if copies.null_seen else " Training scans score unlike held-out ones and do not count."
    page.text(
        f"The null: {copies.null_seen} training scans without their own person and {copies.null_unseen} held-out scans "
        f"(they differ with p = {copies.null_drift_p_value:.2g}).{drift} p values are conformal; the tail continues below "
        "the null by extrapolation. A volume is an outright copy when its tail p times the number of volumes is below "
        f"{audit.level:g}.",
        "note",
    )
    page.heading("The nearest pairs")
    page.table(
        ["volume", "participant", "statistic", "p", "tail p", ""],
        [
            [
                w.volume,
                w.subject,
                f"{w.statistic:.2f}",
                f"{w.p_value:.3g}",
                f"{w.tail_p_value:.2g}",
                _outright(w.outright),
            ]
            for w in copies.worst
        ],
    )
    if pictures:
        page.text("Left the volume, right the training scan, both in the audit's pose and on its grid.", "note")
        shown = judgement.pairs[:PICTURES]
        made = [to_working_grid(case.dataset.volume(i), case.plan.volume) for i, _ in shown]
        real = [to_working_grid(case.reference.volume(j), case.plan.volume) for _, j in shown]
        aligned = Aligner(frame).align(np.stack([*made, *real])).volumes
        captions = [(f"volume {w.volume}", f"participant {w.subject}") for w in copies.worst[:PICTURES]]
        sides = list(zip(aligned[: len(shown)], aligned[len(shown) :], strict=True))
        page.figure(audit_figures.pairs(sides, captions), "slices of the nearest pairs")


def _outright(outright: bool) -> str:
    return "outright copy" if outright else ""


def _disclosure(page: Page, judgement: Judgement) -> None:
    membership, replay = judgement.record.membership, judgement.record.replay
    page.heading("Membership inference")
    page.figure(
        audit_figures.membership_curve(judgement.members, judgement.non_members, f"AUC {membership.auc.value:.3f}"),
        "ROC curve",
    )
    page.table(
        ["", "dataset", "control: halves of the members"],
        [
            [
                "AUC",
                f"{membership.auc.value:.3f}",
                f"{membership.control_auc_low:.3f} to {membership.control_auc_high:.3f}",
            ],
            ["95 % interval", f"{membership.auc.low:.3f} to {membership.auc.high:.3f}", ""],
            [
                "true positives at 1 % false positives",
                f"{membership.tpr_at_1_percent_fpr:.3f}",
                f"{membership.control_tpr:.3f}",
            ],
            ["members, non-members", f"{membership.members}, {membership.non_members}", ""],
        ],
    )
    page.text(
        "Can training people be distinguished from held-out ones by how near the dataset comes to them? 0.5 is guessing; "
        "the p value from shuffled labels decides.",
        "note",
    )
    page.heading("Covariate replay")
    page.table(
        ["", "training", "held out"],
        [
            ["distinct tuples of covariates", replay.training_tuples, replay.held_out_tuples],
            ["found among the dataset's rows", replay.training_tuples_replayed, replay.held_out_tuples_hit],
            [
                f"rows of the dataset ({replay.rows}) equal to one",
                replay.rows_equal_to_training,
                replay.rows_equal_to_held_out,
            ],
        ],
    )


def _facts(audit: AuditRecord) -> list[list[object]]:
    instruments: list[list[object]] = [
        [name, value if isinstance(value, str) else ", ".join(value)] for name, value in audit.instruments.items()
    ]
    return [
        ["dataset", audit.dataset],
        ["its plan, its shards", f"{audit.dataset_plan_fingerprint[:16]}, {audit.dataset_shards_digest[:16]}"],
        ["bundle", audit.bundle_digest[:16] or "none: a prepared cohort takes the place of a dataset"],
        ["reference", audit.reference],
        ["its plan, its shards", f"{audit.reference_plan_fingerprint[:16]}, {audit.reference_shards_digest[:16]}"],
        ["people", f"{audit.training_people} in training, {audit.held_out_people} held out"],
        ["ids taken for one person", "; ".join(" = ".join(group) for group in audit.same_person) or "none"],
        *instruments,
        ["versions", ", ".join(f"{name} {version}" for name, version in audit.versions.items())],
    ]
