"""Does a generated volume copy a training scan: one number per volume, its calibration, and a verdict on the dataset.

Smooth images are near to everyone, so no absolute distance reveals a copy. The statistic is relative: the log ratio of the
distance to the nearest training subject to the mean distance to the next five. A copy is much nearer to one person than to
the others; a new person is about as near to six. Several spaces (voxels, embedding) each give such a ratio; each is put
on the scale of its null (median and robust standard deviation), and the lowest counts, before the one calibration.

The null is what the same statistic does for real people who are not copies, against the same training set: every training
scan with its own subject left out, and every held-out scan. Its p values are conformal (Vovk et al. 2005; Bates et al.
2023): as long as a volume that copies nobody is exchangeable with those people, the chance that it is flagged is at most
the stated rate, whatever the sizes of the training set and of the dataset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import betabinom, mannwhitneyu

from brainsynth.errors import UserError
from brainsynth.metrics.neighbours import nearest_subjects
from brainsynth.records import record

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Spaces = Mapping[str, F32]
"""Space → (n, v, d) features: n volumes, v views of each (as it is first, then mirrored), d numbers."""

OTHERS = 5
"""Next-nearest subjects that the nearest one is compared with."""
_ZERO_RATIO = 1e-6
"""An exact copy has distance 0; its ratio is written as this, so that its logarithm is a number."""
_TAIL_SHARE, _TAIL_MIN = 0.1, 10
_DRIFT = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class Closeness:
    """How much nearer each volume is to one training subject than to the next: low is a copy."""

    statistic: F64
    """(n,) lowest log ratio over spaces, in robust standard deviations of the null from the null's median."""
    log_ratios: F64
    """(n, s) natural log of distance to the nearest over mean distance to the next five, per space; <= 0."""
    subjects: I64
    """(n,) the training subject that is suspiciously near: the nearest one in the space that decides."""


class CopyDetector:
    """The statistic and its null for one training set."""

    def __init__(
        self,
        training: Spaces,
        subjects: npt.ArrayLike,
        held_out: Spaces,
        held_out_subjects: npt.ArrayLike,
    ) -> None:
        """Score every training scan without its own subject, and every held-out scan.

        Args:
            training: features of the scans that the generator was trained on.
            subjects: (m,) int >= 0, whose scan each is. Repeat scans of a person share a number.
            held_out: features, in the same spaces, of real scans that it never saw; they may be none.
            held_out_subjects: (h,) int numbers of the same numbering; none may be in `subjects`.

        Raises:
            UserError: spaces that differ, lengths that differ, fewer than 7 training subjects, a held-out subject
                who is in training, features that are not finite.
        """
        self.names = tuple(training)
        self.training_subjects = np.asarray(subjects, np.int64)
        others = np.asarray(held_out_subjects, np.int64)
        both = np.intersect1d(self.training_subjects, others)
        if len(both):
            raise UserError(f"{len(both)} held-out subjects are in training (first: {both[0]}); split by subject")
        if set(held_out) != set(training) or not training:
            raise UserError(f"training has the spaces {sorted(training)}, held-out {sorted(held_out)}; give the same")
        lost = [
            n for n in self.names if (len(training[n]), len(held_out[n])) != (len(self.training_subjects), len(others))
        ]
        if lost:
            raise UserError(f"features of {', '.join(lost)} and the lists of subjects have different lengths")
        people = len(np.unique(self.training_subjects))
        if people < OTHERS + 2:
            raise UserError(f"an audit needs at least {OTHERS + 2} training subjects, not {people}")
        self._references = {name: np.ascontiguousarray(training[name][:, 0]) for name in self.names}
        seen = self._log_ratios(training, self.training_subjects)[0]
        unseen = self._log_ratios(held_out, None)[0] if len(others) else np.empty((0, len(self.names)))
        null = np.concatenate([seen, unseen])
        self._middle = np.median(null, axis=0)
        spread = 1.4826 * np.median(np.abs(null - self._middle), axis=0)
        self._spread = np.maximum(spread, 1e-9)
        self.null = Null.of(
            self._standard(seen).min(axis=1), self._standard(unseen).min(axis=1), self.training_subjects
        )

    def score(self, volumes: Spaces) -> Closeness:
        """Score (n, v, d) features of volumes; any part of a dataset at a time, with the same result."""
        ratios, nearest = self._log_ratios(volumes, None)
        standard = self._standard(ratios)
        space = standard.argmin(axis=1)
        rows = np.arange(len(space))
        return Closeness(statistic=standard[rows, space], log_ratios=ratios, subjects=nearest[rows, space])

    def _standard(self, ratios: F64) -> F64:
        standard: F64 = (ratios - self._middle) / self._spread
        return standard

    def _log_ratios(self, volumes: Spaces, own: I64 | None) -> tuple[F64, I64]:
        ratios, nearest = [], []
        for name in self.names:
            if name not in volumes:
                raise UserError(f"the volumes lack features of the space {name!r}; give {', '.join(self.names)}")
            near = nearest_subjects(volumes[name], self._references[name], self.training_subjects, OTHERS + 1, own)
            ratios.append(log_ratio(near.distances))
            nearest.append(near.indices[:, 0])
        return np.stack(ratios, 1), np.stack(nearest, 1)


