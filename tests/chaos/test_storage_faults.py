"""A store that fails three requests of ten: nothing is lost, nothing is made twice, nothing is another's."""

from __future__ import annotations

import collections
import dataclasses
import statistics
import threading
import time
from collections.abc import Callable

import pytest

from brainsynth.manifest import ShardManifest
from brainsynth.plan import Plan
from brainsynth.storage.commit import read_commit, write_plan
from brainsynth.storage.filesystem import ObjectStore, Store, open_store
from brainsynth.storage.finalise import finalise
from brainsynth.storage.verify import verify_dataset
from tests.chaos.ledger import Finding, Ledger
from tests.chaos.test_generation_faults import PAIR, named
from tests.servers.fault_proxy import KINDS, MIX, FaultProxy
from tests.servers.fixtures import fault_proxy, faulty, s3_root, swift
from tests.storage.conftest import commit, mismatched, tiny_plan

__all__ = ["fault_proxy", "faulty", "s3_root", "swift"]

RATE = 0.3
PROMISE = "storage errors are harmless"
Size = Callable[[int, int], int]


@dataclasses.dataclass
class Run:
    """A dataset that two writers made at the same time."""

    seconds: float
    digest: str
    told: list[list[ShardManifest]]
    """What each writer was told of every shard."""


@dataclasses.dataclass
class Judgement:
    """What is wrong with a dataset, whichever way it came about."""

    lost: int
    duplicated: int
    wrong: int

    @property
    def clean(self) -> bool:
        """Nothing lost, duplicated or wrong."""
        return (self.lost, self.duplicated, self.wrong) == (0, 0, 0)


def race(open_one: Callable[[], Store], shards: int, noises: tuple[int, int] = (0, 0), labels: bool = False) -> Run:
    """Two writers that are both given every shard; the faster one finishes the dataset."""
    plan, samples = tiny_plan(rows=2 * shards, samples_per_shard=2, labels=labels)
    barrier = threading.Barrier(2, timeout=60)
    told: dict[int, list[ShardManifest]] = {}
    failures: list[BaseException] = []

    def write(writer: int) -> None:
        try:
            store = open_one()
            barrier.wait()
            told[writer] = [commit(store, plan, samples, i, noise=noises[writer]) for i in range(shards)]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(writer,), daemon=True) for writer in range(2)]
    start = time.monotonic()
    write_plan(open_one(), plan, samples)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=500)
        assert not thread.is_alive(), "a writer hangs"
    if failures:
        raise failures[0]
    manifest = finalise(open_one(), plan)
    return Run(time.monotonic() - start, manifest.shards_digest, [told[0], told[1]])


def judge(store: Store, plan: Plan, run: Run, digest: str | None) -> Judgement:
    """Compare records, objects and what the writers believed; `digest` is that of an undisturbed run."""
    stored = [read_commit(store, plan, index) for index in range(plan.num_shards)]
    made = collections.Counter(
        sample.sample_id for record in stored for sample in record.samples if sample.status == "ok"
    )
    report = verify_dataset(store)
    believed = sum(record != told for writer in run.told for record, told in zip(stored, writer, strict=True))
    return Judgement(
        lost=plan.num_samples - len(made),
        duplicated=sum(made.values()) - len(made) + sum(p.kind == "unexpected" for p in report.problems),
        wrong=believed
        + sum(p.kind != "unexpected" for p in report.problems)
        + (digest not in (None, run.digest))
        + (len(mismatched(store)) if plan.labels is not None and digest is not None else 0),
    )


def disturbed(
    proxy: FaultProxy, root: str, rates: dict[str, float], shards: int, digest: str | None, labels: bool = False
) -> tuple[Run, Judgement]:
    """One race through the proxy, judged without it; fails when nothing was broken."""
    proxy.reset(rates)
    try:
        run = race(lambda: open_store(root), shards, (0, 0) if digest else (1, 2), labels)
        met = proxy.counts()
        assert set(met) <= set(rates)
        assert not rates or sum(met.values()) >= 0.5 * sum(rates.values()) * len(proxy.requests) > 0
    finally:
        proxy.reset()
    plan, _ = tiny_plan(rows=2 * shards, samples_per_shard=2, labels=labels)
    return run, judge(open_store(root), plan, run, digest)


