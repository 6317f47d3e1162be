"""Where scalars and figures go: always metrics.jsonl and figures/, and TensorBoard when configured."""

from __future__ import annotations

import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.image import imsave

from brainsynth.storage.whole_file import replaced


class MetricsLog:
    """`metrics.jsonl`: one line per logged step. A resumed run drops the lines after its checkpoint first."""

    def __init__(self, folder: Path, tensorboard: bool, start_step: int) -> None:
        self.path = folder / "metrics.jsonl"
        kept = [line for line in self._lines() if line["step"] <= start_step]
        self.validated = any(
            line["step"] == start_step and any(name.startswith("validation/") for name in line) for line in kept
        )
        """Whether a validation after `start_step` is among them."""
        with replaced(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._tensorboard = _TensorBoard(folder, start_step) if tensorboard else None

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        lines = []
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # the line that a kill cut short
                break
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                break
            lines.append(line)
        return lines

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log numbers after `step` steps."""
        with open(self.path, "a") as handle:
            handle.write(json.dumps({"step": step, **values}) + "\n")
        if self._tensorboard:
            self._tensorboard.scalars(step, values)

    def figure(self, step: int, name: str, image: npt.NDArray[np.uint8]) -> None:
        """Log a picture (H, W, 3), and keep it as figures/NAME-STEP.png."""
        folder = self.path.parent / "figures"
        folder.mkdir(exist_ok=True)
        imsave(folder / f"{name}-{step:06d}.png", image)
        if self._tensorboard:
            self._tensorboard.figure(step, name, image)

    def sync(self) -> None:
        """Put the curve on the disk itself: a checkpoint must never outlive the lines before it."""
        with open(self.path, "a") as handle:
            os.fsync(handle.fileno())

    def close(self) -> None:
        """Flush everything."""
        if self._tensorboard:
            self._tensorboard.close()


class _TensorBoard:
    """Event files, written in this thread: the usual writer's own thread dies of a full disk and leaves us waiting."""

    def __init__(self, folder: Path, start_step: int) -> None:
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
