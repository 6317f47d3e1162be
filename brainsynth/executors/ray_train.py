"""Ray Train around the plain training: data-parallel workers that are restarted when they die.

SIGTERM (a job that is stopped, a spot machine that is reclaimed) reaches the driver alone, so it leaves a file named after
this run in the output folder, which every worker sees. The workers save, leave, and the job ends with exit code 143.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from brainsynth.config.schema import SHIPPED_BUNDLE
from brainsynth.config.training import AutoencoderLossConfig
from brainsynth.errors import UserError
from brainsynth.executors.preflight import check_cluster, check_this_machine, cpus_of_worker
from brainsynth.executors.session import ray_session
from brainsynth.executors.watch import TERMINATED, leave
from brainsynth.models.cpus import reserve
from brainsynth.progress import configure_logging
from brainsynth.records import digest
from brainsynth.storage.filesystem import local_folder, resolve_uri
from brainsynth.training.preemption import Left, Request
from brainsynth.training.runner import C, I, TrainConfig, Training, fit
from brainsynth.training.runs import training_folder

log = logging.getLogger(__name__)
_LOOK_S = 0.5
COLLECTIVE_S = 3600
"""Workers wait for each other at most this long: for a slow file system, or for one that validates alone."""


class SigtermNoted:
    """A context in which SIGTERM ends nothing: it is noted, and a file is left where others look for it."""

    def __init__(self, file: Path | None = None) -> None:
        self.file, self.asked = file, False
        self._previous: Any = None

    def __enter__(self) -> SigtermNoted:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread have a handler
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.touch()

    def __exit__(self, *error: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def request(self) -> Request:
        """What a training in this process should do."""
        return Request.LEAVE if self.asked else Request.NOTHING


class _Asked:
    """What a Ray Train worker should do: its driver's file says leave, a machine that Ray drains says save."""

    def __init__(self, file: Path) -> None:
        import ray.train

        self._file, self._info = file, None
        self._alone = ray.train.get_context().get_world_size() == 1
        self._looked = 0.0

    def __call__(self) -> Request:
        import ray.train

        # Several workers look together, and the loop sees to it that they do not look too often.
        if self._alone and time.monotonic() - self._looked < _LOOK_S:
            return Request.NOTHING
        self._looked = time.monotonic()
        # A listing, not a question for the name: network file systems remember for long that a name was absent.
        leave = self._file.name in os.listdir(self._file.parent)
        info = ray.train.get_preemption_info()  # all workers must call it, whatever they know
        news = info is not None and info != self._info
        self._info = info
        if leave:
            return Request.LEAVE
        return Request.SAVE if news else Request.NOTHING


def _train(arguments: dict[str, Any]) -> int | UserError | None:
    """Runs in every worker: the plain training, its checkpoints reported to Ray.

    Returns the step it left at, or the user's mistake: an error would make Ray start the workers again.
    """
    import ray.train

    configure_logging()
    reserve(arguments["cpus"])
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # the loop logs its own metrics
    noted = Path(arguments["stop_file"]).with_suffix(".mistake")
    if noted.exists():  # an earlier start of this run ended with it
        return UserError(noted.read_text())
    try:
        fit(
            arguments["training"],
            arguments["config"],
            report=lambda metrics: ray.train.report(metrics),
            preempted=_Asked(Path(arguments["stop_file"])),
        )
    except Left as left:
        return left.step
    except UserError as error:
        if ray.train.get_context().get_world_rank() == 0 or _appears(noted):
            noted.write_text(str(error))
            return error
        noted.write_text(str(error))  # the others do not know it, and wait for this worker: all start, and end, again
        raise
    return None


def _appears(file: Path, within_s: float = 10.0) -> bool:
    """Whether the first worker leaves the file: then all workers made out the same mistake."""
    deadline = time.monotonic() + within_s
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return file.exists()


def _with_absolute_places(config: C) -> C:
    """The config as workers need it: they run in folders of their own."""
    names = ("cohort", "latents", "autoencoder", "start_from", "bundle", "output", "bundle_output")
    places = {name: value for name in names if (value := getattr(config, name, None)) is not None}
    changes: dict[str, Any] = {
        name: resolve_uri(value, name)
        for name, value in places.items()
        if value != SHIPPED_BUNDLE or name not in ("autoencoder", "start_from", "bundle")
    }
    losses = getattr(config, "losses", None)
    if isinstance(losses, AutoencoderLossConfig) and losses.perceptual_weights is not None:
        weights = resolve_uri(losses.perceptual_weights, "losses.perceptual_weights")
        changes["losses"] = dataclasses.replace(losses, perceptual_weights=weights)
    return dataclasses.replace(config, **changes)


