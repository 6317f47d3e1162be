"""Denoiser training steps against the loop of MONAI's 3d_ldm tutorial. Writes results/training-speed.json.

    python -m benchmarks.training_speed [--rounds 5] [--compile]
    python -m benchmarks.training_speed --checkpoint-gb 8.85     # how long a checkpoint holds a training up, and no more

The baseline is the tutorial's training step: `LatentDiffusionInferer` encodes the images at every step, Adam, no averaged
weights; on a GPU with its float16 autocast and gradient scaler, on a CPU in float32. Its images are in memory: reading is
not counted. Ours is `DiffusionTask.step` as in `brainsynth train-diffusion`: latents encoded once, gradient clipping, AdamW,
averaged weights. Both train the same network on the same covariates, with random weights and made-up data: only cost is
measured. Rungs alternate step by step in one process with one thread. The networks are those of benchmarks/ladder.py.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from monai.inferers import LatentDiffusionInferer
from monai.networks.schedulers import DDPMScheduler
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

REPO = Path(__file__).parents[1]

from benchmarks.ladder import FULL, NO_BFLOAT16, REDUCED, Size, build  # noqa: E402
from benchmarks.rounding import rounded  # noqa: E402
from brainsynth.config.training import DiffusionTrainConfig, OptimisationConfig, TrainRuntimeConfig  # noqa: E402
from brainsynth.models.autoencoder import Autoencoder  # noqa: E402
from brainsynth.models.device import has_bfloat16  # noqa: E402
from brainsynth.models.diffusion import Denoiser  # noqa: E402
from brainsynth.training import diffusion  # noqa: E402
from brainsynth.training.checkpoint import CheckpointWriter  # noqa: E402
from brainsynth.training.loop import Worker, optimise  # noqa: E402
from brainsynth.training.state import TrainingState  # noqa: E402

SUBJECTS = 16


class MadeUpTable(diffusion.LatentTable):
    """Latents of nobody."""

    def __init__(self, size: Size) -> None:
        shape = (SUBJECTS, *size.spec.latents.shape_cxyz)
        self.mean, self.sigma = torch.randn(shape), torch.full(shape, 0.1)
        self.context = torch.rand(SUBJECTS, size.spec.covariates.context_size)
        self.scans = pd.DataFrame()


class Network(nn.Module):
    """The denoiser, called as the tutorial's inferer calls its network."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """Prediction for (B, C, X, Y, Z)."""
        return self.denoiser(x, timesteps.float(), context)


class Tutorial:
    """The step of the tutorial's train_diffusion.py."""

    def __init__(
        self, autoencoder: Autoencoder, denoiser: Denoiser, size: Size, batch: int, device: torch.device
    ) -> None:
        self.device, self.batch = device, batch
        self.autoencoder, self.network = autoencoder.network, Network(copy.deepcopy(denoiser).requires_grad_(True))
        scheduler = DDPMScheduler(1000, "scaled_linear_beta", beta_start=0.0015, beta_end=0.0195)
        self.inferer = LatentDiffusionInferer(scheduler, scale_factor=1.0)
        self.optimizer = torch.optim.Adam(self.network.parameters(), 1e-5)
        self.mixed = device.type == "cuda"
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.mixed)
        factor = size.spec.autoencoder.factor
        self.images = torch.rand(batch, 1, *(n * factor for n in size.spec.latents.shape_cxyz[1:]))
        self.context = torch.rand(batch, size.spec.covariates.context_size)
        self.shape = (batch, *size.spec.latents.shape_cxyz)

    def step(self, number: int) -> Tensor:
        """One update; returns the loss."""
        images, context = self.images.to(self.device), self.context.to(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.float16, enabled=self.mixed):
            noise = torch.randn(self.shape).to(self.device)
            timesteps = torch.randint(0, 1000, (self.batch,), device=self.device).long()
            prediction = self.inferer(images, self.autoencoder, self.network, noise, timesteps, condition=context)
            loss = nn.functional.mse_loss(prediction.float(), noise.float())
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss


