"""Make a dataset from its plan: write the plan, run what is missing, finalise. The same call again resumes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator

from brainsynth.config.schema import RuntimeConfig
from brainsynth.errors import UserError
from brainsynth.executors import local
from brainsynth.executors.preflight import resource_table
from brainsynth.executors.waiting import Waiting
from brainsynth.executors.watch import Watch
from brainsynth.manifest import DatasetManifest
from brainsynth.plan import ShardSpec
from brainsynth.progress import in_minutes
from brainsynth.storage.commit import check_plan, write_plan
from brainsynth.storage.finalise import finalise
from brainsynth.storage.work import ShardResult, Work

log = logging.getLogger(__name__)
HOPELESS_SHARDS = 3
"""When this many shards hold nothing but failed rows, the cause is not in the rows: the run stops."""


def dry_run(work: Work, runtime: RuntimeConfig) -> str:
    """What would be made, in a few lines; checks the output folder and writes nothing."""
    plan = work.plan
    exists = check_plan(work.store, plan)
    done = plan.num_shards - len(work.missing()) if exists else 0
    lines = [
        f"plan {plan.fingerprint[:12]} ({plan.kind}) → {work.root}",
        f"{plan.num_samples} rows in {plan.num_shards} shards of {plan.samples_per_shard}, {done} already committed",
        f"{plan.raw_bytes() / 1e9:.3f} GB before compression",
        f"{runtime.workers} workers, micro-batch {runtime.micro_batch}",
    ]
    return "\n".join([*lines, *([work.preview] if work.preview else [])])


def make_dataset(work: Work, runtime: RuntimeConfig) -> DatasetManifest:
    """Make every shard that has no commit record, then compile the manifest."""
    write_plan(work.store, work.plan, work.samples)
    missing = work.missing()
    done = work.plan.num_shards - len(missing)
    if done:
        log.info("resuming: %d of %d shards are committed", done, work.plan.num_shards)
    if missing:
        to_do = sum(shard.stop - shard.start for shard in missing)
        wait = "" if runtime.workers == 0 else f"; first Ray and {runtime.workers} workers start, which takes a while"
        log.info("making %d volumes in %d shards: %s%s", to_do, len(missing), work.root, wait)
        with Watch(runtime.stall_timeout_s, resource_table) as watch:
            results = _runner(runtime)(work, missing, runtime, watch)
            with Waiting(work.store, [shard.index for shard in missing], runtime.progress_every_s) as waiting:
                _follow(results, work, to_do, runtime, watch, waiting)
    manifest = finalise(work.store, work.plan)
    log.info(
        "finished %s: %d ok + %d rejected + %d failed = %d planned",
        work.root,
        manifest.num_ok,
        manifest.num_rejected,
        manifest.num_failed,
        manifest.num_samples,
    )
    return manifest


def _runner(runtime: RuntimeConfig) -> Callable[[Work, list[ShardSpec], RuntimeConfig, Watch], Iterator[ShardResult]]:
    if runtime.workers == 0:
        return local.run
    from brainsynth.executors import ray_data  # and with it Ray

    return ray_data.run


def _follow(
    results: Iterable[ShardResult], work: Work, to_do: int, runtime: RuntimeConfig, watch: Watch, waiting: Waiting
) -> None:
    """One progress line every few seconds."""
    began = shown = time.monotonic()
    done = rejected = failed = written = 0
    for shards, result in enumerate(results, start=1):
        watch.progress()
        waiting.came(result.shard, result.make_s + result.commit_s)
        done += result.ok + result.rejected + result.failed
        rejected, failed, written = rejected + result.rejected, failed + result.failed, written + result.size_bytes
        if failed == done and (shards == HOPELESS_SHARDS or done == to_do):
            raise UserError(
                f"every row so far failed, the last with: {result.reason}; fix the cause, then re-plan them with "
                f"`brainsynth verify {work.root} --repair --failed` and run the same command again"
            )
        now = time.monotonic()
        if now - shown >= runtime.progress_every_s or done == to_do:
            shown = now
            rate = done / max(now - began, 1e-9)
            left_s = (to_do - done) / max(rate, 1e-9)
            log.info(
                "%d/%d volumes  %.2f volumes/s  ETA %s  %d workers  %d rejected  %d failed  %.1f MB",
                work.plan.num_samples - to_do + done,
                work.plan.num_samples,
                rate,
                in_minutes(left_s),
                runtime.workers,
                rejected,
                failed,
                written / 1e6,
            )
