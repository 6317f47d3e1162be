"""Checkpoints: a new folder each, digests inside, renamed into place when complete; no pickle.

```
checkpoints/step-000200/checkpoint.json   sealed: step, config digest, file digests, optimizer settings
                        tensors.safetensors
```
The newest directory that proves whole is resumed; a damaged one is named in a warning and passed over.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from brainsynth.errors import UserError
from brainsynth.records import record, seal, unseal
from brainsynth.storage.whole_file import discard, file_sha256, replaced, reported_when_full
from brainsynth.training.state import Groups, TrainingState, room_for

log = logging.getLogger(__name__)
_RECORD, _TENSORS = "checkpoint.json", "tensors.safetensors"
_RECORD_BYTES = 64 << 20
"""No real record comes near; a larger one is not even read."""
_PAGE = 4096
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


class CheckpointWriter:
    """Writes the checkpoints of a training in a thread, one at a time: the training waits while its state is copied."""

    def __init__(self, folder: Path, state: TrainingState, config_digest: str, keep: int) -> None:
        self.folder, self.state, self.config_digest, self.keep = folder, state, config_digest, keep
        self._copies: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Any] | None = None

    def prepare(self) -> None:
        """Begin to get the memory of the copies: several seconds for 9 GB, which the first `save` would take otherwise."""
        self.wait()
        self._writing = self._thread.submit(_reserve, self.state.current(), self._copies)

    def save(self, step: int) -> None:
        """Copy the state, and begin to write it. Raises what went wrong with the checkpoint before."""
        self.wait()
        tensors = self.state.tensors(into=self._copies)
        record = (step, self.config_digest, self.state.ema_updates(), copy.deepcopy(self.state.optimizer_groups()))
        self._writing = self._thread.submit(_write, self.folder, tensors, *record, self.keep)

    def wait(self) -> None:
        """Until what was begun is done and the last one is on the disk. Raises what went wrong with it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def _reserve(tensors: dict[str, Tensor], copies: dict[str, Tensor]) -> None:
    for key, value in tensors.items():
        copies[key] = room = room_for(value)
        room.reshape(-1).view(torch.uint8)[::_PAGE].zero_()  # a page is there once something is written to it


def save_checkpoint(folder: Path, state: TrainingState, step: int, config_digest: str, keep: int) -> Path:
    """Write `checkpoints/step-NNNNNN` whole or not at all, then drop all but the newest `keep`.

    Raises:
        UserError: the disk is full; older checkpoints are as they were.
    """
    return _write(folder, state.tensors(), step, config_digest, state.ema_updates(), state.optimizer_groups(), keep)


def _write(
    folder: Path,
    tensors: dict[str, Tensor],
    step: int,
    config_digest: str,
    updates: dict[str, int],
    groups: Groups,
    keep: int,
) -> Path:
    final = folder / "checkpoints" / f"step-{step:06d}"
    with reported_when_full(final.parent, final.name), replaced(final) as temporary:
        temporary.mkdir()
        saved = CheckpointRecord(
            step=step,
            config_digest=config_digest,
            tensors_sha256=_write_tensors(tensors, temporary / _TENSORS),
            ema_updates=updates,
            optimizer_groups=groups,
        )
        (temporary / _RECORD).write_bytes(seal(saved))
        if os.path.lexists(final):  # damaged: it was passed over, else this step would not have been done again
            discard(final)
    # Later steps can only be damaged ones that were passed over: they must not crowd out what was just saved.
    done = [path for at, path in checkpoints(folder) if at <= step]
    for old in done[:-keep]:
        discard(old)
    return final


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> str:
    """Write a safetensors file; returns its sha256, made on the way: reading 9 GB again would take as long as writing."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # so that all are aligned
    header: dict[str, Any] = {}
    start = 0
    for name, value in ordered:
        end = start + value.nbytes
        header[name] = {"dtype": _DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        head = np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)
        for part in (head, *(value.reshape(-1).view(torch.uint8).numpy() for _, value in ordered)):
            digest.update(part.data)
            file.write(part.data)
    return digest.hexdigest()


_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
           torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip
"""As the safetensors format names them."""


def restore_newest(folder: Path, state: TrainingState, config_digest: str) -> int:
    """Load the newest whole checkpoint into `state`; returns the steps done, 0 when there is none.

    The state is touched only once a checkpoint has proved whole and fitting in every part.

    Raises:
        UserError: as `newest_fitting`.
    """
    found = newest_fitting(folder, state, config_digest)
    if found is None:
        return 0
    state.load(found.tensors, found.ema_updates)
    return found.step


def restore_together(folder: Path, state: TrainingState, config_digest: str, first: bool, device: torch.device) -> int:
    """As `restore_newest`, in every worker of a process group: the first one reads, and sends all of it to the others.

    Raises:
        UserError: in every worker, what the first one found wrong.
    """
    found: Found | None = None
    head: list[Any] = [None, None]
    if first:
        try:
            found = newest_fitting(folder, state, config_digest)
            if found is not None:
                shapes = {name: (value.shape, value.dtype) for name, value in found.tensors.items()}
                head[1] = (found.step, found.ema_updates, shapes)
        except UserError as error:
            head[0] = str(error)
    dist.broadcast_object_list(head, 0)
    if head[0] is not None:
        raise UserError(head[0])
    if head[1] is None:
        return 0
    step, updates, shapes = head[1]
    tensors: dict[str, Tensor] = {}
    for name, (shape, dtype) in shapes.items():
        read = None if found is None else found.tensors.pop(name)
        tensors[name] = torch.empty(shape, dtype=dtype, device=device) if read is None else read.to(device)
        dist.broadcast(tensors[name], 0)
    state.load(tensors, updates)
    return int(step)


class Found(NamedTuple):
    """A whole checkpoint that fits."""

    step: int
    tensors: dict[str, Tensor]
    ema_updates: dict[str, int]


def newest_fitting(folder: Path, state: TrainingState, config_digest: str) -> Found | None:
    """The newest whole checkpoint that fits a state, which stays as it is.

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
        return Found(saved.step, tensors, saved.ema_updates)
    if misfit:
        raise UserError(
            f"{folder} holds checkpoints, but none fits the network ({misfit}); resume with the version of the code that "
            "made them, or give another output folder"
        )
    return None


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
