"""Where scalars and figures go: always metrics.jsonl, and TensorBoard, MLflow or W&B when configured."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.image import imsave

from brainsynth.errors import UserError
from brainsynth.storage.whole_file import replaced


class MetricsLog:
    """`metrics.jsonl`: one line per logged step. A resumed run drops the lines after its checkpoint first."""

    def __init__(self, folder: Path, trackers: tuple[str, ...], start_step: int, config: dict[str, Any]) -> None:
        self.path = folder / "metrics.jsonl"
        kept = [line for line in self._lines() if line["step"] <= start_step]
        with replaced(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._trackers = [_TRACKERS[name](folder, config, start_step) for name in trackers]

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        found = []
        for text in self.path.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # the line that a kill cut short
                break
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                break
            found.append(line)
        return found

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log numbers after `step` steps."""
        with open(self.path, "a") as handle:
            handle.write(json.dumps({"step": step, **values}) + "\n")
        for tracker in self._trackers:
            tracker.scalars(step, values)

    def figure(self, step: int, name: str, image: npt.NDArray[np.uint8]) -> None:
        """Log a picture (H, W, 3); it is also kept as figures/NAME-STEP.png."""
        folder = self.path.parent / "figures"
        folder.mkdir(exist_ok=True)
        imsave(folder / f"{name}-{step:06d}.png", image)
        for tracker in self._trackers:
            tracker.figure(step, name, image)

    def sync(self) -> None:
        """Put the curve on the disk itself: a checkpoint must never outlive the lines before it."""
        with open(self.path, "a") as handle:
            os.fsync(handle.fileno())

    def close(self) -> None:
        """Flush everything."""
        for tracker in self._trackers:
            tracker.close()


def check_trackers(names: tuple[str, ...]) -> None:
    """Raises UserError for a tracker whose package is not installed."""
    for name in names:
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise UserError(f"runtime.trackers: {name} is not installed; pip install 'brainsynth[{name}]'")


class _TensorBoard:
    """Event files, written in this thread: the usual writer's own thread dies of a full disk and leaves us waiting."""

    def __init__(self, folder: Path, config: dict[str, Any], start_step: int) -> None:
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self.summary, self.event = summary, Event
        place = folder / "tensorboard"
        place.mkdir(exist_ok=True)
        # The names must differ within one second, and sort in the order of the resumes.
        self.writer = EventsWriter(str(place / "events"), f".{start_step:09d}-{uuid.uuid4().hex[:8]}")
        if start_step:  # TensorBoard then drops what an earlier process logged after the checkpoint
            again = SessionLog(status=SessionLog.START)
            self.writer.write_event(Event(step=start_step + 1, wall_time=time.time(), session_log=again))

    def _write(self, step: int, summary: Any) -> None:
        self.writer.write_event(self.event(step=step, wall_time=time.time(), summary=summary))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._write(step, self.summary.scalar(name, value))
        self.writer.flush()

    def figure(self, step: int, name: str, image: npt.NDArray[np.uint8]) -> None:
        self._write(step, self.summary.image(name, image, dataformats="HWC"))
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def _run_id(folder: Path, tracker: str, make: Callable[[], str]) -> str:
    """The run's id with a tracking server, kept in the folder: a resumed training goes on in the same run."""
    path = folder / f"{tracker}-run-id"
    if not path.is_file():
        with replaced(path) as temporary:
            temporary.write_text(make())
    return path.read_text()


class _Mlflow:
    def __init__(self, folder: Path, config: dict[str, Any], start_step: int) -> None:
        self.mlflow: Any = importlib.import_module("mlflow")
        known = (folder / "mlflow-run-id").is_file()
        if known:
            self.mlflow.start_run(run_id=_run_id(folder, "mlflow", str))
        else:
            run = self.mlflow.start_run(run_name=folder.name)
            _run_id(folder, "mlflow", lambda: str(run.info.run_id))
            self.mlflow.log_dict(config, "config.json")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.mlflow.log_metrics(values, step=step)

    def figure(self, step: int, name: str, image: npt.NDArray[np.uint8]) -> None:
        self.mlflow.log_image(image, f"{name.replace('/', '-')}-{step:06d}.png")

    def close(self) -> None:
        self.mlflow.end_run()


class _Wandb:
    def __init__(self, folder: Path, config: dict[str, Any], start_step: int) -> None:
        self.wandb: Any = importlib.import_module("wandb")
        run_id = _run_id(folder, "wandb", lambda: uuid.uuid4().hex[:16])
        # Steps that are done again are already there, with the same values; the server passes them over.
        self.run = self.wandb.init(dir=str(folder), name=folder.name, config=config, id=run_id, resume="allow")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def figure(self, step: int, name: str, image: npt.NDArray[np.uint8]) -> None:
        self.run.log({name: self.wandb.Image(image)}, step=step)

    def close(self) -> None:
        self.run.finish()


_TRACKERS: dict[str, Any] = {"tensorboard": _TensorBoard, "mlflow": _Mlflow, "wandb": _Wandb}