def log_ratio(distances: F64) -> F64:
    """(n,) log of the first of (n, 1 + k) ascending distances over the mean of the others; 0 where all are 0."""
    rest = distances[:, 1:].mean(axis=1)
    ratio = np.where(rest > 0, distances[:, 0] / np.where(rest > 0, rest, 1), 1.0)
    return np.asarray(np.log(np.maximum(ratio, _ZERO_RATIO)), np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Null:
    """What the statistic is for people who are not copies."""

    values: F64
    """(m,) ascending."""
    seen: int
    """How many of them are training scans (own subject left out)."""
    unseen: int
    """How many are held-out scans."""
    drift_p: float
    """Two-sided p value that training and held-out scans score alike (Mann-Whitney); 1 when there are none of either.
    Low: the features treat what they were fitted on differently, or the two groups differ in kind."""

    @classmethod
    def of(cls, seen: F64, unseen: F64, subjects: I64 | None = None) -> Null:
        """Pool both, unless they differ (p < 0.001): then held-out scans alone tell what is normal for new people.

        The test takes one scan of each of the (m,) `subjects` of the training scans: repeats would be counted as people.
        """
        once = seen if subjects is None else seen[np.unique(subjects, return_index=True)[1]]
        drift = float(mannwhitneyu(once, unseen).pvalue) if min(len(seen), len(unseen)) else 1.0
        if drift < _DRIFT:
            seen = seen[:0]
        return cls(values=np.sort(np.concatenate([seen, unseen])), seen=len(seen), unseen=len(unseen), drift_p=drift)

    def p_values(self, statistic: F64) -> F64:
        """(n,) conformal p values, (1 + #{null <= t}) / (m + 1): exact for one volume, never below 1 / (m + 1)."""
        below = np.searchsorted(self.values, statistic, side="right")
        return np.asarray((1 + below) / (len(self.values) + 1), np.float64)

    def tail_p_values(self, statistic: F64) -> F64:
        """(n,) p values that continue below the null's minimum: its lowest tenth is taken for an exponential tail.

        For t below u, the (j + 1)-th lowest null value, with S = Σ (u - x) over the j lower ones:
        p = (j + 1) / (m + 1) · (1 + (u - t) / S)^-j, the predictive tail of an exponential whose scale is known from j
        values only. A model, not a guarantee: a training set with close relatives has a heavier tail.
        """
        exceed = min(max(_TAIL_MIN, int(_TAIL_SHARE * len(self.values))), len(self.values) - 1)
        limit = self.values[exceed]
        total = max(float((limit - self.values[:exceed]).sum()), 1e-9)
        excess = np.maximum(limit - statistic, 0.0)
        beyond = (exceed + 1) / (len(self.values) + 1) * (1 + excess / total) ** -float(exceed)
        return np.where(statistic < limit, beyond, self.p_values(statistic))

    def flags_at(self, rate: float) -> int:
        """r, the number such that a volume is flagged when it is below the r-th lowest null value.

        Raises:
            UserError: the null is too small for the rate.
        """
        r = int(np.floor(rate * (len(self.values) + 1) + 1e-9))
        if not 0 < rate < 1 or r < 1:
            need = int(np.ceil(1 / rate - 1 - 1e-9)) if 0 < rate < 1 else 99
            drift = "; training scans score unlike held-out ones and do not count" if self.drift_p < _DRIFT else ""
            raise UserError(
                f"a false-alarm rate of {rate:g} needs at least {need} scans of people who are not copies; there are "
                f"{len(self.values)} ({self.seen} training, {self.unseen} held out{drift}): add scans, or ask for a rate of "
                f"at least {1 / (len(self.values) + 1):.3g}"
            )
        return r


@record
class SuspectPair:
    """A volume and the training subject that it may copy."""

    volume: str
    subject: str
    statistic: float
    """Robust standard deviations of the null from its median; low is a copy."""
    p_value: float
    """Conformal."""
    tail_p_value: float
    """Extrapolated; times the number of volumes audited, the chance of one like it among volumes that copy nobody."""
    outright: bool


@record
class CopyVerdict:
    """Whether a dataset copies people that the generator was trained on."""

    passed: bool
    reasons: tuple[str, ...]
    """Why it failed; empty when it passed."""
    volumes: int
    false_alarm_rate: float
    """Chance that one volume that copies nobody is flagged, at most."""
    flagged: int
    flagged_expected: float
    """Of as many volumes that copy nobody."""
    flagged_p_value: float
    """Chance of as many flags or more if no volume were a copy, with the luck of the calibration in it (beta-binomial)."""
    outright: int
    """Volumes beyond all that a dataset of this size without copies would show."""
    null_seen: int
    null_unseen: int
    null_drift_p_value: float
    worst: tuple[SuspectPair, ...]
    """The nearest pairs, lowest statistic first."""


def judge_copies(
    null: Null,
    closeness: Closeness,
    volume_ids: Sequence[str],
    subject_ids: Mapping[int, str],
    rate: float = 0.01,
    level: float = 0.01,
    worst: int = 20,
) -> CopyVerdict:
    """The verdict on a dataset: it fails on more flags than the rate explains, or on a single outright copy.

    Each has a chance of at most `level` to fail a dataset without copies. The number of flags among n volumes that copy
    nobody is beta-binomial (n, r, m + 1 - r), r the rank of the threshold among m null values: it was drawn, too.

    Args:
        null: of the detector that scored.
        closeness: of all volumes of the dataset.
        volume_ids, subject_ids: (n,) names of the volumes; names of the training subjects by number.
        rate, level: false-alarm rates in (0, 1), per volume, and of either criterion per dataset.
        worst: pairs to list at most.

    Raises:
        UserError: no volumes, lengths that differ, or a null too small for the rate.
    """
    n, rank = len(closeness.statistic), null.flags_at(rate)
    if not n or n != len(volume_ids):
        raise UserError(f"{n} scored volumes and {len(volume_ids)} ids; give one id for each, and at least one volume")
    p, tail = null.p_values(closeness.statistic), null.tail_p_values(closeness.statistic)
    flagged, outright = int((p <= rate + 1e-12).sum()), n * tail <= level
    chance = float(betabinom.sf(flagged - 1, n, rank, len(null.values) + 1 - rank))
    reasons = []
    if outright.any():
        reasons.append(f"{int(outright.sum())} of {n} volumes are outright copies (chance without any below {level:g})")
    if chance < level:
        reasons.append(f"{flagged} of {n} volumes are flagged where {rate:.2%} is expected (p = {chance:.2g})")
    pairs = tuple(
        SuspectPair(
            volume=volume_ids[i],
            subject=subject_ids[int(closeness.subjects[i])],
            statistic=float(closeness.statistic[i]),
            p_value=float(p[i]),
            tail_p_value=float(tail[i]),
            outright=bool(outright[i]),
        )
        for i in np.argsort(closeness.statistic, kind="stable")[:worst]
    )
    return CopyVerdict(
        passed=not reasons,
        reasons=tuple(reasons),
        volumes=n,
        false_alarm_rate=rate,
        flagged=flagged,
        flagged_expected=n * rank / (len(null.values) + 1),
        flagged_p_value=min(1.0, chance),
        outright=int(outright.sum()),
        null_seen=null.seen,
        null_unseen=null.unseen,
        null_drift_p_value=null.drift_p,
        worst=pairs,
    )
