"""Checkpoints: a new directory each, digests inside, renamed into place when complete; no pickle.

```
checkpoints/step-000200/checkpoint.json   sealed: step, config digest, file digests, optimizer settings
                        tensors.safetensors
```
The newest directory that proves whole is resumed; a damaged one is named in a warning and passed over.
"""

from __future__ import annotations

import logging
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from brainsynth.errors import UserError
from brainsynth.models.weights import file_sha256
from brainsynth.records import record, seal, unseal
from brainsynth.storage.filesystem import sync
from brainsynth.training.ema import Ema

log = logging.getLogger(__name__)
_RECORD, _TENSORS = "checkpoint.json", "tensors.safetensors"


@record
class CheckpointRecord:
    """What a checkpoint holds."""

    step: int
    """Steps done."""
    config_digest: str
    tensors_sha256: str
    ema_updates: dict[str, int]
    optimizer_groups: dict[str, list[dict[str, Any]]]


class TrainingState:
    """Everything that a step changes: networks, their averages, optimizers."""

    def __init__(
        self, modules: dict[str, nn.Module], averages: dict[str, Ema], optimizers: dict[str, torch.optim.Optimizer]
    ) -> None:
        self.modules, self.averages, self.optimizers = modules, averages, optimizers

    def tensors(self) -> dict[str, Tensor]:
        """All tensors under dotted names."""
        found: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            found |= {f"module.{name}.{key}": value for key, value in module.state_dict().items()}
        for name, average in self.averages.items():
            found |= {f"ema.{name}.{key}": value for key, value in average.state().items()}
        for name, optimizer in self.optimizers.items():
            for index, slots in optimizer.state_dict()["state"].items():
                found |= {f"optimizer.{name}.{index}.{slot}": torch.as_tensor(value) for slot, value in slots.items()}
        return {key: value.detach().cpu().contiguous().clone() for key, value in found.items()}

    def load(self, tensors: dict[str, Tensor], saved: CheckpointRecord) -> None:
        """Put everything back."""
        for name, module in self.modules.items():
            module.load_state_dict(_below(tensors, f"module.{name}."))
        for name, average in self.averages.items():
            average.load(_below(tensors, f"ema.{name}."), saved.ema_updates[name])
        for name, optimizer in self.optimizers.items():
            slots: dict[int, dict[str, Tensor]] = {}
            for key, value in _below(tensors, f"optimizer.{name}.").items():
                index, slot = key.split(".", 1)
                slots.setdefault(int(index), {})[slot] = value
            optimizer.load_state_dict({"state": slots, "param_groups": saved.optimizer_groups[name]})


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def save_checkpoint(folder: Path, state: TrainingState, step: int, config_digest: str, keep: int) -> Path:
    """Write `checkpoints/step-NNNNNN` whole or not at all, then drop all but the newest `keep`."""
    root = folder / "checkpoints"
    final = root / f"step-{step:06d}"
    if final.exists():
        shutil.rmtree(final)
    temporary = root / f".tmp-{uuid.uuid4().hex}"
    temporary.mkdir(parents=True)
    save_file(state.tensors(), temporary / _TENSORS)
    groups = {name: optimizer.state_dict()["param_groups"] for name, optimizer in state.optimizers.items()}
    saved = CheckpointRecord(
        step=step,
        config_digest=config_digest,
        tensors_sha256=file_sha256(temporary / _TENSORS),
        ema_updates={name: average.updates for name, average in state.averages.items()},
        optimizer_groups=groups,
    )
    (temporary / _RECORD).write_bytes(seal(saved))
    for path in (temporary / _TENSORS, temporary / _RECORD, temporary):
        sync(path)
    temporary.rename(final)
    sync(root)
    for old in sorted(root.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    for stray in root.glob(".tmp-*"):
        shutil.rmtree(stray, ignore_errors=True)
    return final


def restore_newest(folder: Path, state: TrainingState, config_digest: str) -> int:
    """Load the newest whole checkpoint into `state`; returns the steps done, 0 when there is none.

    Raises:
        UserError: when the newest whole checkpoint was made with another config.
    """
    for path in sorted((folder / "checkpoints").glob("step-*"), reverse=True):
        try:
            saved = unseal(CheckpointRecord, (path / _RECORD).read_bytes(), str(path / _RECORD))
            if file_sha256(path / _TENSORS) != saved.tensors_sha256:
                raise UserError(f"{path / _TENSORS} does not match its sha256")
        except (OSError, UserError) as error:
            log.warning("checkpoint %s is damaged and is passed over: %s", path.name, error)
            continue
        if saved.config_digest != config_digest:
            raise UserError(
                f"{folder} holds a training with another config (checkpoint {path.name}); "
                "give another output folder, or the same config to resume"
            )
        state.load(load_file(path / _TENSORS), saved)
        return saved.step
    return 0