def undisturbed_digest(shards: int, labels: bool = False) -> str:
    """What the same plan gives in memory, by one writer."""
    store = ObjectStore("memory:///")
    plan, samples = tiny_plan(rows=2 * shards, samples_per_shard=2, labels=labels)
    write_plan(store, plan, samples)
    for index in range(shards):
        commit(store, plan, samples, index)
    return finalise(store, plan).shards_digest


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_fault(faulty: FaultProxy, s3_root: str, ledger: Ledger, size: Size, kind: str) -> None:
    shards = size(4, 30)
    run, judgement = disturbed(faulty, s3_root, {kind: RATE}, shards, undisturbed_digest(shards))
    ledger.record(
        Finding(
            promise=PROMISE,
            fault=f"30 % of requests: {FAULTS[kind]}; 2 racing writers",
            tries=2 * shards,
            figure=f"{shards} shards in {run.seconds:.0f} s, digest as undisturbed",
            target="0 lost, 0 duplicated, equal digests",
            lost=judgement.lost,
            duplicated=judgement.duplicated,
            wrong=judgement.wrong,
        )
    )
    assert judgement.clean, judgement


FAULTS = {
    "error": "500 or 503",
    "reset": "connection reset",
    "slow": "answer 0.1 s late",
    "lost": "carried out, answer lost",
    "cut": "carried out, answer cut off",
}


@PAIR
def test_all_kinds_at_once(faulty: FaultProxy, s3_root: str, ledger: Ledger, size: Size, labels: bool) -> None:
    shards, pairs = size(10, 30), size(1, 5)
    digest = undisturbed_digest(shards, labels)
    calm: list[float] = []
    stormy: list[float] = []
    total = Judgement(0, 0, 0)
    for pair in range(pairs):  # side by side, so that a busy machine disturbs both alike
        for rates, seconds in (({}, calm), (MIX, stormy)):
            run, found = disturbed(faulty, f"{s3_root}/{pair}-{len(rates)}", rates, shards, digest, labels)
            seconds.append(run.seconds)
            total = Judgement(total.lost + found.lost, total.duplicated + found.duplicated, total.wrong + found.wrong)
    ratio = statistics.median(stormy) / statistics.median(calm)
    ledger.record(
        Finding(
            promise=PROMISE,
            fault=named("30 % of requests, all kinds mixed; 2 racing writers", labels),
            tries=pairs * shards,
            figure=f"{ratio:.2f} times the wall time without faults ({statistics.median(calm):.1f} s)",
            target="0 lost, 0 duplicated, at most 2 times the wall time",
            lost=total.lost,
            duplicated=total.duplicated,
            wrong=total.wrong,
        )
    )
    assert total.clean, total
    assert pairs == 1 or ratio <= 2.0, "a time is judged on five pairs of runs (make chaos), not on one"


@PAIR
def test_writers_that_round_differently_agree_on_the_first(
    faulty: FaultProxy, s3_root: str, ledger: Ledger, size: Size, labels: bool
) -> None:
    shards = size(6, 40)
    _, judgement = disturbed(faulty, s3_root, MIX, shards, digest=None, labels=labels)
    ledger.record(
        Finding(
            promise="the first committer wins",
            fault=named("30 % of requests, all kinds mixed; 2 racing writers with different voxels", labels),
            tries=shards,
            figure="both writers hold the stored record of every shard",
            target="0 lost, 0 duplicated, 0 wrong",
            lost=judgement.lost,
            duplicated=judgement.duplicated,
            wrong=judgement.wrong,
        )
    )
    assert judgement.clean, judgement


class Overwriting(ObjectStore):
    """A store without put-if-absent: what the promises do not hold on."""

    def write_new(self, key: str, data: bytes) -> bool:
        self.write(key, data)
        return True


def test_the_judgement_sees_what_it_is_there_to_see() -> None:
    shards, store = 4, Overwriting("memory:///")
    plan, _ = tiny_plan(rows=2 * shards, samples_per_shard=2)
    run = race(lambda: store, shards, (1, 2))
    assert judge(store, plan, run, None).wrong > 0
    assert judge(store, plan, run, undisturbed_digest(shards)).wrong > judge(store, plan, run, None).wrong
    key = read_commit(store, plan, 1).objects[0].key
    store.delete(key)
    store.write("dataset.zarr/t1w/c/99/0/0/0", b"stray")
    found = judge(store, plan, run, None)
    assert found.duplicated == 1
    assert found.wrong >= 1
