"""The loop of every training: resume, steps, logs, validation, checkpoints. Knows nothing of Ray.

A step depends on the state before it and on (seed, step, rank) alone, so the same command after a kill continues the
identical loss curve. Asked to leave, it saves at the end of the current step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from brainsynth.config.training import OptimisationConfig, TrainRuntimeConfig
from brainsynth.models.device import choose_device, set_threads
from brainsynth.progress import in_minutes
from brainsynth.storage.whole_file import sweep
from brainsynth.training.checkpoint import CheckpointWriter, restore_newest, restore_together
from brainsynth.training.data import step_seed
from brainsynth.training.diverged import Diverged, diverged, not_finite
from brainsynth.training.preemption import Left, Listener, Preempted, Request, never
from brainsynth.training.runs import Finished, Run
from brainsynth.training.state import TrainingState
from brainsynth.training.trackers import MetricsLog
from brainsynth.training.validation import resumed_validation, validated

log = logging.getLogger(__name__)
T = TypeVar("T")

Report = Callable[[dict[str, float]], None]
"""Called by every worker after each checkpoint with the latest metrics."""


def unreported(metrics: dict[str, float]) -> None:
    """The metrics go to the training's own log alone."""


class Task(Protocol):
    """What is trained."""

    state: TrainingState

    def step(self, step: int) -> dict[str, Tensor]:
        """Do one optimisation step; returns scalars (not yet moved to the CPU)."""

    def validate(self) -> list[dict[str, float]]:
        """Measure this worker's share of the validation split: numbers by name, of each volume or row."""

    def figures(self) -> dict[str, Any]:
        """Pictures (H, W, 3) uint8 by name (first worker only)."""

    def record(self, finished: Finished) -> Run:
        """Write the averaged weights; returns the record of the training (first worker only)."""


