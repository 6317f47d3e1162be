"""What is to be audited, checked: who is in the reference, and whether it can answer what is asked.

Nothing is measured before all that can be known to fail is checked: grids, splits, the generator's cohort, and whether
the people of the reference are enough for the rate that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from brainsynth.audit.memorisation import OTHERS, Null
from brainsynth.bundle.generator import model_spec
from brainsynth.config.audit import AuditConfig
from brainsynth.errors import UserError
from brainsynth.instruments.measurement import check_same_grid, open_volumes
from brainsynth.plan import Plan
from brainsynth.reading.dataset import SyntheticDataset
from brainsynth.storage.commit import read_plan, read_samples
from brainsynth.storage.filesystem import open_store

I64 = npt.NDArray[np.int64]
_ATTACKED = 10
"""People that membership inference needs in training, and as many held out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class People:
    """Whose scans the reference holds, by index of its volumes."""

    person: I64
    """(n,) number of the person."""
    names: dict[int, str]
    training: I64
    """Indices of the training scans."""
    held_out: I64
    """Indices of scans of people who have none in training."""

    def one_scan_each(self, indices: I64) -> I64:
        """The first scan of each person among `indices`."""
        return indices[np.unique(self.person[indices], return_index=True)[1]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is to be audited, checked."""

    dataset: SyntheticDataset
    reference: SyntheticDataset
    plan: Plan
    """Of the dataset."""
    people: People
    bundle_digest: str


def open_case(config: AuditConfig) -> Case:
    """Open and check dataset and reference. Raises UserError for all that would make the audit void or impossible."""
    dataset, reference = open_volumes(config.dataset, "dataset"), open_volumes(config.reference, "reference")
    check_same_grid(dataset, reference)
    plan = read_plan(open_store(dataset.uri))
    if reference.manifest["kind"] != "prepared":
        raise UserError(f"reference: {config.reference} is not a prepared cohort (it is {reference.manifest['kind']})")
    for split in ("train", "validation"):
        open_volumes(config.reference, "reference", split=split)
    if not set(dataset.covariates) & set(reference.covariates):
        raise UserError(f"reference: {config.reference} has no covariate in common with {config.dataset}")
    bundle_digest = _check_cohort(config, plan, reference)
    people = find_people(reference, config.same_person)
    _check_enough(people, config.false_alarm_rate)
    return Case(dataset=dataset, reference=reference, plan=plan, people=people, bundle_digest=bundle_digest)


def _check_cohort(config: AuditConfig, plan: Plan, reference: SyntheticDataset) -> str:
    """The digest of the bundle, which must have made the dataset and have been trained on the reference."""
    if plan.kind != "generated":
        if config.bundle is not None:
            raise UserError(f"bundle: {config.dataset} was not generated, so no bundle belongs to it; leave it out")
        return ""
    if config.bundle is None:
        raise UserError(
            f"bundle: name the bundle that {config.dataset} was generated with; it says whether reference is its cohort"
        )
    spec = model_spec(config.bundle, plan.identity.get("options"))
    if spec.digest != plan.identity["bundle"]:
        raise UserError(
            f"bundle: {config.dataset} was made with another one ({str(plan.identity['bundle'])[:12]}…) than "
            f"{config.bundle} ({spec.digest[:12]}…)"
        )
    trained_on, given = str(spec.provenance.get("cohort_fingerprint")), reference.manifest["plan_fingerprint"]
    if trained_on != given:
        raise UserError(
            f"reference: {config.reference} is another cohort ({given[:12]}…) than the generator was trained on "
            f"({trained_on[:12]}…); an audit against other people finds nothing"
        )
    return spec.digest


def find_people(reference: SyntheticDataset, same_person: Sequence[Sequence[str]] = ()) -> People:
    """Number the people of a prepared cohort; a held-out scan of a person who is in training, too, counts as neither."""
    store = open_store(reference.uri)
    samples = read_samples(store, read_plan(store)).iloc[reference.rows]
    subjects = samples["subject"].astype(str)
    unknown = sorted({name for group in same_person for name in group} - set(subjects))
    if unknown:
        raise UserError(
            f"same_person: no scan of {', '.join(unknown[:10])} in {reference.uri}; give ids of its subjects"
        )
    joined = subjects.replace({name: "=".join(group) for group in same_person for name in group})
    names, person = np.unique(joined.to_numpy(dtype=str), return_inverse=True)
    trained = (samples["split"] == "train").to_numpy()
    known = np.isin(person, person[trained])
    return People(
        person=person.astype(np.int64),
        names={number: str(name) for number, name in enumerate(names)},
        training=np.flatnonzero(trained),
        held_out=np.flatnonzero(~known & (samples["split"] == "validation").to_numpy()),
    )


def _check_enough(people: People, rate: float) -> None:
    """Raises UserError when the reference cannot calibrate the rate, or the attack, before anything is measured."""
    train, held = (len(people.one_scan_each(rows)) for rows in (people.training, people.held_out))
    if train < max(OTHERS + 2, _ATTACKED) or held < _ATTACKED:
        raise UserError(
            f"reference: an audit needs at least {_ATTACKED} people in training and {_ATTACKED} held out, not {train} and "
            f"{held}; prepare the cohort with a larger validation_fraction, and train on that"
        )
    scans = len(people.training) + len(people.held_out)
    null = Null(values=np.zeros(scans), seen=len(people.training), unseen=len(people.held_out), drift_p=1.0)
    try:
        null.flags_at(rate)
    except UserError as error:
        raise UserError(f"reference: {error}") from None
