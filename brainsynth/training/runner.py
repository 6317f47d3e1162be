"""One training, whatever is trained: check, resume or start, train, leave a sealed record. Knows nothing of Ray."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from brainsynth.config.distillation import DistillConfig, StepDistillConfig
from brainsynth.config.labelling import LabellerTrainConfig, RendererTrainConfig
from brainsynth.config.training import AutoencoderTrainConfig, DiffusionTrainConfig
from brainsynth.storage.whole_file import reported_when_full
from brainsynth.training.diverged import check_not_diverged
from brainsynth.training.loop import Report, Task, Worker, run, unreported
from brainsynth.training.preemption import Preempted, never
from brainsynth.training.runs import Finished, Run, finished, training_digest, training_folder, write_run

log = logging.getLogger(__name__)
TrainConfig = (
    AutoencoderTrainConfig
    | DiffusionTrainConfig
    | DistillConfig
    | StepDistillConfig
    | LabellerTrainConfig
    | RendererTrainConfig
)
C = TypeVar("C", bound=TrainConfig)


class Inputs(Protocol):
    """What a training starts from."""

    @property
    def fingerprint(self) -> str:
        """Of the data: with the config, the identity of the training."""


I = TypeVar("I", bound=Inputs)  # noqa: E741


@dataclasses.dataclass(frozen=True)
class Training(Generic[C, I]):
    """A kind of training. Its values are constants of modules, so they pickle."""

    name: str
    """Of its runs in Ray Train."""
    check: Callable[[C], I]
    """Everything that can be refused before a worker starts, and what was read for it. Raises UserError."""
    task: Callable[[C, I, Worker], Task]
    """The networks, their state and one step of it, on one worker."""
    record: type[Run]
    """What a finished training leaves in its folder."""
    older: tuple[type[Run], ...] = ()
    """What earlier versions left there."""


def fit(training: Training[C, I], config: C, report: Report = unreported, preempted: Preempted = never) -> None:
    """Train from the newest checkpoint to the end, and leave averaged weights and run.json in `config.output`.

    Raises:
        UserError: the training is refused, or another one is in the folder.
        Diverged: it is not finite any more, or was so before.
        Left: `preempted` asked for it; all steps done are saved.
    """
    folder = training_folder(config.output)
    inputs = training.check(config)
    config_digest = training_digest(config, inputs.fingerprint)
    with reported_when_full(folder, "the training's output"):
        folder.mkdir(parents=True, exist_ok=True)
        if finished(folder, config_digest, training.record, training.older):
            log.info("already trained: %s", folder)
            return
        check_not_diverged(folder, config_digest)
        began = time.monotonic()
        worker = Worker(config.runtime, folder, report, preempted)
        task = training.task(config, inputs, worker)
        metrics = run(task, worker, config.optimisation, config_digest, "tensorboard" in config.runtime.trackers)
        if worker.rank == 0:
            write_run(folder, task.record(Finished(config_digest, metrics, time.monotonic() - began)))
