"""Where scalars and figures go: always metrics.jsonl, and TensorBoard, MLflow or W&B when configured."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.image import imsave

from brainsynth.errors import UserError


class MetricsLog:
    """`metrics.jsonl`: one line per logged step. A resumed run drops the lines after its checkpoint first."""

    def __init__(self, folder: Path, trackers: tuple[str, ...], start_step: int, config: dict[str, Any]) -> None:
        self.path = folder / "metrics.jsonl"
        kept = [line for line in self._lines() if line["step"] <= start_step]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._trackers = [_TRACKERS[name](folder, config) for name in trackers]

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        found = []
        for text in self.path.read_text().splitlines():
            try:
                found.append(json.loads(text))
            except ValueError:  # the line that a kill cut short
                break
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
    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def figure(self, step: int, name: str, image: npt.NDArray[np.uint8]) -> None:
        self.writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class _Mlflow:
    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.mlflow: Any = importlib.import_module("mlflow")
        self.run = self.mlflow.start_run(run_name=folder.name)
        self.mlflow.log_dict(config, "config.json")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.mlflow.log_metrics(values, step=step)

    def figure(self, step: int, name: str, image: npt.NDArray[np.uint8]) -> None:
        self.mlflow.log_image(image, f"{name.replace('/', '-')}-{step:06d}.png")

    def close(self) -> None:
        self.mlflow.end_run()


class _Wandb:
    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.wandb: Any = importlib.import_module("wandb")
        self.run = self.wandb.init(dir=str(folder), name=folder.name, config=config, resume="allow")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def figure(self, step: int, name: str, image: npt.NDArray[np.uint8]) -> None:
        self.run.log({name: self.wandb.Image(image)}, step=step)

    def close(self) -> None:
        self.run.finish()


_TRACKERS: dict[str, Any] = {"tensorboard": _TensorBoard, "mlflow": _Mlflow, "wandb": _Wandb}
