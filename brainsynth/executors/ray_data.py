"""Ray Data as a scheduler: one row in is a shard to make, one row out says that it is committed. No voxel crosses it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from brainsynth.config.schema import RuntimeConfig
from brainsynth.errors import UserError, WorkerBroken
from brainsynth.executors.metrics import ShardMetrics, VolumesLeft, labels_of
from brainsynth.executors.preflight import check_cluster, check_gpu, check_this_machine, cpus_of_worker
from brainsynth.executors.session import ray_session
from brainsynth.executors.watch import StackAlarm, Watch
from brainsynth.models.cpus import reserve
from brainsynth.plan import ShardSpec
from brainsynth.records import to_dict
from brainsynth.storage.work import ShardMaker, ShardResult, ShardRunner, Work

if TYPE_CHECKING:
    import ray.data

log = logging.getLogger(__name__)
BROKEN = 70
_REFUSED = -1
"""In place of a shard's number: the worker could not be built, by a mistake of the user."""
INIT_DEATHS = 8
"""Workers that may die one after another while they start, before the run ends."""


class _Actor:
    """What each pool actor holds."""

    def __init__(
        self,
        root: str,
        build_maker: Callable[..., ShardMaker],
        arguments: dict[str, Any],
        runtime: RuntimeConfig,
        labels: dict[str, str],
        cpus: float,
    ) -> None:
        reserve(cpus)
        self.alarm = StackAlarm(0.9 * runtime.stall_timeout_s)
        self.mistake: UserError | None = None
        try:
            if runtime.gpus_per_worker:
                check_gpu()
            self.runner = ShardRunner(root, build_maker, arguments, runtime.max_attempts, ShardMetrics(labels))
        except UserError as error:  # a constructor that raises would be tried again and again
            self.mistake = error

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        if self.mistake is not None:  # as data: of an error of a call Ray Data keeps the text alone
            refused = ShardResult(
                shard=_REFUSED,
                ok=0,
                rejected=0,
                failed=0,
                size_bytes=0,
                make_s=0.0,
                commit_s=0.0,
                reason=str(self.mistake),
            )
            return {key: np.array([value]) for key, value in to_dict(refused).items()}
        shards = [
            ShardSpec(index=int(i), start=int(a), stop=int(b))
            for i, a, b in zip(batch["index"], batch["start"], batch["stop"], strict=True)
        ]
        try:
            with self.alarm:
                rows = [to_dict(self.runner(shard)) for shard in shards]
        except WorkerBroken as error:
            log.error("%s; this worker ends and a fresh one takes over", error)
            os._exit(BROKEN)
        return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def run(work: Work, shards: list[ShardSpec], runtime: RuntimeConfig, watch: Watch) -> Iterator[ShardResult]:
    """Make the given shards on a fixed pool of actors, in any order.

    A few calls run in each actor, one making a shard while others write those before (a lock keeps making serial): two on
    a CPU, three with a GPU, which is faster than one core writes. No more shards per actor are in memory. The source is in
    memory and the actors take a share of a CPU: a pool that took whole CPUs would leave none for reading and hang.
    """
    workers = min(runtime.workers, len(shards))
    check_this_machine(workers, runtime.cpus_per_worker, runtime.gpus_per_worker)
    with ray_session():
        watch.listen()
        check_cluster(workers, runtime.cpus_per_worker, runtime.gpus_per_worker, runtime.wait_for_nodes)
        dataset = _dataset(work, shards, runtime, workers)
        with VolumesLeft(labels_of(work), sum(shard.stop - shard.start for shard in shards)).told() as left:
            for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
                columns = {str(key): np.asarray(column).tolist() for key, column in batch.items()}
                for row in zip(*columns.values(), strict=True):
                    result = ShardResult(**dict(zip(map(str, columns), row, strict=True)))
                    if result.shard == _REFUSED:
                        raise UserError(result.reason)
                    left.rows -= result.ok + result.rejected + result.failed
                    yield result


def _dataset(work: Work, shards: list[ShardSpec], runtime: RuntimeConfig, workers: int) -> ray.data.Dataset:
    import ray.data

    rows = pa.Table.from_pylist([to_dict(shard) for shard in shards])
    calls = 3 if runtime.gpus_per_worker else 2
    # A dataset keeps the context that it is made in; the caller's own stays as it was.
    with ray.data.DataContext.current(_quiet(ray.data.DataContext.get_current().copy())):
        return ray.data.from_arrow([rows.slice(i, 1) for i in range(len(rows))]).map_batches(
            _Actor,
            fn_constructor_kwargs={
                "root": work.root,
                "build_maker": work.build_maker,
                "arguments": work.arguments,
                "runtime": runtime,
                "labels": labels_of(work),
                "cpus": cpus_of_worker(workers, runtime.cpus_per_worker),
            },
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                size=workers,
                max_concurrent_calls_per_actor=calls,
                # No shard waits at an actor beyond these: one that hangs would keep it from the others.
                max_tasks_in_flight_per_actor=calls,
                enable_true_multi_threading=True,
            ),
            num_cpus=runtime.cpus_per_worker,
            num_gpus=runtime.gpus_per_worker or None,
        )


def _quiet(context: ray.data.DataContext) -> ray.data.DataContext:
    """Ray Data's own settings as a run of ours needs them."""
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # It warns that there is no bar; we have a line of our own.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    context.execution_no_progress_timeout_s = -1  # our own watch knows how long a shard may take
    context.issue_detectors_config.detectors = []  # every 30 s they would advise on memory by an option nobody here has
    # One sick GPU must not end the run before another machine has had its turn.
    context.max_consecutive_actor_init_deaths = INIT_DEATHS
    return context
