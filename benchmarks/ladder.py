"""Seconds per volume: the model zoo's loop against ours, rung by rung, with the same weights.

`python -m benchmarks.ladder`: whole loops on the paper's structure with a quarter of its channels and a 15th of its cells.
Rungs alternate in one process with one thread, so that load on the machine affects all alike. `--full` measures single
steps and whole decodes at the paper's own size (about 25 CPU minutes in float32, 12 GB) and computes the full loops from
them. FLOPs are counted at the paper's size. Weights are random: only cost is measured. How many steps a solver needs for
the same quality, and what a distilled decoder loses, are other measurements. Results are kept per CPU type in
results/ladder.json; `--figure` plots them.

Where the CPU has no bfloat16 instructions, bfloat16 runs hundreds of times slower; those rungs are skipped with that
reason, and the rungs after them run in float32.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from monai.networks.schedulers import DDIMScheduler
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from brainsynth.bundle.spec import BundleSpec, LatentSpec
from brainsynth.config.architectures import AutoencoderArchitecture, DecoderArchitecture
from brainsynth.config.distillation import DistillConfig
from brainsynth.config.load import load_config
from brainsynth.config.schema import SamplerConfig
from brainsynth.config.training import Precision
from brainsynth.models.autoencoder import Autoencoder, build_autoencoder
from brainsynth.models.device import autocast, has_bfloat16, layout, round_weights
from brainsynth.models.diffusion import Denoiser
from brainsynth.models.distilled_decoder import DistilledDecoder
from brainsynth.models.rewrites import rewrite
from brainsynth.models.sampling import guided, sample_latents
from brainsynth.models.schedule import NoiseSchedule
from brainsynth.stages.import_bundle import PAPER

REPO = Path(__file__).parents[1]
RESULT = REPO / "benchmarks" / "results" / "ladder.json"
CPU = torch.device("cpu")
Networks = tuple[Autoencoder, Denoiser]


@dataclasses.dataclass(frozen=True)
class Size:
    """The networks of a ladder: a bundle's record, and a distilled decoder for it."""

    spec: BundleSpec
    distilled: DecoderArchitecture


