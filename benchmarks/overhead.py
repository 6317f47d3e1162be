"""Overhead of generation through Ray next to sampling and decoding, and device utilisation. Writes results/overhead.json.

    python -m benchmarks.overhead                   # about ten minutes on two cores
    python -m benchmarks.overhead --part device     # only the stand-in for a fast device

Part `ray`: the same plan (random weights, the networks of configs/ixi-4mm) through a bare sampling loop in this process,
through two of them in two processes, and through the real executors (one process; Ray with 1, 2 and 4 actors), in turn,
one thread each. All figures come from the commit records; actors also report their CPU seconds, which say more than wall
time on a shared machine. Busy share: seconds inside sampling and decoding over the seconds between an actor's first and
last shard.

Part `fast`: what a GPU of 35 volumes a second at 1 mm leaves to the CPU: CPU seconds a volume by codec and with a gate,
and what the device waits for (20 ms samples of the states of the actor's threads). Ray believes that there is a GPU, so
the actor is the one of a GPU; `--scan` takes a real scan.

Part `device`: volumes of the paper's size on a stand-in for a device, a sleep of fixed length per volume. Everything else
(copy, quantising, digests, encoding, writes, commits, Ray) is real, so one sees whether it keeps up. `serial` finishes each
shard before the next one begins, as generation used to. Two such devices share only this machine's cores and Ray: their
rate against one is the scaling. benchmarks/h200.py measures a real GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import ray
import torch

REPO = Path(__file__).parents[1]

from benchmarks.rounding import rounded  # noqa: E402
from benchmarks.timed_shards import StandInActor, StandInShards, TimedShards, add_gate, head, waiting  # noqa: E402
from brainsynth.config.gate import GateConfig  # noqa: E402
from brainsynth.config.schema import CovariateSource, GenerateConfig, RuntimeConfig, SamplerConfig  # noqa: E402
from brainsynth.config.training import Precision  # noqa: E402
from brainsynth.executors import local, ray_data  # noqa: E402
from brainsynth.executors.preflight import resource_table  # noqa: E402
from brainsynth.executors.session import _private_token, ray_session  # noqa: E402
from brainsynth.executors.watch import Watch  # noqa: E402
from brainsynth.generate import VolumeGenerator  # noqa: E402
from brainsynth.planning import plan_generation  # noqa: E402
from brainsynth.storage.commit import read_commit, write_plan  # noqa: E402
from brainsynth.storage.finalise import finalise  # noqa: E402
from brainsynth.storage.work import Work  # noqa: E402
from brainsynth.volume import StoredCodec  # noqa: E402
from recipes.random_bundle import SMALL, TINY, Size, make_random_bundle  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Load:
    """What is to be made."""

    shape_xyz: tuple[int, int, int]
    size: Size
    per_shard: int
    shards: int
    steps: int
    micro_batch: int = 4
    use_gpu: bool = False
    threads: int = 1
    precision: Precision = "float32"
    codec: StoredCodec = "zstd-3"
    gated: bool = False


def config(load: Load, bundle: Path, output: Path, actors: int) -> GenerateConfig:
    """A generation of this load."""
    runtime = RuntimeConfig(
        workers=actors,
        micro_batch=load.micro_batch,
        threads_per_worker=load.threads,
        cpus_per_worker=0.5,
        gpus_per_worker=float(load.use_gpu),
    )
    return GenerateConfig(
        bundle=str(bundle),
        output=str(output),
        covariates=CovariateSource(draw=load.per_shard * load.shards),
        sampler=SamplerConfig(method="ab2", steps=load.steps),
        precision=load.precision,
        stored_codec=load.codec,
        gate=GateConfig(max_attempts=1) if load.gated else None,
        samples_per_shard=load.per_shard,
        runtime=runtime,
    )


def bare(work: Work, ready: Callable[[], object] = lambda: None) -> dict[str, float]:
    """The sampling loop and nothing else, timed from `ready` on: rows, seeds and micro-batches are the plan's."""
    maker: VolumeGenerator = work.build_maker(**work.arguments)  # type: ignore[assignment]
    size, seconds = maker.settings.micro_batch, {"sample_s": 0.0, "decode_s": 0.0}
    maker.volumes(work.samples.iloc[:size], dict(seconds))  # warms up
    ready()
    began, cpu = time.monotonic(), time.process_time()
    for index in range(work.plan.num_shards):
        shard = work.plan.shard(index)
        for start in range(shard.start, shard.stop, size):
            maker.volumes(work.samples.iloc[start : min(start + size, shard.stop)], seconds)
    wall = time.monotonic() - began
    return {
        "wall_s": wall,
        "cpu_s": time.process_time() - cpu,
        "device_s": seconds["sample_s"] + seconds["decode_s"],
        "shards_per_s": work.plan.num_shards / wall,
    }


