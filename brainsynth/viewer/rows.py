"""Every row of a dataset whose fate is known now: of a finished one from its manifest, else from the commit records."""

from __future__ import annotations

import hashlib
from typing import Any

import pandas as pd

from brainsynth.errors import UserError
from brainsynth.manifest import DatasetManifest, SampleRecord
from brainsynth.plan import Plan
from brainsynth.reading.dataset import open_dataset
from brainsynth.records import unseal
from brainsynth.storage.commit import committed_of, read_commits, read_plan, read_samples
from brainsynth.storage.filesystem import Store, open_store
from brainsynth.storage.finalise import DATASET_KEY, SUBJECTS_KEY
from brainsynth.storage.measured import FOLDER, is_measured
from brainsynth.storage.tables import stored_table

_KEPT = ("status", "reason", "mean", "std")


class Rows:
    """The rows of a dataset, read again when there is something new to read. Not for several threads at once."""

    def __init__(self, uri: str, measured: str | bool = True) -> None:
        """
        Args:
            uri: the dataset's root folder; `resolve_uri` has seen it.
            measured: which table of measured values, by the start of its digest; True takes the only one.

        Raises:
            UserError: there is no dataset of volumes, or the table that is named.
        """
        self.store: Store = open_store(uri)
        self.plan: Plan = read_plan(self.store)
        if not self.plan.holds_volumes:
            raise UserError(f"{uri} holds {self.plan.kind}, not volumes: there is nothing to view")
        self.measured = measured
        self.finished = False
        self.measured_by = ""
        """Who measured the `measured_…` columns; empty where nobody did."""
        self.note = ""
        """What a viewer should know, in a sentence; empty where there is nothing to say."""
        self.table = pd.DataFrame()
        """One line a row, by row number: sample_id, status, reason, covariates and what else is known."""
        self._seen: object = None
        self._samples: pd.DataFrame | None = None
        self._facts: dict[int, list[dict[str, Any]]] = {}
        """Shard → what its commit record says of each row, while the dataset is not finished."""
        self.refresh()

    def refresh(self) -> bool:
        """Look for what was committed since; True when `table` changed. Raises UserError when a record is damaged."""
        try:
            sealed = self.store.read(DATASET_KEY)
        except FileNotFoundError:
            return self._refresh_running()
        published = sorted(key for key, _ in self.store.list(FOLDER) if is_measured(key))
        seen = (hashlib.sha256(sealed).hexdigest(), published)
        if seen == self._seen:
            return False
        manifest = unseal(DatasetManifest, sealed, f"{self.store.uri}/{DATASET_KEY}")
        if manifest.plan_fingerprint != self.plan.fingerprint:
            raise UserError(f"{self.store.uri}/{DATASET_KEY} belongs to another plan; run the job that made it again")
        self.table = self._with_measured(_subjects(self.store, manifest), published)
        self.finished, self._seen = True, seen
        self._facts = {}
        return True

    def _refresh_running(self) -> bool:
        if isinstance(self.measured, str):
            raise UserError(f"{self.store.uri} is not finished: nothing was measured on it yet")
        there = committed_of(self.store, self.plan)
        if not self.finished and there == self._seen:
            return False
        if self._samples is None:
            self._samples = read_samples(self.store, self.plan)
        self._facts = {shard: facts for shard, facts in self._facts.items() if shard in there}
        commits = read_commits(self.store, self.plan, sorted(there - set(self._facts)))
        self._facts |= {commit.shard: [_facts(sample) for sample in commit.samples] for commit in commits}
        known = pd.DataFrame([facts for shard in sorted(self._facts) for facts in self._facts[shard]])
        if known.empty:
            known = pd.DataFrame(columns=["row", *_KEPT]).astype({"row": "int64"})
        self.table = self._gated(
            self._samples.join(known.set_index("row"), how="inner").rename_axis("row").reset_index()
        )
        self.finished, self._seen = False, there
        return True

    def _gated(self, table: pd.DataFrame) -> pd.DataFrame:
        self.measured_by = "the quality gate" if _measured(table) else ""
        return table

    def _with_measured(self, table: pd.DataFrame, published: list[str]) -> pd.DataFrame:
        """With what an evaluation published, where there is one such table or one is named; else what the gate measured."""
        self.note = ""
        if self.measured is True and len(published) != 1:
            if published:
                names = ", ".join(key.removeprefix("quality/measured-")[:12] for key in published)
                self.note = f"{len(published)} evaluations published what they measured: choose by --measured ({names})"
            return self._gated(table)
        try:
            measured = open_dataset(self.store.uri, measured=self.measured).table
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{error}; `brainsynth verify {self.store.uri}` says what is damaged") from None
        self.measured_by = "an evaluation"
        instead = table.drop(columns=_measured(table))
        return instead.merge(measured[["sample_id", *_measured(measured)]], how="left", on="sample_id")


def _facts(sample: SampleRecord) -> dict[str, Any]:
    return {"row": sample.row} | {name: getattr(sample, name) for name in _KEPT} | sample.extra


def _measured(table: pd.DataFrame) -> list[str]:
    return [str(name) for name in table if str(name).startswith("measured_")]


def _subjects(store: Store, manifest: DatasetManifest) -> pd.DataFrame:
    """manifest/subjects.parquet, checked. Raises UserError when it is damaged."""
    where = f"{store.uri}/{SUBJECTS_KEY}"
    try:
        data = store.read(SUBJECTS_KEY)
    except FileNotFoundError:
        raise UserError(f"{where} is missing; run the job that made the dataset again") from None
    try:
        if hashlib.sha256(data).hexdigest() != manifest.files.get(SUBJECTS_KEY):
            raise ValueError("its sha256 is not the one in dataset.json")
        return stored_table(data)
    except ValueError as error:
        raise UserError(f"{where} is damaged ({error}); run the job that made the dataset again") from None
