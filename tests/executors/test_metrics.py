"""What Ray's own endpoint says of a run is what its manifest says."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from brainsynth.config.schema import GenerateConfig, RuntimeConfig
from brainsynth.executors.dataset import make_dataset
from brainsynth.executors.metrics import BYTES, STAGE_SECONDS, STAGES, VOLUMES, VOLUMES_LEFT, stage_seconds
from brainsynth.manifest import SampleRecord
from brainsynth.plan import ShardSpec
from brainsynth.planning import plan_generation
from brainsynth.storage.commit import read_commit
from brainsynth.storage.work import ShardOutput, Work
from tests.chaos.noise import NoiseShards, noise_work
from tests.line import Line, as_config

TIMEOUT_S = 60.0


class SomeBadRows(NoiseShards):
    """Row 3 cannot be made, and row 5 is refused."""

    def make(self, shard: ShardSpec) -> ShardOutput:
        if shard.start <= 3 < shard.stop:
            raise ValueError("a poison row")
        made = super().make(shard)
        if not shard.start <= 5 < shard.stop:
            return made
        samples = list(made.samples)
        refused = SampleRecord(sample_id=samples[5 - shard.start].sample_id, row=5, status="rejected", reason="a test")
        samples[5 - shard.start] = refused
        return ShardOutput(made.arrays, samples, {"gate_s": 0.25})


def scrape() -> list[Sample]:
    """What every node exports now."""
    import ray

    samples = []
    for node in ray.nodes():
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(address, timeout=10) as answer:
            for family in text_string_to_metric_families(answer.read().decode()):
                samples += family.samples
    return samples


def exported(root: str, name: str, label: str = "kind") -> dict[str, float]:
    """The sum over all workers, by one label."""
    sums: dict[str, float] = {}
    for sample in scrape():
        if sample.name == f"ray_{name}" and sample.labels["dataset"] == root:
            sums[sample.labels[label]] = sums.get(sample.labels[label], 0.0) + sample.value
    return sums


def arrives(value: Callable[[], object], expected: object) -> None:
    """Workers report every few seconds."""
    end = time.monotonic() + TIMEOUT_S
    while (found := value()) != expected and time.monotonic() < end:
        time.sleep(1)
    assert found == expected


def check(work: Work, outcomes: dict[str, float]) -> None:
    """What is exported of a finished work is what its commit records say."""
    root, kind = work.root, work.plan.kind
    commits = [read_commit(work.store, work.plan, shard) for shard in range(work.plan.num_shards)]
    arrives(lambda: exported(root, VOLUMES_LEFT), {kind: 0.0})  # first: Ray drops it after a while
    arrives(lambda: exported(root, VOLUMES, "outcome"), outcomes)
    arrives(lambda: exported(root, BYTES), {kind: sum(o.size_bytes for c in commits for o in c.objects)})
    spent: dict[str, float] = {}
    for commit in commits:
        for stage, seconds in stage_seconds(commit.runtime).items():
            spent[stage] = spent.get(stage, 0.0) + seconds
    arrives(lambda: set(exported(root, STAGE_SECONDS, "stage")), set(spent))
    arrives(lambda: exported(root, STAGE_SECONDS, "stage"), pytest.approx(spent))
    assert set(spent) <= set(STAGES)


@pytest.mark.slow
def test_a_generation(line: Line, ray_cluster: None, tmp_path: Path) -> None:
    runtime = {"workers": 2, "micro_batch": 2}
    config = as_config(line.generate(tmp_path / "data", runtime=runtime), GenerateConfig, tmp_path)
    work = plan_generation(config)
    manifest = make_dataset(work, config.runtime)
    assert manifest.num_ok == 12
    check(work, {"ok": 12.0})
    assert {"sample", "decode", "finish", "encode", "write"} <= set(exported(work.root, STAGE_SECONDS, "stage"))


@pytest.mark.slow
def test_rejected_and_failed_rows_are_counted_as_what_they_are(ray_cluster: None, tmp_path: Path) -> None:
    work = noise_work(str(tmp_path / "data"), 8, 2, 0.01, str(tmp_path / "diary"))
    work.build_maker = SomeBadRows
    manifest = make_dataset(work, RuntimeConfig(workers=2))
    assert (manifest.num_ok, manifest.num_rejected, manifest.num_failed) == (6, 1, 1)
    check(work, {"ok": 6.0, "rejected": 1.0, "failed": 1.0})


def test_stages_add_up_to_the_time_that_a_shard_took() -> None:
    runtime: dict[str, str | int | float] = {"make_s": 10.0, "sample_s": 6.0, "decode_s": 2.0, "gate_s": 1.5}
    runtime |= {"finish_s": 0.5, "encode_s": 1.0, "write_s": 2.0, "host": "x"}
    seconds = stage_seconds(runtime)
    assert seconds["other"] == pytest.approx(0.5)
    assert sum(seconds.values()) == pytest.approx(10.0 + 0.5 + 1.0 + 2.0)
    assert stage_seconds({}) == {}