def _bare_process(load: Load, bundle: Path, output: Path, barrier: Any, found: Any) -> None:
    work, _ = prepared(load, bundle, output, 0, TimedShards)
    found.put(bare(work, barrier.wait))


def two_bare(load: Load, bundle: Path, output: Path) -> dict[str, float]:
    """Two such loops at once, each in a process of its own: what two cores of this machine give without Ray."""
    spawn = multiprocessing.get_context("spawn")
    barrier, found = spawn.Barrier(2), spawn.Queue()
    both = [spawn.Process(target=_bare_process, args=(load, bundle, output / str(i), barrier, found)) for i in range(2)]
    for process in both:
        process.start()
    one, other = found.get(), found.get()
    for process in both:
        process.join()
    return {key: one[key] + other[key] if key == "shards_per_s" else (one[key] + other[key]) / 2 for key in one}


@contextlib.contextmanager
def session(gpus: int = 0) -> Iterator[float]:
    """A Ray session for all runs; yields the seconds that its start took. `gpus`: that Ray believes to have."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])  # for the actors
    began = time.monotonic()
    if gpus:
        _private_token()
        ray.init(address="local", num_gpus=gpus, num_cpus=2, logging_level="WARNING", dashboard_host="127.0.0.1")
        os.environ["RAY_ADDRESS"] = "auto"  # as on a cluster: this process need not have what its workers have
    with ray_session():
        yield time.monotonic() - began
    if gpus:
        ray.shutdown()


def executed(work: Work, runtime: RuntimeConfig) -> dict[str, float]:
    """The generation's own executor (with 0 actors in this process); where the seconds of its actors went."""
    began_at = time.time()
    run = ray_data.run if runtime.workers else local.run
    with Watch(0, resource_table) as watch:
        results = list(run(work, work.missing(), runtime, watch))
        ended_at = time.time()
    began = time.monotonic()
    finalise(work.store, work.plan)
    finalise_s = time.monotonic() - began
    records = [read_commit(work.store, work.plan, index).runtime for index in range(work.plan.num_shards)]
    return {
        **shares(records),  # type: ignore[arg-type]
        "start_s": min(float(r["began_at"]) for r in records) - began_at,
        "end_s": ended_at - max(float(r["began_at"]) + float(r["make_s"]) for r in records),
        "commit_s_per_shard": statistics.mean(result.commit_s for result in results),
        "finalise_s": finalise_s,
        "wall_s": ended_at - began_at,
    }