@dataclasses.dataclass(frozen=True)
class Kind:
    """One way to train."""

    name: str
    precision: str = "float32"
    channels_last: bool = False
    compiled: bool = False
    peer: bool = False


KINDS = (
    Kind("MONAI's 3d_ldm tutorial: encodes at every step", peer=True),
    Kind("ours: latents cached"),
    Kind("+ bfloat16", "bfloat16"),
    Kind("+ denoiser channels last", "bfloat16", channels_last=True),
    Kind("+ compiled", "bfloat16", compiled=True),
)


@contextmanager
def made_up_latents(size: Size) -> Iterator[None]:
    """While it lasts a DiffusionTask trains on made-up latents."""
    real = diffusion.LatentTable, diffusion.fit_distribution
    diffusion.LatentTable = lambda *ignored: MadeUpTable(size)  # type: ignore[assignment, misc]
    diffusion.fit_distribution = lambda *ignored: None  # type: ignore[assignment]
    try:
        yield
    finally:
        diffusion.LatentTable, diffusion.fit_distribution = real  # type: ignore[misc]


def ours(kind: Kind, size: Size, batch: int, device: torch.device) -> Callable[[int], Any]:
    """One step of our training as a function of its number."""
    options = OptimisationConfig(steps=1000, batch_size=batch, learning_rate=1e-5, precision=kind.precision)  # type: ignore[arg-type]
    config = DiffusionTrainConfig(
        latents="",
        autoencoder="",
        output="",
        architecture=size.spec.diffusion,
        schedule=size.spec.schedule,
        optimisation=options,
        conditioning_dropout=0.0,
        runtime=TrainRuntimeConfig(
            workers=0, threads_per_worker=torch.get_num_threads(), use_gpu=device.type == "cuda"
        ),
    )
    with made_up_latents(size):
        none: Any = None
        inputs = diffusion.Inputs(none, Path(), size.spec.covariates, size.spec.latents, "made up")
        task = diffusion.DiffusionTask(config, inputs, Worker(config.runtime, Path()))
    if kind.channels_last:
        task.learner.network.to(memory_format=torch.channels_last_3d)
    if kind.compiled:
        task.learner.parallel = torch.compile(task.learner.parallel)  # type: ignore[assignment]
    return lambda number: optimise(task, options, number, 0)


def kinds_here(device: torch.device) -> tuple[Kind, ...]:
    """On a CPU without bfloat16 the later kinds run in float32, and the one that only adds bfloat16 is left out."""
    if has_bfloat16(device):
        return KINDS
    return tuple(dataclasses.replace(kind, precision="float32") for kind in KINDS if kind.name != "+ bfloat16")


