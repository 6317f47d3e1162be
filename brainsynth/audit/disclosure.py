"""What a dataset gives away about who took part: membership inference with its control, and replayed covariates.

Membership: an attacker holds a person's scan and guesses from the dataset whether that person was in training. Nearer to the
nearest generated volume means "was in". How near is normal differs by brain, so each person's distance is divided by the
distance to the nearest other real person (difficulty calibration, Watson et al. 2022). What the attack seems to reach by
luck is measured as well: members against members, and shuffled labels.

Replay: a row of covariates that equals a participant's. Some rows do by chance, above all where covariates are coarse; how
many is measured on held-out people, whom the generator cannot replay.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt
from scipy.stats import fisher_exact

from brainsynth.errors import UserError
from brainsynth.metrics.agreement import auc_of
from brainsynth.metrics.intervals import ConfidenceInterval, bootstrap_interval
from brainsynth.metrics.neighbours import nearest_neighbours, nearest_subjects
from brainsynth.records import record

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
_FALSE_POSITIVES = 0.01
_TINY = 1e-9


@record
class MembershipInference:
    """How well members can be distinguished from non-members by how near the dataset comes to them."""

    auc: ConfidenceInterval
    """Chance that a member is nearer than a non-member; 0.5 is guessing. Persons are resampled."""
    tpr_at_1_percent_fpr: float
    """Share of members named when at most 1 % of non-members are named, too; guessing gives about 0.01."""
    members: int
    non_members: int
    control_auc_low: float
    control_auc_high: float
    """Middle 95 % of the AUC of random halves of the members against each other, where there is nothing to find."""
    control_tpr: float
    """The true-positive rate of those halves, on average: what the rate above would show without a leak."""
    p_value: float
    """One-sided, from shuffled labels: the chance of as large an AUC if membership made no difference."""
    passed: bool


def membership_scores(views: F32, subjects: npt.ArrayLike, generated: F32) -> F64:
    """(n,) log of a person's distance to the nearest generated volume over that to the nearest other real person.

    Args:
        views: (n, v, d) features of all real scans, members and not, in their views.
        subjects: (n,) int, whose scan each is.
        generated: (m, d) features of the generated volumes.

    Raises:
        UserError: fewer than two persons, no generated volume, widths that differ, NaN or Inf.
    """
    owner = np.asarray(subjects, np.int64)
    nearest = [nearest_neighbours(views[:, view], generated, 1).distances[:, 0] for view in range(views.shape[1])]
    other = nearest_subjects(views, views[:, 0], owner, 1, owner).distances[:, 0]
    return np.asarray(np.log(np.maximum(np.min(nearest, axis=0), _TINY) / np.maximum(other, _TINY)))


def area_under_curve(members: F64, non_members: F64) -> float:
    """Chance that a member scores lower than a non-member, ties half."""
    return auc_of(np.concatenate([members, non_members]), np.arange(len(members) + len(non_members)) >= len(members))


def true_positive_rate(members: F64, non_members: F64, false_positives: float = _FALSE_POSITIVES) -> float:
    """Share of members below the threshold that at most `false_positives` of the non-members are below."""
    allowed = int(np.floor(false_positives * len(non_members) + 1e-9))
    return float((members < np.sort(non_members)[allowed]).mean())


def membership_inference(
    members: npt.ArrayLike, non_members: npt.ArrayLike, resamples: int = 2000, seed: int = 0, level: float = 0.01
) -> MembershipInference:
    """Judge the attack by its control; scores are lower for people who are nearer, one per person.

    It passes unless the AUC is larger than shuffled labels explain (p < level). Non-members must be people of the same kind
    as members (same sites and scanners), or the attack distinguishes sites.

    Raises:
        UserError: fewer than 10 people in either group, or scores that are not finite.
    """
    inside, outside = np.asarray(members, np.float64), np.asarray(non_members, np.float64)
    if min(len(inside), len(outside)) < 10 or not (np.isfinite(inside).all() and np.isfinite(outside).all()):
        raise UserError(
            f"membership inference needs 10 members and 10 non-members with finite scores, not {len(inside)} and "
            f"{len(outside)}: hold more people out of training"
        )
    rng = np.random.default_rng(seed)
    auc, pool = area_under_curve(inside, outside), np.concatenate([inside, outside])
    shuffled = []
    halves = []
    rates = []
    for _ in range(resamples):
        drawn = rng.permutation(pool)
        shuffled.append(area_under_curve(drawn[: len(inside)], drawn[len(inside) :]))
        half = rng.permutation(inside)
        halves.append(area_under_curve(half[: len(half) // 2], half[len(half) // 2 :]))
        rates.append(true_positive_rate(half[: len(half) // 2], half[len(half) // 2 :]))
    p = (1 + int((np.array(shuffled) >= auc).sum())) / (resamples + 1)
    low, high = np.quantile(halves, [0.025, 0.975])
    return MembershipInference(
        auc=bootstrap_interval(
            area_under_curve, [inside, outside], method="percentile", resamples=resamples, seed=seed
        ),
        tpr_at_1_percent_fpr=true_positive_rate(inside, outside),
        members=len(inside),
        non_members=len(outside),
        control_auc_low=float(low),
        control_auc_high=float(high),
        control_tpr=float(np.mean(rates)),
        p_value=p,
        passed=p >= level,
    )


@record
class CovariateReplay:
    """Generated rows whose covariates equal a participant's, against how many do by chance."""

    rows: int
    rows_equal_to_training: int
    rows_equal_to_held_out: int
    training_tuples: int
    """Distinct, and of no held-out person."""
    training_tuples_replayed: int
    held_out_tuples: int
    """Distinct, and of no training person."""
    held_out_tuples_hit: int
    """By chance: the generator never saw them."""
    p_value: float
    """One-sided: the chance of so large a share of training tuples if held-out ones were as likely (Fisher's exact test)."""
    passed: bool


