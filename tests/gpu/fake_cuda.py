"""CUDA without a GPU: the product's own classes on fake `cuda` tensors, which have shapes and devices, but no numbers.

Every storage is counted by device, so peaks are known to the byte that torch would ask for. They are lower bounds: cuDNN's
workspaces, fragmentation and the CUDA context (about 0.5 GB) are missing. No backward pass runs, as it would need the
device: what is alive when it begins is counted, and the blocks that would be computed again are.
"""

from __future__ import annotations

import collections
import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.utils.checkpoint as checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
TOO_LARGE = 2**31


class Memory(TorchDispatchMode):
    """What is alive on the fake device now, and was at the most; the largest tensor; where the CPU waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.largest, self.at_peak = 0, ""
        self.waits: collections.Counter[str] = collections.Counter()
        self.frames: list[Any] = []
        """Blocks that the backward pass will compute again."""
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.device.type == "cuda":
                self._count(tensor, str(func))
        return made

    def _count(self, tensor: Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self.largest = max(self.largest, size // tensor.element_size())
        self._seen[key] = size
        self.alive += size
        if self.alive > self.peak:
            self.peak, self.at_peak = self.alive, name

        def gone() -> None:
            self.alive -= self._seen.pop(key)

        weakref.finalize(storage, gone)

    def during(self, action: Callable[[], Any]) -> tuple[float, Any]:
        """The peak in GB while something is done, and its result."""
        self.peak = self.alive
        result = action()
        return self.peak / 1e9, result


@contextlib.contextmanager
def fake_cuda() -> Iterator[Memory]:
    """Inside, `cuda` tensors can be made and computed with, and what mixes devices raises, as on a GPU."""
    memory = Memory()
    with contextlib.ExitStack() as stack:
        for place, name, value in _patches(memory):
            stack.enter_context(mock.patch.object(place, name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(memory)
        yield memory


def _patches(memory: Memory) -> list[tuple[Any, str, Any]]:
    import torch.cuda.amp.common as common

    class Frame(checkpoint._CheckpointFrame):  # type: ignore[misc]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            memory.frames.append(self)

    found: list[tuple[Any, str, Any]] = [
        (checkpoint, "_CheckpointFrame", Frame),
        (common, "amp_definitely_not_available", lambda: False),
        (torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
        (nn.Module, "_apply", _apply),
        (torch.Tensor, "backward", lambda loss: _backward(loss, memory)),
        (torch.Tensor, "numpy", _numpy),
        (torch.Tensor, "new_tensor", _new_tensor),
    ]
    for name, value in (("tolist", _tolist), ("item", lambda _: 0.5), ("__float__", lambda _: 0.5),
                        ("__bool__", lambda _: True), ("__int__", lambda _: 1)):  # fmt: skip
        found.append((torch.Tensor, name, _read(name, value, memory)))
    return found


def _read(name: str, value: Callable[[Tensor], Any], memory: Memory) -> Callable[..., Any]:
    real = getattr(torch.Tensor, name)

    def read(self: Tensor, *args: Any) -> Any:
        if not isinstance(self, FakeTensor):
            return real(self, *args)
        if self.device.type == "cuda":
            memory.waits[name] += 1
        return value(self)

    return read


def _tolist(tensor: Tensor) -> Any:
    return np.full(tuple(tensor.shape), 0.5).tolist()


def _numpy(self: Tensor, *_: Any, **__: Any) -> Any:
    if not isinstance(self, FakeTensor):
        return np.asarray(self.detach())
    if self.device.type != "cpu":
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")
    return np.zeros(tuple(self.shape), str(self.dtype).removeprefix("torch."))


def _new_tensor(self: Tensor, data: Any) -> Tensor:
    """The real one writes into memory that a fake tensor does not have."""
    return torch.zeros(np.shape(data), dtype=self.dtype, device=self.device)


def _apply(self: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`Module._apply` with new parameters in place of changed ones: a fake tensor cannot take another's data."""
    for child in self.children() if recurse else ():
        child._apply(change)
    for name, parameter in self._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                changed = change(parameter)
            if changed is not parameter:
                self._parameters[name] = nn.Parameter(changed, parameter.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = change(buffer)
    return self


def _recomputed(frame: Any) -> None:
    """Compute a block again as its backward pass would, and forget it."""
    hook = checkpoint._recomputation_hook(weakref.ref(frame), 1)
    with contextlib.suppress(checkpoint._StopRecomputationError), hook, torch.enable_grad():
        frame.recompute_fn(*frame.get_inputs())
    frame.recomputed.clear()


def _backward(loss: Tensor, memory: Memory) -> None:
    """Visit the graph from its end: what is computed again is, and every leaf gets a gradient."""
    assert isinstance(loss, FakeTensor)
    assert loss.device.type == "cuda", f"a loss on {loss.device}"
    assert loss.grad_fn is not None
    nodes, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        todo += [following for following, _ in node.next_functions]
    for frame in reversed(memory.frames):
        _recomputed(frame)
    memory.frames.clear()
    for node in nodes:
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf.grad is None:
            with torch.no_grad():
                leaf.grad = torch.zeros_like(leaf)
