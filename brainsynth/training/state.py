"""Everything that a training step changes, as named tensors, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from brainsynth.models.device import wait_for_copies
from brainsynth.training.ema import Ema

Groups = dict[str, list[dict[str, Any]]]


class TrainingState:
    """Networks, their averages, optimizers."""

    def __init__(
        self, modules: dict[str, nn.Module], averages: dict[str, Ema], optimizers: dict[str, torch.optim.Optimizer]
    ) -> None:
        self.modules, self.averages, self.optimizers = modules, averages, optimizers

    def tensors(self, into: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Copies of all tensors on the CPU, under dotted names.

        Args:
            into: copies of before, whose memory is used again; from a GPU it is pinned.
        """
        kept = {} if into is None else into
        current = self.current()
        for key, value in current.items():
            old = kept.get(key)
            if old is None or (old.shape, old.dtype) != (value.shape, value.dtype):
                kept[key] = room_for(value)
            kept[key].copy_(value, non_blocking=True)
        wait_for_copies()
        return {key: kept[key] for key in current}

    def current(self) -> dict[str, Tensor]:
        """All tensors as they are, under dotted names; an optimizer's exist from the first step on."""
        tensors = self._fixed()
        for name, optimizer in self.optimizers.items():
            for index, slots in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{name}.{index}.{slot}": torch.as_tensor(value) for slot, value in slots.items()}
        return {key: value.detach() for key, value in tensors.items()}

    def _fixed(self) -> dict[str, Tensor]:
        """The tensors that are there from the start: those of the networks and of their averages."""
        tensors: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            tensors |= {f"module.{name}.{key}": value for key, value in module.state_dict().items()}
        for name, average in self.averages.items():
            tensors |= {f"ema.{name}.{key}": value for key, value in average.state().items()}
        return tensors

    def not_finite(self) -> list[str]:
        """Names of the tensors that hold a value that is not finite."""
        tensors = {name: value for name, value in self.current().items() if value.is_floating_point()}
        sums = [value.sum() for value in tensors.values()]  # an eighth of the time; a sound tensor's may overflow
        doubtful = [name for name, total in zip(tensors, sums, strict=True) if not torch.isfinite(total)]
        return [name for name in doubtful if not torch.isfinite(tensors[name]).all()]

    def ema_updates(self) -> dict[str, int]:
        """How often each average was updated."""
        return {name: average.updates for name, average in self.averages.items()}

    def optimizer_groups(self) -> Groups:
        """The settings of each optimizer."""
        return {name: optimizer.state_dict()["param_groups"] for name, optimizer in self.optimizers.items()}

    def problems(self, tensors: dict[str, Tensor], ema_updates: dict[str, int], groups: Groups) -> list[str]:
        """Why these cannot be loaded, all of it, so that `load` never stops half-way; nothing is changed."""
        fixed = self._fixed()
        problems = [f"{key} is missing" for key in fixed if key not in tensors]
        problems += [
            f"{key} is {tensors[key].dtype} {tuple(tensors[key].shape)}, not {value.dtype} {tuple(value.shape)}"
            for key, value in fixed.items()
            if key in tensors and (tensors[key].shape != value.shape or tensors[key].dtype != value.dtype)
        ]
        rest = {key: value for key, value in tensors.items() if key not in fixed}
        for name, optimizer in self.optimizers.items():
            mine = {key: rest.pop(key) for key in list(rest) if key.startswith(f"optimizer.{name}.")}
            problems += _slot_problems(mine, f"optimizer.{name}.", optimizer)
            if _members(groups.get(name, [])) != _members(optimizer.state_dict()["param_groups"]):
                problems.append(f"optimizer {name} has other parameters")
        problems += [f"{key} is unknown" for key in rest]
        if set(ema_updates) != set(self.averages) or any(count < 0 for count in ema_updates.values()):
            problems.append(f"averages {sorted(ema_updates)}, not {sorted(self.averages)}")
        return problems

    def load(self, tensors: dict[str, Tensor], ema_updates: dict[str, int]) -> None:
        """Put everything back; `problems` must have returned none."""
        for name, module in self.modules.items():
            module.load_state_dict(_below(tensors, f"module.{name}."))
        for name, average in self.averages.items():
            average.load(_below(tensors, f"ema.{name}."), ema_updates[name])
        for name, optimizer in self.optimizers.items():
            slots: dict[int, dict[str, Tensor]] = {}
            for key, value in _below(tensors, f"optimizer.{name}.").items():
                index, slot = key.split(".", 1)
                slots.setdefault(int(index), {})[slot] = value
            # The settings come from the config, which is the same, and the learning rate is set before every step.
            optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})


def room_for(value: Tensor) -> Tensor:
    """Memory for a copy of a tensor on the CPU; pinned if it is on a GPU."""
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=value.device.type != "cpu")


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _members(groups: list[dict[str, Any]]) -> list[Any]:
    return [group.get("params") for group in groups]


def _slot_problems(tensors: dict[str, Tensor], prefix: str, optimizer: torch.optim.Optimizer) -> list[str]:
    """What an optimizer remembers: for each parameter nothing, or the same slots of its own shape or single numbers."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    problems: list[str] = []
    names: dict[str, set[str]] = {}
    for key, value in tensors.items():
        index, _, slot = key.removeprefix(prefix).partition(".")
        if not index.isdecimal() or int(index) >= len(parameters):
            problems.append(f"{key} belongs to no parameter")
            continue
        names.setdefault(index, set()).add(slot)
        if value.ndim and value.shape != parameters[int(index)].shape:
            problems.append(f"{key} has shape {tuple(value.shape)}, not {tuple(parameters[int(index)].shape)}")
    if any(slots != _ADAM_SLOTS for slots in names.values()):
        problems.append(f"{prefix[:-1]}: not what AdamW remembers")
    return problems


_ADAM_SLOTS = {"step", "exp_avg", "exp_avg_sq"}
