"""The audit's verdict: copies, membership and covariate replay, judged from descriptors, and the record that says so."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from brainsynth.audit.case import Case, People
from brainsynth.audit.descriptors import VOXELS, Instruments
from brainsynth.audit.disclosure import (
    CovariateReplay,
    MembershipInference,
    covariate_replay,
    membership_inference,
    membership_scores,
)
from brainsynth.audit.memorisation import Closeness, CopyDetector, CopyVerdict, Null, Spaces, judge_copies
from brainsynth.config.audit import AuditConfig
from brainsynth.errors import UserError
from brainsynth.records import record, unseal
from brainsynth.storage.filesystem import Store
from brainsynth.version import __version__

F64 = npt.NDArray[np.float64]
AUDIT_KEY, REPORT_KEY, NEIGHBOURS_KEY = "audit.json", "report.html", "neighbours.tsv"
LEVEL = 0.01
"""Each of the four criteria fails a dataset that gives nobody away with at most this chance."""
_DECIMALS = 6


@record
class AuditRecord:
    """`audit.json`: what was audited, with what, and the verdict. Sealed with its own sha256."""

    schema_version: Literal[1] = 1
    verdict: Literal["PASS", "FAIL"]
    reasons: tuple[str, ...]
    """Why it failed; empty when it passed."""
    volumes: int
    false_alarm_rate: float
    level: float
    dataset: str
    dataset_plan_fingerprint: str
    dataset_shards_digest: str
    """As in the dataset's own dataset.json: the record speaks of that content and no other."""
    bundle_digest: str
    """Empty for a prepared cohort in place of a dataset."""
    reference: str
    reference_plan_fingerprint: str
    reference_shards_digest: str
    training_people: int
    held_out_people: int
    same_person: tuple[tuple[str, ...], ...]
    instruments: dict[str, str | list[str]]
    copies: CopyVerdict
    membership: MembershipInference
    replay: CovariateReplay
    versions: dict[str, str]

    @property
    def passed(self) -> bool:
        """True for PASS."""
        return self.verdict == "PASS"