class Worker:
    """Who and where this process is, where it writes, and whom it reports to and listens to."""

    def __init__(
        self,
        runtime: TrainRuntimeConfig,
        folder: Path,
        report: Report = unreported,
        preempted: Preempted = never,
    ) -> None:
        self.folder, self.report, self.preempted = folder, report, preempted
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world_size = dist.get_world_size() if distributed else 1
        self.compresses, self.checkpoint_every_s = runtime.compress_gradients, runtime.checkpoint_every_s
        self.device, self.micro_batch = choose_device(runtime.use_gpu), runtime.micro_batch
        set_threads(runtime.threads_per_worker, self.world_size)

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module itself, or wrapped so that gradients are averaged over workers."""
        if self.world_size == 1:
            return module
        wrapped = DistributedDataParallel(
            module,
            device_ids=None if self.device.type == "cpu" else [self.device.index],
            broadcast_buffers=False,  # nothing that is trained changes them
            gradient_as_bucket_view=True,
        )
        if self.compresses:
            wrapped.register_comm_hook(None, bf16_compress_hook)
        return wrapped

    def share(self, indices: npt.NDArray[np.int64]) -> Tensor:
        """This worker's part of a global batch."""
        return torch.from_numpy(indices[self.rank :: self.world_size])

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """This worker's part of what all measure together."""
        return items[self.rank :: self.world_size]

    def mean(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Scalars averaged over workers."""
        stacked = torch.stack([value.detach().float().reshape(()) for value in values.values()])
        if self.world_size > 1:
            dist.all_reduce(stacked)
            stacked /= self.world_size
        return dict(zip(values, stacked.tolist(), strict=True))

    def largest(self, values: list[float]) -> list[float]:
        """Of each value the largest over workers."""
        if self.world_size == 1:
            return values
        stacked = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(stacked, dist.ReduceOp.MAX)
        largest: list[float] = stacked.tolist()
        return largest

    def gathered(self, part: T) -> list[T]:
        """What every worker has, in the order of their ranks."""
        if self.world_size == 1:
            return [part]
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, part)
        return parts


def learning_rate(config: OptimisationConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to a tenth: short runs gain from ending low."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    progress = step / max(1, config.steps)
    return config.learning_rate * warm * (0.1 + 0.9 * 0.5 * (1 + torch.cos(torch.tensor(progress * torch.pi)).item()))


def run(
    task: Task, worker: Worker, config: OptimisationConfig, config_digest: str, tensorboard: bool
) -> dict[str, float]:
    """Train to the last step; returns the final validation metrics.

    Raises:
        Left: the worker was asked to leave; all steps done are saved.
        Diverged: a loss, a gradient or a weight is not finite; nothing of that is saved.
    """
    start = _resume(task, worker, config_digest)
    metrics = MetricsLog(worker.folder, tensorboard, start) if worker.rank == 0 else None
    if start and metrics:
        log.info("resumed at step %d of %d", start, config.steps)
    with _Saver(task, worker, config, config_digest, metrics, start) as saver:
        listener = Listener(worker.preempted, worker, start)
        began = shown = time.monotonic()
        validation = resumed_validation(task, worker, metrics, config, start)
        for step in range(start, config.steps):
            request = listener.request(step)
            if request:
                saver.save(step, wait=True)  # the machine may be gone soon
            if request is Request.LEAVE:
                raise Left(step)
            values = optimise(task, config, step, worker.rank)
            if step == start and metrics:
                saver.writer.prepare()
            done, last = step + 1, step + 1 == config.steps
            scalars = worker.mean(values)  # in every step: what one worker sees, all do, and stop together
            if wrong := not_finite(scalars):
                saver.stop(done, ", ".join(wrong))
            if metrics and (done % config.log_every == 0 or last):
                metrics.scalars(done, {f"train/{name}": value for name, value in scalars.items()})
                if time.monotonic() - shown > 5 or last:
                    shown = time.monotonic()
                    log.info("%s", _progress(done, config.steps, start, shown - began, scalars))
            saved = saver.due(done)
            if saved:
                saver.save(done)
            if done % config.validate_every == 0 or last:
                validation = validated(task, worker, metrics, done, must=last) or validation
            if saved:
                worker.report({"step": float(done), **validation})
    return validation


class _Saver:
    """Saves the state of a training when it is due, and only while it is finite. A context that ends with all written."""

    def __init__(
        self,
        task: Task,
        worker: Worker,
        config: OptimisationConfig,
        config_digest: str,
        metrics: MetricsLog | None,
        start: int,
    ) -> None:
        self.task, self.worker, self.config, self.config_digest, self.metrics = (
            task,
            worker,
            config,
            config_digest,
            metrics,
        )
        self.writer = CheckpointWriter(worker.folder, task.state, config_digest, config.keep_checkpoints)
        self._saved, self._when = start, time.monotonic()

    def __enter__(self) -> _Saver:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.writer.wait()
        finally:
            if self.metrics:
                self.metrics.close()

    def due(self, done: int) -> bool:
        """Whether to save after a step; all workers agree."""
        if done == self.config.steps:
            return True
        if done % self.config.checkpoint_every:
            return False
        early = time.monotonic() - self._when < self.worker.checkpoint_every_s
        return not (self.worker.checkpoint_every_s and self.worker.largest([float(early)])[0])

    def save(self, done: int, wait: bool = False) -> None:
        """Save once; `wait` until it is written. Raises Diverged when the state is not finite."""
        if self._saved != done:
            wrong = self.task.state.not_finite()
            if self.worker.largest([float(len(wrong))])[0]:
                self.stop(done, f"{', '.join(wrong[:3]) or 'a weight'} is not finite any more")
            self._saved, self._when = done, time.monotonic()
            if self.metrics:
                self.metrics.sync()
                self.writer.save(done)
        if wait:
            self.writer.wait()

    def stop(self, done: int, what: str) -> NoReturn:
        """End a training that is not finite any more."""
        self.writer.wait()
        if self.metrics:
            rate = learning_rate(self.config, done - 1)
            raise diverged(self.worker.folder, self.config, done, what, rate, self.config_digest)
        raise Diverged(f"the training diverged at step {done}: {what}")


def _resume(task: Task, worker: Worker, config_digest: str) -> int:
    """Load the newest whole checkpoint; returns the steps done."""
    if worker.rank == 0:
        sweep(worker.folder)
        sweep(worker.folder / "checkpoints")
    if worker.world_size == 1:
        return restore_newest(worker.folder, task.state, config_digest)
    return restore_together(worker.folder, task.state, config_digest, worker.rank == 0, worker.device)


def optimise(task: Task, config: OptimisationConfig, step: int, rank: int) -> dict[str, Tensor]:
    """One step of a task, with the random numbers and the learning rate that are this step's."""
    torch.manual_seed(step_seed(config.seed, step, rank))
    for optimizer in task.state.optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step) * group["lr_factor"]
    return task.step(step)


def _progress(done: int, steps: int, start: int, elapsed_s: float, scalars: Mapping[str, float]) -> str:
    rate = (done - start) / max(elapsed_s, 1e-9)
    left_s = (steps - done) / max(rate, 1e-9)
    return f"step {done}/{steps}  {rate:.2f} steps/s  ETA {in_minutes(left_s)}  {_shown(scalars)}"


def _shown(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