def train(training: Training[C, I], config: C) -> None:
    """Train to the end, from the newest whole checkpoint if there is one.

    After SIGTERM the work done so far is saved, and the process ends with code 143.

    Raises:
        UserError: before a worker starts, whatever can be refused then; later, what only a worker could find out.
    """
    config = _with_absolute_places(config)
    training_folder(config.output)
    training.check(config)
    runtime = config.runtime
    check_this_machine(runtime.workers, runtime.cpus_per_worker, float(runtime.use_gpu))
    if runtime.workers == 0:
        _train_here(training, config)
    else:
        _train_on_ray(training, config)


def describe_training(config: TrainConfig) -> str:
    """What a training would do, in a line. Raises UserError for an output that is another thing's folder."""
    training_folder(config.output)
    options, runtime = config.optimisation, config.runtime
    return (
        f"{options.steps} steps of batch {options.batch_size} in {options.precision} on {runtime.workers} workers"
        f"{' with a GPU each' if runtime.use_gpu else ''} → {config.output}"
    )


def _end(step: int, config: TrainConfig) -> None:
    """Report it and exit; shutting Python and Ray down in order takes longer than we may have."""
    log.info("stopped at step %d of %d; run the same command to resume", step, config.optimisation.steps)
    leave(TERMINATED)


def _train_here(training: Training[C, I], config: C) -> None:
    with SigtermNoted() as noted:
        try:
            fit(training, config, preempted=noted.request)
        except Left as left:
            _end(left.step, config)


def _train_on_ray(training: Training[C, I], config: C) -> None:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    runtime, folder = config.runtime, local_folder(config.output, "output")
    with ray_session():
        check_cluster(runtime.workers, runtime.cpus_per_worker, float(runtime.use_gpu), runtime.wait_for_nodes)
        if runtime.use_gpu:
            _check_gpus()
        with _stop_file(folder) as stop_file:
            # Ray silently resumes a run of the same name, so the name carries the config. Its own checkpoints are not used:
            # ours prove themselves by digest, and need no Ray to be read.
            trainer = TorchTrainer(
                _train,  # type: ignore[arg-type]  # here and below mypy reads Ray Train's first version, and the second runs
                train_loop_config={
                    "training": training,
                    "config": config,
                    "stop_file": str(stop_file),
                    "cpus": cpus_of_worker(runtime.workers, runtime.cpus_per_worker),
                },
                torch_config=TorchConfig(timeout_s=COLLECTIVE_S),
                scaling_config=ScalingConfig(
                    num_workers=runtime.workers,
                    use_gpu=runtime.use_gpu,
                    resources_per_worker={"CPU": runtime.cpus_per_worker, **({"GPU": 1} if runtime.use_gpu else {})},
                ),
                run_config=RunConfig(
                    name=f"{training.name}-{digest(config)[:12]}",
                    storage_path=str(folder / "ray"),
                    logging_config=LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]
                    failure_config=FailureConfig(max_failures=runtime.max_failures),
                ),
            )
            with _mistakes_of_workers():
                left: int | UserError | None = trainer.fit().return_value  # type: ignore[attr-defined]
        if isinstance(left, UserError):
            raise left
        if left is not None:
            _end(left, config)


@contextlib.contextmanager
def _stop_file(folder: Path) -> Iterator[Path]:
    """The file that asks the workers of this run to leave; its name is new, so no earlier run's request stops this one."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(".stop-*"):
        old.unlink(missing_ok=True)
    with SigtermNoted(folder / f".stop-{uuid.uuid4().hex}") as noted:
        assert noted.file is not None
        try:
            yield noted.file
        finally:
            noted.file.with_suffix(".mistake").unlink(missing_ok=True)


def _check_gpus() -> None:
    """Refuse machines whose GPUs Ray counts but torch cannot use; else NCCL would fail there, again at every start."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    @ray.remote(num_cpus=0, num_gpus=0.01, max_retries=0)
    def why() -> str:
        from brainsynth.models.device import count_accelerators, why_no_gpu

        return "" if count_accelerators() else why_no_gpu()

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]  # type: ignore[no-untyped-call]
    there = {node["NodeManagerAddress"]: NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes}
    reasons = ray.get([why.options(scheduling_strategy=strategy).remote() for strategy in there.values()])
    for address, reason in zip(there, reasons, strict=True):
        if reason:
            raise UserError(f"runtime.use_gpu: Ray counts GPUs on {address}, but {reason}")


@contextlib.contextmanager
def _mistakes_of_workers() -> Iterator[None]:
    """Raise a worker's UserError itself; Ray wraps it in two other errors."""
    from ray.train import WorkerGroupError

    try:
        yield
    except WorkerGroupError as error:
        for failure in error.worker_failures.values():
            cause = getattr(failure, "_base_exc", failure)
            if isinstance(cause, UserError):
                raise cause from error
        raise