def shares(records: list[dict[str, float]]) -> dict[str, float]:
    """Busy share of the devices in steady state, and what the rest is, from the commit records of a run.

    The first shard of each actor is left out where there are others: it warms up.
    """
    actors: dict[Any, list[dict[str, float]]] = defaultdict(list)
    for one in sorted(records, key=lambda r: r["began_at"]):
        actors[one["host"], one["pid"]].append(one)
    span = device = made = finish = cpu = rate = 0.0
    shards = 0
    for mine in actors.values():
        first, steady = mine[0], mine[1:] or mine
        began = first["began_at"] + (first["make_s"] if mine[1:] else 0.0)
        cpu -= first.get("process_cpu_s" if mine[1:] else "process_cpu_before_s", 0.0)
        cpu += steady[-1].get("process_cpu_s", 0.0)
        lasted = steady[-1]["began_at"] + steady[-1]["make_s"] - began
        span, rate = span + lasted, rate + len(steady) / lasted
        device += sum(r["sample_s"] + r["decode_s"] for r in steady)
        made += sum(r["make_s"] for r in steady)
        finish += sum(r["finish_s"] for r in steady)
        shards += len(steady)
    return {
        "actors": len(actors),
        "busy_share": device / span,
        "shards_per_s": rate,
        "between_shards_share": (span - made) / span,
        "in_make_beside_device_share": (made - device) / span,
        "device_s_per_shard": device / shards,
        "finish_s_per_shard": finish / shards,
        "cpu_s_per_shard": cpu / shards,
        "make_cpu_s_per_shard": statistics.mean(r.get("make_cpu_s", 0.0) for r in records),
    }


def prepared(
    load: Load, bundle: Path, output: Path, actors: int, maker: Callable[..., Any], **more: Any
) -> tuple[Work, RuntimeConfig]:
    """A planned dataset and its runtime."""
    made = config(load, bundle, output, actors)
    work = plan_generation(made)
    work.build_maker, work.arguments = maker, {**work.arguments, **more}
    write_plan(work.store, work.plan, work.samples)
    return work, made.runtime


def ray_part(load: Load, actors: tuple[int, ...], rounds: int, root: Path) -> dict[str, Any]:
    """Bare loop and Ray in turn; medians over the rounds."""
    bundle = root / "bundle"
    make_random_bundle(bundle, load.size, load.shape_xyz)

    def through(actors: int) -> Callable[[Path], dict[str, float]]:
        return lambda output: executed(*prepared(load, bundle, output, actors, TimedShards))

    bares: dict[str, Callable[[Path], dict[str, float]]] = {
        "bare loop": lambda output: bare(prepared(load, bundle, output, 0, TimedShards)[0]),
        "two bare loops": lambda output: two_bare(load, bundle, output),
    }
    executors = {"one process": through(0)} | {f"Ray, {n} actors": through(n) for n in actors}
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for number in range(rounds):
        for name, run in (bares | executors).items():
            found[name].append(run(root / f"{name}-{number}"))
            print(name, found[name][-1], flush=True)
    result: dict[str, Any] = {name: medians(runs) | {"all": runs} for name, runs in found.items()}
    base = result["bare loop"]["cpu_s"] / load.shards
    for name in executors:
        entry = result[name]
        entry["cpu_against_bare"] = entry["cpu_s_per_shard"] / base
        entry["outside_device_share"] = 1 - entry["busy_share"]
        entry["rate_against_one"] = entry["shards_per_s"] / result[f"Ray, {actors[0]} actors"]["shards_per_s"]
    two = result["two bare loops"]
    two["rate_against_one"] = two["shards_per_s"] / result["bare loop"]["shards_per_s"]
    return {"load": described(load), "rounds": rounds, **result}


def device_part(load: Load, seconds: tuple[float, ...], root: Path) -> list[dict[str, Any]]:
    """The stand-in device at several speeds: one that finishes shards during or before the next, and two of them."""
    make_random_bundle(root / "device-bundle", load.size, load.shape_xyz)
    table = []
    for device_s in seconds:
        for devices, serial in ((1, True), (1, False), (2, False)):
            output = root / f"device-{device_s:g}-{devices}-{serial}"
            more = {"device_s": device_s, "serial": serial}
            work, runtime = prepared(load, root / "device-bundle", output, devices, StandInShards, **more)
            entry = {"devices": devices, **more, **executed(work, runtime)}
            entry["cpu_s_per_volume"] = entry["cpu_s_per_shard"] / load.per_shard
            table.append(entry)
            print(entry, flush=True)
            shutil.rmtree(output)
        table[-1]["rate_against_one"] = table[-1]["shards_per_s"] / table[-2]["shards_per_s"]
    return table