def read_audit(store: Store) -> AuditRecord:
    """The record of a finished audit. Raises UserError where there is none, or it is damaged."""
    try:
        return unseal(AuditRecord, store.read(AUDIT_KEY), f"{store.uri}/{AUDIT_KEY}")
    except FileNotFoundError:
        raise UserError(f"{store.uri} holds no audit: {AUDIT_KEY} is missing; run `brainsynth audit`") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The record and what else a page shows."""

    record: AuditRecord
    table: pd.DataFrame
    """One row a volume: sample_id, p_value, tail_p_value, statistic, nearest_participant, flagged."""
    null: F64
    """(m,) the statistic of people who are not copies, ascending."""
    members: F64
    """Membership scores of training people; low is near."""
    non_members: F64
    pairs: tuple[tuple[int, int], ...]
    """(volume, training scan) indices of the worst pairs, worst first."""


def judge(config: AuditConfig, case: Case, instruments: Instruments, made: Spaces, real: Spaces) -> Judgement:
    """Copies, membership and replay, from the descriptors of all volumes of the dataset and of the reference."""
    people = case.people
    detector = CopyDetector(
        {name: values[people.training] for name, values in real.items()},
        people.person[people.training],
        {name: values[people.held_out] for name, values in real.items()},
        people.person[people.held_out],
    )
    closeness = detector.score(made)
    ids = case.dataset.sample_ids
    copies = judge_copies(detector.null, closeness, ids, people.names, config.false_alarm_rate, LEVEL)
    members, others = _membership(people, made[VOXELS], real[VOXELS])
    membership = membership_inference(members, others, level=LEVEL)
    replay = _replay(case)
    table = _table(closeness, detector.null, ids, people, config.false_alarm_rate)
    place = {sample_id: index for index, sample_id in enumerate(ids)}
    worst = [place[pair.volume] for pair in copies.worst]
    return Judgement(
        record=_record(config, case, instruments, copies, membership, replay),
        table=table,
        null=detector.null.values,
        members=members,
        non_members=others,
        pairs=tuple((i, _nearest_scan(people, int(closeness.subjects[i]), i, made, real)) for i in worst),
    )


def _record(
    config: AuditConfig,
    case: Case,
    instruments: Instruments,
    copies: CopyVerdict,
    membership: MembershipInference,
    replay: CovariateReplay,
) -> AuditRecord:
    reasons = list(copies.reasons)
    if not membership.passed:
        reasons.append(
            f"membership can be inferred: AUC {membership.auc.value:.3f}, p = {membership.p_value:.2g} "
            f"({membership.members} members, {membership.non_members} non-members)"
        )
    if not replay.passed:
        reasons.append(
            f"covariates of {replay.training_tuples_replayed} of {replay.training_tuples} participants are replayed, of "
            f"{replay.held_out_tuples_hit} of {replay.held_out_tuples} held-out people by chance (p = {replay.p_value:.2g})"
        )
    dataset, reference, people = case.dataset, case.reference, case.people
    return AuditRecord(
        verdict="FAIL" if reasons else "PASS",
        reasons=tuple(reasons),
        volumes=len(dataset),
        false_alarm_rate=config.false_alarm_rate,
        level=LEVEL,
        dataset=config.dataset,
        dataset_plan_fingerprint=dataset.manifest["plan_fingerprint"],
        dataset_shards_digest=dataset.manifest["shards_digest"],
        bundle_digest=case.bundle_digest,
        reference=config.reference,
        reference_plan_fingerprint=reference.manifest["plan_fingerprint"],
        reference_shards_digest=reference.manifest["shards_digest"],
        training_people=len(people.one_scan_each(people.training)),
        held_out_people=len(people.one_scan_each(people.held_out)),
        same_person=config.same_person,
        instruments=instruments.identity,
        copies=copies,
        membership=membership,
        replay=replay,
        versions={
            "brainsynth": __version__,
            "numpy": np.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    )


def _table(closeness: Closeness, null: Null, ids: list[str], people: People, rate: float) -> pd.DataFrame:
    p = null.p_values(closeness.statistic)
    return pd.DataFrame(
        {
            "sample_id": ids,
            "p_value": p,
            "tail_p_value": null.tail_p_values(closeness.statistic),
            "statistic": closeness.statistic,
            "nearest_participant": [people.names[int(number)] for number in closeness.subjects],
            "flagged": p <= rate + 1e-12,
        }
    )


def _membership(people: People, made: npt.NDArray[np.float32], real: npt.NDArray[np.float32]) -> tuple[F64, F64]:
    """Scores of members and of non-members, one scan a person, in voxel space."""
    inside, outside = people.one_scan_each(people.training), people.one_scan_each(people.held_out)
    both = np.concatenate([inside, outside])
    scores = membership_scores(real[both], people.person[both], made[:, 0])
    return scores[: len(inside)], scores[len(inside) :]


def _nearest_scan(people: People, person: int, volume: int, made: Spaces, real: Spaces) -> int:
    """The training scan of a person that a volume is nearest to, in voxel space and either view."""
    scans = people.training[people.person[people.training] == person]
    apart = np.linalg.norm(made[VOXELS][volume][None] - real[VOXELS][scans][:, :1], axis=2).min(axis=1)
    return int(scans[apart.argmin()])


def _replay(case: Case) -> CovariateReplay:
    common = [name for name in case.dataset.covariates if name in case.reference.covariates]
    table = case.reference.table[common]
    decimals = [_precision(table[name]) if table[name].dtype.kind == "f" else None for name in common]

    def rows(frame: pd.DataFrame) -> list[tuple[Any, ...]]:
        return list(frame.itertuples(index=False, name=None))

    people = case.people
    return covariate_replay(
        rows(case.dataset.table[common]),
        rows(table.iloc[people.training]),
        rows(table.iloc[people.held_out]),
        decimals,
        LEVEL,
    )


def _precision(values: pd.Series) -> int:
    """Decimals that the participants' numbers are written with, at most 6."""
    known = values.dropna().to_numpy(dtype=np.float64)
    return next((d for d in range(_DECIMALS) if np.allclose(known, np.round(known, d), rtol=0, atol=1e-9)), _DECIMALS)