FULL = Size(PAPER, load_config(REPO / "configs" / "paper" / "distill-decoder.yaml", DistillConfig).architecture)
REDUCED = Size(
    dataclasses.replace(
        PAPER,
        autoencoder=AutoencoderArchitecture(channels=(16, 32, 32, 32), latent_channels=3, norm_groups=8),
        diffusion=dataclasses.replace(PAPER.diffusion, channels=(64, 128, 192), norm_groups=32),
        latents=LatentSpec(shape_cxyz=(3, 8, 12, 8), shift=(0.0,) * 3, scale=(1.0,) * 3),
    ),
    dataclasses.replace(FULL.distilled, channels=tuple(c // 4 for c in FULL.distilled.channels), norm_groups=4),
)


@dataclasses.dataclass(frozen=True)
class Rung:
    """One way to make volumes; each adds something to the one before."""

    name: str
    method: str
    steps: int
    precision: Precision = "float32"
    rewrites: bool = True
    batch: int = 1
    distilled: bool = False
    decode_batch: int = 0
    """Volumes that are decoded together; 0: the whole micro-batch."""


RUNGS = (
    Rung("the zoo's loop: float32, one volume at a time, MONAI's DDIM", "monai", 50, rewrites=False),
    Rung("+ exact rewrites, decoder channels last", "ddim", 50),
    Rung("+ bfloat16, weights rounded once", "ddim", 50, "bfloat16"),
    Rung("+ UniPC, 12 steps", "unipc", 12, "bfloat16"),
    Rung("+ micro-batch of 4", "unipc", 12, "bfloat16", batch=4),
    Rung("8 steps in place of 12", "unipc", 8, "bfloat16", batch=4),
    Rung("+ distilled decoder, 8 steps", "unipc", 8, "bfloat16", batch=4, distilled=True),
)
NO_BFLOAT16 = "this CPU has no bfloat16 instructions that torch uses"


def rungs_here(rungs: tuple[Rung, ...] = RUNGS) -> tuple[Rung, ...]:
    """The rungs that this CPU can run: without bfloat16, in float32, and without the rung that only adds bfloat16."""
    if has_bfloat16(CPU):
        return rungs
    return tuple(dataclasses.replace(rung, precision="float32") for rung in rungs if "bfloat16" not in rung.name)


def build(size: Size, device: torch.device = CPU) -> Networks:
    """Both networks with random weights; the distilled decoder is not set."""
    torch.manual_seed(0)
    spec = size.spec
    with device:
        autoencoder = Autoencoder(build_autoencoder(spec.autoencoder), spec.latents, spec.flipped_axes)
        denoiser = Denoiser(spec.diffusion, spec.latents.shape_cxyz[0], spec.covariates.context_size)
    for module in (autoencoder, denoiser):
        for parameter in module.parameters():
            if not parameter.is_meta and not parameter.any():
                nn.init.normal_(parameter, std=0.02)  # fresh networks answer zero
        module.requires_grad_(False).eval()
    return autoencoder, denoiser


def arranged(networks: Networks, rung: Rung, size: Size) -> Networks:
    """The networks as `load_models` would give them for this rung."""
    autoencoder, denoiser = networks
    if rung.distilled:
        with next(autoencoder.network.parameters()).device:
            autoencoder.distilled = DistilledDecoder(size.distilled, size.spec.autoencoder).requires_grad_(False)
    if rung.rewrites:
        rewrite(autoencoder, denoiser)
        layout(autoencoder)
    if rung.precision == "bfloat16":
        round_weights(autoencoder)
        round_weights(denoiser)
    return autoencoder, denoiser


def monai_volume(networks: Networks, noise: Tensor, context: Tensor, steps: int) -> Tensor:
    """The zoo's sampler: MONAI's scheduler, covariates as planes and as one token, then the decoder (float16 on a GPU)."""
    scheduler = DDIMScheduler(beta_start=0.0015, beta_end=0.0205, schedule="scaled_linear_beta", clip_sample=False)
    scheduler.set_timesteps(steps)
    denoiser = networks[1]
    planes = context[:, :, None, None, None].expand(-1, -1, *noise.shape[2:])
    for t in scheduler.timesteps:
        at = torch.tensor([float(t)], device=noise.device)
        prediction = denoiser.unet(torch.cat([noise, planes], 1), at, context[:, None])
        noise, _ = scheduler.step(prediction, int(t), noise)
    return _monai_decoded(networks, noise)


def _monai_decoded(networks: Networks, z: Tensor) -> Tensor:
    with torch.autocast(z.device.type, torch.float16, enabled=z.device.type == "cuda"):
        image: Tensor = networks[0].network.decode(z)
    return image


def inputs(size: Size, batch: int, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """Noise and context of a micro-batch, always the same."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(batch, *size.spec.latents.shape_cxyz, generator=generator)
    return noise.to(device), torch.rand(batch, size.spec.covariates.context_size, generator=generator).to(device)


@torch.no_grad()
def volumes(networks: Networks, rung: Rung, size: Size, device: torch.device = CPU) -> Tensor:
    """One micro-batch of this rung."""
    noise, context = inputs(size, rung.batch, device)
    if rung.method == "monai":
        return monai_volume(networks, noise, context, rung.steps)
    schedule = NoiseSchedule(size.spec.schedule)
    with autocast(device, rung.precision):
        sampler = SamplerConfig(method=rung.method, steps=rung.steps)  # type: ignore[arg-type]
        z = sample_latents(guided(networks[1], context, 1.0), noise, schedule, sampler)
    return decoded(networks, z, rung)


def decoded(networks: Networks, z: Tensor, rung: Rung) -> Tensor:
    """The images of latents, as this rung decodes them."""
    if rung.method == "monai":
        return _monai_decoded(networks, z)
    with autocast(z.device, rung.precision):
        return torch.cat([networks[0].decode(part) for part in z.split(rung.decode_batch or len(z))])


def timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Result and CPU seconds of this process."""
    began = time.process_time()
    result = run()
    return result, round(time.process_time() - began, 3)


def counted(size: Size, rung: Rung) -> dict[str, float]:
    """TFLOP of one denoiser evaluation and of one decode, batch 1, and of a whole volume of this rung."""
    meta = torch.device("meta")
    autoencoder, denoiser = arranged(build(size, meta), dataclasses.replace(rung, precision="float32"), size)
    z = torch.empty(1, *size.spec.latents.shape_cxyz, device=meta)
    context = torch.empty(1, size.spec.covariates.context_size, device=meta)
    found = {}
    for name, run in (
        ("step", lambda: denoiser(z, torch.empty(1, device=meta), context)),
        ("decode", lambda: autoencoder.decode(z)),
    ):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        found[name] = counter.get_total_flops() / 1e12
    return {**found, "volume": rung.steps * found["step"] + found["decode"]}


def reduced(rounds: int, size: Size = REDUCED) -> list[dict[str, Any]]:
    """Whole loops on the reduced networks, rungs in turn; the first round warms up."""
    networks, rungs = build(size), rungs_here()
    ready = [(rung, arranged(copy.deepcopy(networks), rung, size)) for rung in rungs]
    seconds: list[list[float]] = [[] for _ in rungs]
    for _ in range(rounds + 1):
        for (rung, pair), found in zip(ready, seconds, strict=True):
            found.append(timed(lambda pair=pair, rung=rung: volumes(pair, rung, size))[1] / rung.batch)
    base = statistics.median(seconds[0][1:])
    return [
        {
            "rung": rung.name,
            "precision": rung.precision,
            "cpu_s_per_volume": round(statistics.median(found[1:]), 3),
            "cpu_s_all": [round(value, 3) for value in found[1:]],
            "times_fewer": round(base / statistics.median(found[1:]), 2),
            "paper_tflop": round(counted(FULL, rung)["volume"], 1),
        }
        for rung, found in zip(rungs, seconds, strict=True)
    ]


@torch.no_grad()
def step_seconds(denoiser: Denoiser, rung: Rung, size: Size, rounds: int) -> tuple[float, Tensor]:
    """CPU seconds of one evaluation per volume of the micro-batch (median), and what it answers for the first one."""
    noise, context = inputs(size, rung.batch)
    times = torch.full((rung.batch,), 979.0)
    with autocast(CPU, rung.precision):
        runs = [timed(lambda: denoiser(noise, times, context)) for _ in range(rounds)]
    return statistics.median(seconds for _, seconds in runs) / rung.batch, runs[0][0][:1]


@torch.no_grad()
def decode_seconds(autoencoder: Autoencoder, rung: Rung, size: Size) -> float:
    """CPU seconds of one whole decode."""
    with autocast(CPU, rung.precision):
        return timed(lambda: autoencoder.decode(inputs(size, 1)[0]))[1]


def full(rounds: int, size: Size = FULL) -> dict[str, Any]:
    """One denoiser evaluation and one whole decode of each different kind, and what each rung's loop comes to by them.

    A step is measured `rounds` times and counted at its median, a decode once, for it takes minutes.
    """
    steps: dict[tuple[Any, ...], float] = {}
    decodes: dict[tuple[Any, ...], float] = {}
    answers: dict[str, Tensor] = {}
    rungs = rungs_here()
    for rung in rungs:
        step, decode = _kinds(rung)
        if step in steps and decode in decodes:
            continue
        networks = arranged(build(size), rung, size)  # made when their turn comes: two pairs need too much memory
        if step not in steps:
            steps[step], answer = step_seconds(networks[1], rung, size, rounds)
            if rung.batch == 1:  # a larger micro-batch has other noise
                answers[f"{rung.precision}, {'rewritten' if rung.rewrites else 'plain'}"] = answer
            print("step", step, steps[step], flush=True)
        networks = networks[:1]  # type: ignore[assignment]
        gc.collect()
        if decode not in decodes:
            decodes[decode] = decode_seconds(networks[0], rung, size)
            print("decode", decode, decodes[decode], flush=True)
    table = []
    for rung in rungs:
        step_s, decode_s = steps[_kinds(rung)[0]], decodes[_kinds(rung)[1]]
        row: dict[str, Any] = {"rung": rung.name, "precision": rung.precision}
        row |= {"step_cpu_s": round(step_s, 2), "decode_cpu_s": round(decode_s, 2)}
        row |= {"cpu_s_per_volume": round(rung.steps * step_s + decode_s, 1)}
        row |= {"times_fewer": 0.0, "paper_tflop": round(counted(size, rung)["volume"], 1)}
        table.append(row)
    for row in table:
        row["times_fewer"] = round(table[0]["cpu_s_per_volume"] / row["cpu_s_per_volume"], 2)
    plain = next(iter(answers.values()))
    differences = {kind: float((found - plain).norm() / plain.norm()) for kind, found in answers.items()}
    return {"rungs": table, "step_differences": differences}


def _kinds(rung: Rung) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Rungs of one kind share what a step, and what a decode, costs."""
    return (rung.precision, rung.rewrites, rung.batch), (rung.precision, rung.rewrites, rung.distilled)


def draw(found: dict[str, Any], path: Path) -> None:
    """CPU seconds per volume by rung, one panel per measurement."""
    from matplotlib.figure import Figure

    kept = [
        (cpu, kind, entry[kind])
        for cpu, entry in found["cpus"].items()
        for kind in ("reduced", "full")
        if kind in entry
    ]
    figure = Figure(figsize=(10, 2.6 * len(kept)), layout="constrained")
    for axes, (cpu, kind, entry) in zip(figure.subplots(len(kept), squeeze=False)[:, 0], kept, strict=True):
        rows = entry["rungs"] if kind == "full" else entry
        what = {"reduced": "whole loops, reduced networks", "full": "paper size, from single steps and decodes"}
        title = f"{cpu}: {what[kind]}"
        names = [f"{row['rung'].split(':')[0]} ({row['precision']})" for row in rows]
        bars = axes.barh(names, [row["cpu_s_per_volume"] for row in rows], color="#4477aa")
        axes.bar_label(
            bars, [f"{row['cpu_s_per_volume']:,.2f} s  {row['times_fewer']:.1f}×" for row in rows], padding=3
        )
        axes.invert_yaxis()
        axes.margins(x=0.25)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("CPU seconds per volume, one thread")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print the table and write benchmarks/results/ladder.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="instead: single steps and decodes at the paper's size")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--figure", type=Path, help="draw the kept results into this file as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"cpus": {}}
    entry = found["cpus"].setdefault(torch.backends.cpu.get_cpu_capability(), {})
    entry |= {"torch": torch.__version__, "threads": 1, "bfloat16": True if has_bfloat16(CPU) else NO_BFLOAT16}
    if arguments.full:
        entry["full"] = full(arguments.rounds)
    else:
        entry["reduced"] = reduced(arguments.rounds)
    found["paper_tflop"] = {
        name: {key: round(value, 3) for key, value in counted(FULL, rung).items() if key != "volume"}
        for name, rung in (("plain", RUNGS[0]), ("rewritten", RUNGS[1]), ("distilled", RUNGS[-1]))
    }
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(entry, indent=1))
    if arguments.figure:
        draw(found, arguments.figure)


if __name__ == "__main__":
    main()
