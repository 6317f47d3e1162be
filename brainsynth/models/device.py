"""The only place that chooses device, precision and threads; each choice is printed with its reason."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
from collections.abc import Iterator

import torch
from torch import nn

from brainsynth.config.training import Precision
from brainsynth.errors import UserError, WorkerBroken
from brainsynth.models.cpus import threads_of_worker

log = logging.getLogger(__name__)


def choose_device(use_gpu: bool) -> torch.device:
    """A GPU when asked for, else the CPU. Raises UserError when the GPU that was asked for cannot be used."""
    if not use_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"runtime: a GPU was asked for, but {why_no_gpu()}; fix that, or set runtime.gpus_per_worker to 0 (in a "
            "training runtime.use_gpu to false) to compute on the CPU"
        )
    from brainsynth.models.driver import nvidia_driver  # only where a GPU is asked for

    index = torch.cuda.current_device()
    name, cuda, driver = torch.cuda.get_device_name(index), torch.version.cuda, nvidia_driver()
    log.info("device cuda:%d (%s): as asked for; CUDA %s of torch, NVIDIA driver %s", index, name, cuda, driver)
    return torch.device("cuda", index)


def why_no_gpu() -> str:
    """Why torch cannot use a GPU in this process: its CUDA, and the driver found and needed."""
    from brainsynth.models.driver import needed_driver, nvidia_driver

    cuda, driver = torch.version.cuda, nvidia_driver()
    found = "no NVIDIA driver was found here" if driver is None else f"the driver found here is {driver}"
    if cuda is None:
        return f"torch {torch.__version__} is built without CUDA ({found}): install a build of torch with CUDA"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        reason = "it sees no device"
    except Exception as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if visible is None else f"; CUDA_VISIBLE_DEVICES is {visible!r}"
    return (
        f"torch {torch.__version__} cannot use one here: its CUDA {cuda} needs {needed_driver(cuda)}, and {found} "
        f"({reason}{hidden})"
    )


def count_accelerators() -> int:
    """GPUs that this process can see."""
    return torch.cuda.device_count()


def set_threads(threads: int, workers: int) -> int:
    """Limit torch to `threads` CPU threads; when 0, to the CPUs that are this worker's. Returns the number."""
    chosen = threads or threads_of_worker(workers)
    torch.set_num_threads(chosen)
    return chosen


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread inside: on small grids oneDNN splits the sums of a convolution over threads, and rounds otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[None]:
    """Run a network's forward pass in bfloat16; parameters, losses and solver state stay float32."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def in_float32(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """No autocast inside: for what bfloat16 would spoil. On the meta device, which has none, nothing."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 that torch uses; without them convolutions run 300 times slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def able(device: torch.device, precision: Precision) -> Precision:
    """`precision`, or float32, with a warning, where that is bfloat16 and the device has no instructions for it.

    For trainings and rulers. A dataset's precision is part of its identity and stays what was asked for.
    """
    if precision == "float32" or has_bfloat16(device):
        return precision
    log.warning("precision float32: %s has no instructions for bfloat16, which was asked for", device)
    return "float32"


def explain(device: torch.device, precision: str, rewrites: bool, attention: str) -> None:
    """Log in one line how the networks of a generation run; `attention`: of the denoiser, in words."""
    if precision == "bfloat16":
        how = "bfloat16 by autocast (each kind of convolution agrees with float32 here; norms and solver state are float32)"
    else:
        how = "float32"
        if device.type == "cuda":
            how += f" (TF32 in convolutions {'allowed' if torch.backends.cudnn.allow_tf32 else 'off'}, as torch has it)"
    facts = [
        how,
        "decoder channels last, denoiser plain (faster on CPUs; on a GPU not measured)",
        f"attention {attention}",
    ]
    if device.type == "cuda":
        facts.append(f"cuDNN's search for algorithms {'on' if torch.backends.cudnn.benchmark else 'off'}")
    facts.append(f"exact rewrites {'on (they differ by rounding)' if rewrites else 'off'}")
    log.info("networks on %s: %s", device, "; ".join(facts))
    if precision == "bfloat16" and not has_bfloat16(device):
        log.warning("%s has no instructions for bfloat16: this run may take hundreds of times as long", device)


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


def round_weights(module: nn.Module) -> nn.Module:
    """Weights of convolutions and linear maps in bfloat16, for use under `autocast(…, "bfloat16")`.

    The results are the same to the last bit: autocast rounds the same weights, but does so again at every call. Norms
    stay float32. Casting the whole network instead fails on CPUs (average pooling) and where attention is upcast.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv3d | nn.ConvTranspose3d | nn.Linear):
            part.to(torch.bfloat16)
    return module


_CUDA_ERROR_MEMORY_ALLOCATION = 2
_ALLOCATION_FAILED = (
    "can't allocate memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # its handle did not fit
    "unable to find an engine to execute this computation",  # cuDNN's, when no workspace fits
)


def is_out_of_memory(error: BaseException) -> bool:
    """True when a smaller batch may succeed where this one did not."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, torch.AcceleratorError):
        return getattr(error, "error_code", None) == _CUDA_ERROR_MEMORY_ALLOCATION
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATION_FAILED)


def is_broken(error: BaseException) -> bool:
    """True when the accelerator of this process is of no further use: after such an error every later call fails too."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


class MicroBatch:
    """How many rows go through the networks together: fewer, for the rest of a worker's life, once they did not fit."""

    def __init__(self, size: int) -> None:
        self.size = size

    def shrink(self, error: Exception) -> None:
        """Prepare another try with half as many rows; raises where that cannot help."""
        if is_broken(error):
            raise WorkerBroken(f"the accelerator failed: {error}") from error
        if not is_out_of_memory(error) or self.size == 1:
            raise error
        self.size //= 2
        free_memory()
        log.warning("out of memory: the micro-batch is now %d", self.size)


def ready_to_copy(tensor: torch.Tensor) -> torch.Tensor:
    """In memory from which an accelerator copies without anybody waiting for it."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def wait_for_copies() -> None:
    """Until everything that was asked of the accelerator is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free_memory() -> None:
    """Give cached accelerator memory back, so that a smaller batch finds room."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
