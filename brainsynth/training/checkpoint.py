"""Checkpoints: a new folder each, digests inside, renamed into place when complete; no pickle.

```
checkpoints/step-000200/checkpoint.json   sealed: step, config digest, file digests, optimizer settings
                        tensors.safetensors
```
The newest directory that proves whole is resumed; a damaged one is named in a warning and passed over.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from brainsynth.bundle.files import file_sha256
from brainsynth.errors import UserError
from brainsynth.records import record, seal, unseal
from brainsynth.storage.whole_file import discard, replaced, reported_when_full
from brainsynth.training.state import TrainingState

log = logging.getLogger(__name__)
_RECORD, _TENSORS = "checkpoint.json", "tensors.safetensors"
_RECORD_BYTES = 64 << 20
"""No real record comes near; a larger one is not even read."""
_NAME = re.compile(r"step-(\d{6,18})")


@record
class CheckpointRecord:
    """What a checkpoint holds."""

    step: int
    """Steps done."""
    config_digest: str
    tensors_sha256: str
    ema_updates: dict[str, int]
    optimizer_groups: dict[str, list[dict[str, Any]]]


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every checkpoint of a training, whole or not, oldest first; other names are left alone."""
    root = folder / "checkpoints"
    entries = root.iterdir() if root.is_dir() else iter(())
    named = [(_NAME.fullmatch(path.name), path) for path in entries]
    return sorted((int(match[1]), path) for match, path in named if match and path.is_dir() and not path.is_symlink())


def save_checkpoint(folder: Path, state: TrainingState, step: int, config_digest: str, keep: int) -> Path:
    """Write `checkpoints/step-NNNNNN` whole or not at all, then drop all but the newest `keep`.

    Raises:
        UserError: the disk is full; older checkpoints are as they were.
    """
    final = folder / "checkpoints" / f"step-{step:06d}"
    with reported_when_full(final.parent, final.name), replaced(final) as temporary:
        temporary.mkdir()
        save_file(state.tensors(), temporary / _TENSORS)
        saved = CheckpointRecord(
            step=step,
            config_digest=config_digest,
            tensors_sha256=file_sha256(temporary / _TENSORS),
            ema_updates=state.ema_updates(),
            optimizer_groups=state.optimizer_groups(),
        )
        (temporary / _RECORD).write_bytes(seal(saved))
        if os.path.lexists(final):  # damaged: it was passed over, else this step would not have been done again
            discard(final)
    # Later steps can only be damaged ones that were passed over: they must not crowd out what was just saved.
    done = [path for at, path in checkpoints(folder) if at <= step]
    for old in done[:-keep]:
        discard(old)
    return final


def restore_newest(folder: Path, state: TrainingState, config_digest: str) -> int:
    """Load the newest whole checkpoint into `state`; returns the steps done, 0 when there is none.

    The state is touched only once a checkpoint has proved whole and fitting in every part.

    Raises:
        UserError: when the newest whole checkpoint was made with another config, or when there are whole ones but none
            fits the network: starting over would in the end delete them.
    """
    misfit: str | None = None
    for step, path in reversed(checkpoints(folder)):
        try:
            saved = _read(path, step)
        except (OSError, UserError) as error:
            log.warning("checkpoint %s is damaged and is passed over: %s", path.name, error)
            continue
        if saved.config_digest != config_digest:
            raise UserError(
                f"{folder} holds a training with another config (checkpoint {path.name}); "
                "give another output folder (start_from may name this one), or the same config to resume"
            )
        try:
            tensors = load_file(path / _TENSORS)
            problems = state.problems(tensors, saved.ema_updates, saved.optimizer_groups)
        except SafetensorError as error:
            problems = [str(error)]
        if problems:
            misfit = misfit or f"{path.name}: {'; '.join(problems[:3])}"
            log.warning("checkpoint %s does not fit the network and is passed over: %s", path.name, problems[0])
            continue
        state.load(tensors, saved.ema_updates)
        return saved.step
    if misfit:
        raise UserError(
            f"{folder} holds checkpoints, but none fits the network ({misfit}); resume with the version of the code that "
            "made them, or give another output folder"
        )
    return 0


def newest_tensors(folder: Path) -> Path | None:
    """The tensors of the newest whole checkpoint of a training; None where it has none."""
    for step, path in reversed(checkpoints(folder)):
        try:
            _read(path, step)
        except (OSError, UserError) as error:
            log.warning("checkpoint %s is damaged and is passed over: %s", path.name, error)
        else:
            return path / _TENSORS
    return None


def _read(path: Path, step: int) -> CheckpointRecord:
    """The record of a checkpoint whose files all match it. Raises OSError or UserError for any other."""
    file = path / _RECORD
    if file.exists() and (not file.is_file() or file.stat().st_size > _RECORD_BYTES):
        raise UserError(f"{file} is not a file, or larger than any record ({_RECORD_BYTES >> 20} MiB)")
    saved = unseal(CheckpointRecord, file.read_bytes(), str(file))
    if saved.step != step:
        raise UserError(f"{file} is the record of step {saved.step}")
    tensors = path / _TENSORS
    if tensors.exists() and not tensors.is_file():
        raise UserError(f"{tensors} is not a file")
    if file_sha256(tensors) != saved.tensors_sha256:
        raise UserError(f"{tensors} does not match its sha256")
    return saved
