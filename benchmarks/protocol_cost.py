"""Cost of commits and digests: the same rows only sampled and decoded, and with everything that commits a shard.

    python -m benchmarks.protocol_cost

Shards alternate between the two in one process, so that both see the same machine. Writes its row of docs/reliability.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).parents[1]

from brainsynth.config.schema import CovariateSource, GenerateConfig, RuntimeConfig, SamplerConfig  # noqa: E402
from brainsynth.generate import VolumeGenerator  # noqa: E402
from brainsynth.planning import plan_generation  # noqa: E402
from brainsynth.storage.commit import write_plan  # noqa: E402
from brainsynth.storage.work import ShardRunner  # noqa: E402
from recipes.random_bundle import SMALL, make_random_bundle  # noqa: E402
from tests.chaos.ledger import Finding, Ledger  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_random_bundle(Path(folder, "bundle"), SMALL, (40, 48, 40))
        config = GenerateConfig(
            bundle=str(Path(folder, "bundle")),
            output=str(Path(folder, "data")),
            covariates=CovariateSource(draw=16 * arguments.shards),
            sampler=SamplerConfig(method="ab2", steps=8),
            samples_per_shard=16,
            runtime=RuntimeConfig(workers=0, micro_batch=4, threads_per_worker=1),
        )
        work = plan_generation(config)
        write_plan(work.store, work.plan, work.samples)
        runner = ShardRunner(work.root, work.build_maker, work.arguments)
        maker = runner.maker
        assert isinstance(maker, VolumeGenerator)
        ratios, bare_s, whole_s = [], [], []
        for index in range(work.plan.num_shards):
            shard = work.plan.shard(index)
            rows = work.samples.iloc[shard.start : shard.stop]
            began = time.perf_counter()
            for start in range(0, len(rows), 4):
                maker.volumes(rows.iloc[start : start + 4], {"sample_s": 0.0, "decode_s": 0.0})
            bare_s.append(time.perf_counter() - began)
            began = time.perf_counter()
            runner(shard)
            whole_s.append(time.perf_counter() - began)
            ratios.append(whole_s[-1] / bare_s[-1])
    ratio = sum(whole_s) / sum(bare_s)
    print(
        f"{len(ratios)} shards of 16 volumes of 40×48×40: {statistics.median(bare_s):.2f} s sampled and decoded only, "
        f"{statistics.median(whole_s):.2f} s with voxel digests, encoding, notes, object and record; "
        f"{100 * (ratio - 1):+.1f} % in all (median of pairs {100 * (statistics.median(ratios) - 1):+.1f} %)"
    )
    ledger = Ledger(keep=True)
    ledger.record(
        Finding(
            "cheap protocol",
            "none: with and without commits and digests, side by side",
            len(ratios),
            f"{100 * (ratio - 1):+.1f} % of wall time (median of pairs {100 * (statistics.median(ratios) - 1):+.1f} %), "
            "shards of 16 volumes at 4 mm on one core",
            "≤ 5 % of generation wall time",
        )
    )
    ledger.write()


if __name__ == "__main__":
    main()
