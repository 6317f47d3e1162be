"""A training whose loss, gradient or weights are not finite any more: it stops, and leaves a note that a rerun reads."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

from brainsynth.config.training import OptimisationConfig
from brainsynth.errors import UserError
from brainsynth.records import record, seal, unseal
from brainsynth.storage.whole_file import replaced
from brainsynth.training.checkpoint import checkpoints

log = logging.getLogger(__name__)
DIVERGED_FILE = "diverged.json"


class Diverged(UserError):
    """The training stopped before anything that is not finite was saved."""


@record
class DivergedRecord:
    """Where a training stopped."""

    config_digest: str
    reason: str


def not_finite(values: Mapping[str, float]) -> list[str]:
    """What is not finite, as `l1 is nan`; the reason comes before the loss that is the sum of all."""
    found = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    return sorted(found, key=lambda text: text.startswith("loss "))


def diverged(
    folder: Path, options: OptimisationConfig, step: int, what: str, rate: float, config_digest: str
) -> Diverged:
    """The error; leaves the note. `step` counts from 1."""
    sound = checkpoints(folder)
    kept = f"the last sound checkpoint is {sound[-1][1].name}" if sound else "no checkpoint had been saved yet"
    reason = (
        f"the training diverged at step {step} of {options.steps}: {what} (learning rate {rate:.3g}); {kept} in {folder}. "
        f"Train again with a lower optimisation.learning_rate ({options.learning_rate:g} now), a longer warmup_steps or a "
        "smaller gradient_clip, in another output folder"
        + (", and with start_from to begin with that checkpoint's averaged weights" if sound else "")
    )
    if folder.is_dir():
        with replaced(folder / DIVERGED_FILE) as temporary:
            temporary.write_bytes(seal(DivergedRecord(config_digest=config_digest, reason=reason)))
    return Diverged(reason)


def check_not_diverged(folder: Path, config_digest: str) -> None:
    """Raises Diverged where this very training stopped so before: it would again."""
    path = folder / DIVERGED_FILE
    if not path.is_file():
        return
    note = unseal(DivergedRecord, path.read_bytes(), str(path))
    if note.config_digest == config_digest:
        raise Diverged(f"{note.reason}. (It stopped before, so it was not tried again: remove {path} to resume anyway)")