def now(device: torch.device) -> float:
    """CPU seconds of this process, or on a GPU seconds at which all work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.monotonic()
    return time.process_time()


def measure(size: Size, batch: int, rounds: int, device: torch.device, kinds: Sequence[Kind]) -> dict[str, Any]:
    """Seconds per step of each kind, in turn; the first round warms up. A kind that fails is left out with its reason."""
    autoencoder, denoiser = build(size, device)
    steps: dict[str, Callable[[int], Any]] = {}
    reasons: dict[str, str] = {}
    for kind in kinds:
        try:
            if kind.peer:
                steps[kind.name] = Tutorial(autoencoder, denoiser, size, batch, device).step
            else:
                steps[kind.name] = ours(kind, size, batch, device)
        except Exception as error:
            reasons[kind.name] = _reason(error)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name in list(steps):
            try:
                began = now(device)
                steps[name](number)
                seconds[name].append(now(device) - began)
            except Exception as error:
                reasons[name] = _reason(error)
                del steps[name], seconds[name]
    table = [
        {
            "kind": name,
            "s_per_step": statistics.median(found[1:]),
            "steps_per_s": 1 / statistics.median(found[1:]),
            "all": found[1:],
        }
        for name, found in seconds.items()
    ]
    for row in table:
        row["times_the_first"] = table[0]["s_per_step"] / row["s_per_step"]  # type: ignore[operator]
    return {"batch": batch, "rungs": table, "failed": reasons, "precision": kinds[-1].precision}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


def counted_steps(size: Size) -> dict[str, float]:
    """TFLOP per volume of a step: encoding, and the denoiser forward and backward. Nothing is computed."""
    meta = torch.device("meta")
    autoencoder, denoiser = build(size, meta)
    denoiser.requires_grad_(True)
    cells = size.spec.latents.shape_cxyz
    image = torch.empty(1, 1, *(n * size.spec.autoencoder.factor for n in cells[1:]), device=meta)
    z, context = torch.empty(1, *cells, device=meta), torch.empty(1, size.spec.covariates.context_size, device=meta)
    with FlopCounterMode(display=False) as encoding, torch.no_grad():
        autoencoder.encode(image)
    with FlopCounterMode(display=False) as training:
        denoiser(z, torch.empty(1, device=meta), context).sum().backward()
    encode, train = encoding.get_total_flops() / 1e12, training.get_total_flops() / 1e12
    return {"encode": encode, "train": train, "tutorial_over_ours": (encode + train) / train}


class OneStorage(TrainingState):
    """A state of many gigabytes whose tensors share half a one: only its copies take the memory of all."""

    def __init__(self, gigabytes: float) -> None:
        super().__init__({}, {}, {})
        shared = torch.randn(1 << 27)
        size = 1 << 20  # 4 MB, as an average tensor of the paper's UNet, its averages and its optimizer
        starts = [size * (number % (len(shared) // size)) for number in range(int(gigabytes * 1e9 / 4 / size))]
        self._parts = {f"{number:05d}": shared[start : start + size] for number, start in enumerate(starts)}

    def current(self) -> dict[str, Tensor]:
        return self._parts


def checkpoint(gigabytes: float, folder: Path) -> list[dict[str, float]]:
    """For two saves in turn: how long the training thread stands, and how long copying alone takes; wall and CPU time."""
    state = OneStorage(gigabytes)
    writer = CheckpointWriter(folder, state, "", keep=1)
    began = time.monotonic()
    writer.prepare()
    writer.wait()  # a training does steps meanwhile
    rows = [{"gigabytes": gigabytes, "prepared_s": time.monotonic() - began}]
    print(rounded(rows[0]), flush=True)
    for step in (1, 2):
        times: dict[str, float] = {}

        def timed(name: str, run: Callable[[], object], times: dict[str, float] = times) -> None:
            wall, cpu = time.monotonic(), time.thread_time()
            run()
            times[f"{name}_s"], times[f"{name}_cpu_s"] = time.monotonic() - wall, time.thread_time() - cpu

        timed("check", state.not_finite)
        timed("save", functools.partial(writer.save, step))
        timed("written", writer.wait)  # a training does steps meanwhile
        timed("copy", functools.partial(state.tensors, writer._copies))  # what of `save` is the copy
        for unit in ("s", "cpu_s"):
            times[f"stands_beyond_copy_{unit}"] = times[f"check_{unit}"] + times[f"save_{unit}"] - times[f"copy_{unit}"]
        rows.append({"gigabytes": gigabytes, "save": step, **times})
        print(rounded(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument(
        "--compile", action="store_true", help="also the compiled denoiser: minutes of compiling on a CPU"
    )
    parser.add_argument("--checkpoint-gb", type=float, help="measure this alone")
    parser.add_argument("--out", type=Path, default=REPO / "benchmarks" / "results" / "training-speed.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.checkpoint_gb:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint(arguments.checkpoint_gb, Path(folder))
        return
    found: dict[str, Any] = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(), "threads": 1}
    found["paper_tflop"] = counted_steps(FULL)
    found["reduced_tflop"] = counted_steps(REDUCED)
    cpu = torch.device("cpu")
    kinds = [kind for kind in kinds_here(cpu) if arguments.compile or not kind.compiled]
    found |= measure(REDUCED, arguments.batch, arguments.rounds, cpu, kinds)
    if not has_bfloat16(cpu):
        found["skipped"] = {"+ bfloat16": NO_BFLOAT16}
    arguments.out.write_text(json.dumps(rounded(found), indent=1) + "\n")
    print(json.dumps(rounded(found), indent=1))


if __name__ == "__main__":
    main()
