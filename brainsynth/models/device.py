"""The only place that chooses device, precision and threads; each choice is printed with its reason."""

from __future__ import annotations

import contextlib
import logging
import os
import platform

import torch
from torch import nn

log = logging.getLogger(__name__)


def choose_device(use_gpu: bool) -> torch.device:
    """A GPU when asked for and there, else the CPU."""
    if use_gpu and torch.cuda.is_available():
        index = torch.cuda.current_device()
        log.info("device cuda:%d (%s): asked for and available", index, torch.cuda.get_device_name(index))
        return torch.device("cuda", index)
    if use_gpu:
        log.warning("device cpu: a GPU was asked for, but none is visible to this process")
    return torch.device("cpu")


def count_accelerators() -> int:
    """GPUs that this process can see."""
    return torch.cuda.device_count()


def set_threads(threads: int, workers: int) -> int:
    """Limit torch to `threads` CPU threads, or to an even share of the cores when 0. Returns the number."""
    chosen = threads or max(1, (os.cpu_count() or 1) // max(1, workers))
    torch.set_num_threads(chosen)
    return chosen


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[None]:
    """Run a network's forward pass in bfloat16; parameters, losses and solver state stay float32."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def describe(device: torch.device) -> dict[str, str | int | float]:
    """Facts of this process for a commit record."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "host": platform.node(),
        "device": f"{device.type} {name}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def layout(module: nn.Module) -> nn.Module:
    """Channels-last weights: 3D convolutions with few channels run up to twice as fast on CPUs, and on tensor cores."""
    return module.to(memory_format=torch.channels_last_3d)


def is_out_of_memory(error: BaseException) -> bool:
    """True when a smaller batch may succeed where this one did not."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def is_broken(error: BaseException) -> bool:
    """True when the accelerator of this process is of no more use: after such an error every later call fails too."""
    return isinstance(error, torch.AcceleratorError)


def free_memory() -> None:
    """Give cached accelerator memory back, so that a smaller batch finds room."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
