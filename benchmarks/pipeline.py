"""What Ray and the commit protocol cost: the same plan through a bare loop, one process with commits, and Ray actors.

    python benchmarks/pipeline.py --bundle demo-output/bundle

Run after `make demo`. Prints seconds side by side, measured in one run; ratios are what counts.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from brainsynth.config.schema import CovariateSource, GenerateConfig, RuntimeConfig, SamplerConfig
from brainsynth.executors.dataset import make_dataset
from brainsynth.executors.session import ray_session
from brainsynth.generate import plan_generation
from brainsynth.storage.commit import write_plan


def config(bundle: str, output: Path, rows: int, workers: int) -> GenerateConfig:
    return GenerateConfig(
        bundle=bundle,
        output=str(output),
        covariates=CovariateSource(draw=rows),
        sampler=SamplerConfig(method="ab2", steps=20),
        samples_per_shard=16,
        runtime=RuntimeConfig(workers=workers, micro_batch=4, threads_per_worker=1),
    )


def bare_loop(made: GenerateConfig) -> float:
    work = plan_generation(made)
    write_plan(work.store, work.plan, work.samples)
    maker = work.build_maker(**work.arguments)
    began = time.monotonic()
    for index in range(work.plan.num_shards):
        maker.make(work.plan.shard(index))
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", default="demo-output/bundle")
    parser.add_argument("--rows", type=int, default=192)
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    seconds: dict[str, float] = {}
    try:
        seconds["bare loop, nothing stored"] = bare_loop(config(arguments.bundle, root / "bare", arguments.rows, 0))
        for name, workers in (("one process, committed", 0), ("Ray, 1 actor", 1), ("Ray, 2 actors", 2)):
            made = config(arguments.bundle, root / name.replace(" ", "-"), arguments.rows, workers)
            work = plan_generation(made)
            with ray_session():
                began = time.monotonic()
                make_dataset(work, made.runtime)
                seconds[name] = time.monotonic() - began
    finally:
        shutil.rmtree(root)
    bare = seconds["bare loop, nothing stored"]
    print(f"\n| {arguments.rows} volumes, 1 thread a worker | seconds | against the bare loop |\n| --- | --- | --- |")
    for name, value in seconds.items():
        print(f"| {name} | {value:.1f} | {value / bare:.2f} |")


if __name__ == "__main__":
    main()