def covariate_replay(
    generated: Sequence[Sequence[object]],
    training: Sequence[Sequence[object]],
    held_out: Sequence[Sequence[object]],
    decimals: Sequence[int | None],
    level: float = 0.01,
) -> CovariateReplay:
    """Count rows that replay a participant, after rounding to the precision in which participants are written.

    Args:
        generated: rows of covariates, in the order of `decimals`.
        training: rows of the participants in training.
        held_out: rows of people of the same cohort who were not.
        decimals: per covariate, decimals that numbers are rounded to; None for text.
        level: it fails below this p value.

    Raises:
        UserError: a row of another length, or no training or held-out rows.
    """
    if not training or not held_out:
        raise UserError(
            "covariate replay needs rows of training and of held-out people: the latter tell what chance does"
        )
    made, seen, unseen = (_tuples(rows, decimals) for rows in (generated, training, held_out))
    participants, others = set(seen), set(unseen)
    seen_only, unseen_only = participants - others, others - participants
    have = set(made)
    hit, missed = len(seen_only & have), len(seen_only - have)
    hit_out, missed_out = len(unseen_only & have), len(unseen_only - have)
    p = float(fisher_exact([[hit, missed], [hit_out, missed_out]], alternative="greater").pvalue)
    return CovariateReplay(
        rows=len(made),
        rows_equal_to_training=sum(row in participants for row in made),
        rows_equal_to_held_out=sum(row in others for row in made),
        training_tuples=len(seen_only),
        training_tuples_replayed=hit,
        held_out_tuples=len(unseen_only),
        held_out_tuples_hit=hit_out,
        p_value=min(1.0, p),
        passed=p >= level,
    )


def _tuples(rows: Sequence[Sequence[object]], decimals: Sequence[int | None]) -> list[tuple[Hashable, ...]]:
    wrong = next((row for row in rows if len(row) != len(decimals)), None)
    if wrong is not None:
        raise UserError(f"a row has {len(wrong)} covariates where {len(decimals)} are declared: {wrong!r}"[:200])
    return [tuple(_value(v, d) for v, d in zip(row, decimals, strict=True)) for row in rows]


def _value(value: object, decimals: int | None) -> Hashable:
    """A number rounded, a text as it is, None for what is missing (a NaN would equal nothing, itself included)."""
    if value is None or (isinstance(value, float | np.floating) and np.isnan(value)) or value in ("", "n/a"):
        return None
    if decimals is None:
        return str(value)
    # Adding 0 makes -0.0 the same as 0.0.
    return round(float(str(value)), decimals) + 0.0