def fast_part(volumes: int, volumes_per_s: float, scan: str, root: Path) -> list[dict[str, Any]]:
    """One stand-in for a GPU at 1 mm, two cores: codecs, and a gate. What it costs, and what the device waits for."""
    shape, bundle = (160, 224, 160), root / "fast-bundle"
    make_random_bundle(bundle, TINY, shape, spacing_mm=1.0)
    add_gate(bundle, head(shape, scan))
    plain = Load(shape, TINY, 8, volumes // 8, 1, use_gpu=True, threads=2)
    table = []
    for load in (
        plain,
        dataclasses.replace(plain, codec="zstd-1"),
        dataclasses.replace(plain, codec="lz4"),
        dataclasses.replace(plain, gated=True),
    ):
        output = root / f"fast-{load.codec}-{load.gated}"
        more = {"device_s": 1 / volumes_per_s, "serial": False, "scan": scan, "watch": str(root / "watch")}
        work, runtime = prepared(load, bundle, output, 1, StandInShards, **more)
        with mock.patch.object(ray_data, "_Actor", StandInActor):
            entry = {"codec": load.codec, "gate": load.gated, **executed(work, runtime), **waiting(more["watch"], 2)}
        entry["cpu_s_per_volume"] = entry["cpu_s_per_shard"] / load.per_shard
        stored = sum(path.stat().st_size for path in (output / "dataset.zarr" / "t1w").rglob("*") if path.is_file())
        table.append({**entry, "stored_mb_per_volume": stored / 1e6 / work.plan.num_samples})
        print(rounded(table[-1]), flush=True)
        shutil.rmtree(output)
    return table


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure the median over rounds."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def described(load: Load) -> dict[str, Any]:
    """A load in the words of the config."""
    facts = {"shape_xyz": load.shape_xyz, "samples_per_shard": load.per_shard, "shards": load.shards}
    return {**facts, "sampler": f"ab2, {load.steps} steps", "micro_batch": load.micro_batch, "threads": load.threads}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("ray", "device", "fast", "all"), default="all")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--per-shard", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--device-s", type=float, nargs="+", default=[1.0, 0.3, 0.1])
    parser.add_argument("--volumes", type=int, default=64, help="of each row of part `fast`")
    parser.add_argument("--rate", type=float, default=35.0, help="volumes a second of its device")
    parser.add_argument("--scan", default="", help="a real T1w scan of 1 mm for part `fast`, NIfTI")
    parser.add_argument("--out", type=Path, default=REPO / "benchmarks" / "results" / "overhead.json")
    arguments = parser.parse_args()
    found: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    found |= {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    root = Path(tempfile.mkdtemp())
    try:
        if arguments.part in ("fast", "all"):
            with session(gpus=1):
                found["fast"] = fast_part(arguments.volumes, arguments.rate, arguments.scan, root)
            del os.environ["RAY_ADDRESS"]
        with session() as started_s:
            found["ray_starts_s"] = started_s
            if arguments.part in ("ray", "all"):
                load = Load((40, 56, 40), SMALL, arguments.per_shard, arguments.shards, arguments.steps)
                found["ray"] = ray_part(load, tuple(arguments.actors), arguments.rounds, root)
                arguments.out.write_text(json.dumps(rounded(found), indent=1) + "\n")
            if arguments.part in ("device", "all"):
                load = Load((160, 224, 160), TINY, 8, 8, 1)
                found["device"] = device_part(load, tuple(arguments.device_s), root)
    finally:
        shutil.rmtree(root)
    arguments.out.write_text(json.dumps(rounded(found), indent=1) + "\n")


if __name__ == "__main__":
    main()
