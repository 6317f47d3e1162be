"""CPU seconds per volume: the model zoo's loop against ours, rung by rung, with the same weights.

`python benchmarks/ladder.py`: whole loops on the paper's structure with a quarter of its channels and a 15th of its cells,
rungs in turn in one process with one thread, so that a busy machine burdens all alike. `--full` measures single steps at
the paper's own size, which tell what the small ratios are worth there. FLOPs are counted at the paper's size. Weights are
random: this measures cost alone; how many steps a solver needs for the same quality is another measurement.
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

from brainsynth.bundle import BundleSpec, LatentSpec
from brainsynth.config.architectures import AutoencoderArchitecture
from brainsynth.config.schema import SamplerConfig
from brainsynth.models.autoencoder import Autoencoder, build_autoencoder
from brainsynth.models.device import autocast, layout, round_weights
from brainsynth.models.diffusion import Denoiser
from brainsynth.models.rewrites import rewrite
from brainsynth.models.sampling import guided, sample_latents
from brainsynth.models.schedule import NoiseSchedule
from brainsynth.published import PAPER

RESULT = Path(__file__).parents[1] / "docs" / "ladder.json"
CPU = torch.device("cpu")
REDUCED = dataclasses.replace(
    PAPER,
    autoencoder=AutoencoderArchitecture(channels=(16, 32, 32, 32), latent_channels=3, norm_groups=8),
    diffusion=dataclasses.replace(PAPER.diffusion, channels=(64, 128, 192), norm_groups=32),
    latents=LatentSpec(shape_cxyz=(3, 8, 12, 8), shift=(0.0,) * 3, scale=(1.0,) * 3),
)
Networks = tuple[Autoencoder, Denoiser]


@dataclasses.dataclass(frozen=True)
class Rung:
    """One way to make volumes; each adds something to the one before."""

    name: str
    method: str
    steps: int
    precision: str = "float32"
    rewrites: bool = True
    batch: int = 1


RUNGS = (
    Rung("the zoo's loop: float32, one volume at a time, MONAI's DDIM", "monai", 50, rewrites=False),
    Rung("+ exact rewrites, decoder channels last", "ddim", 50),
    Rung("+ bfloat16, weights rounded once", "ddim", 50, "bfloat16"),
    Rung("+ UniPC, 12 steps", "unipc", 12, "bfloat16"),
    Rung("+ micro-batch of 4", "unipc", 12, "bfloat16", batch=4),
    Rung("8 steps in place of 12", "unipc", 8, "bfloat16", batch=4),
)


def build(spec: BundleSpec) -> Networks:
    """Both networks with random weights."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(build_autoencoder(spec.autoencoder), spec.latents, spec.flipped_axes)
    denoiser = Denoiser(spec.diffusion, 3, 4)
    for module in (autoencoder, denoiser):
        for parameter in module.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)  # fresh networks answer zero
        module.requires_grad_(False).eval()
    return autoencoder, denoiser


def arranged(networks: Networks, rung: Rung) -> Networks:
    """The networks as `load_models` would give them for this rung."""
    autoencoder, denoiser = networks
    if rung.rewrites:
        rewrite(autoencoder, denoiser)
        layout(autoencoder.network)
    if rung.precision == "bfloat16":
        round_weights(autoencoder)
        round_weights(denoiser)
    return autoencoder, denoiser


def monai_volume(networks: Networks, noise: Tensor, context: Tensor, steps: int) -> Tensor:
    """The zoo's sampler: MONAI's scheduler, covariates as planes and as one token, then the decoder."""
    scheduler = DDIMScheduler(beta_start=0.0015, beta_end=0.0205, schedule="scaled_linear_beta", clip_sample=False)
    scheduler.set_timesteps(steps)
    autoencoder, denoiser = networks
    planes = context[:, :, None, None, None].expand(-1, -1, *noise.shape[2:])
    for t in scheduler.timesteps:
        prediction = denoiser.unet(torch.cat([noise, planes], 1), torch.tensor([float(t)]), context[:, None])
        noise, _ = scheduler.step(prediction, int(t), noise)
    image: Tensor = autoencoder.network.decode(noise)
    return image


@torch.no_grad()
def volumes(networks: Networks, rung: Rung) -> Tensor:
    """One micro-batch of this rung."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(rung.batch, *REDUCED.latents.shape_cxyz, generator=generator)
    context = torch.rand(rung.batch, 4, generator=generator)
    if rung.method == "monai":
        return monai_volume(networks, noise, context, rung.steps)
    autoencoder, denoiser = networks
    schedule = NoiseSchedule(REDUCED.schedule)
    with autocast(CPU, rung.precision):
        sampler = SamplerConfig(method=rung.method, steps=rung.steps)
        return autoencoder.decode(sample_latents(guided(denoiser, context, 1.0), noise, schedule, sampler))


def timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Result and CPU seconds of this process."""
    began = time.process_time()
    result = run()
    return result, round(time.process_time() - began, 3)


def counted(spec: BundleSpec, rewrites: bool) -> dict[str, float]:
    """TFLOP of one denoiser evaluation and of one decode, batch 1."""
    with torch.device("meta"):
        networks = arranged(build_meta(spec), Rung("", "", 1, rewrites=rewrites))
        z, context = torch.empty(1, *spec.latents.shape_cxyz), torch.empty(1, 4)
        found = {}
        for name, run in (
            ("step", lambda: networks[1](z, torch.empty(1), context)),
            ("decode", lambda: networks[0].decode(z)),
        ):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                run()
            found[name] = round(counter.get_total_flops() / 1e12, 3)
    return found


def build_meta(spec: BundleSpec) -> Networks:
    """The networks without weights."""
    return Autoencoder(build_autoencoder(spec.autoencoder), spec.latents), Denoiser(spec.diffusion, 3, 4)


def reduced(rounds: int) -> list[dict[str, Any]]:
    """Whole loops on the reduced networks, rungs in turn; the first round warms up."""
    networks = build(REDUCED)
    ready = [(rung, arranged(copy.deepcopy(networks), rung)) for rung in RUNGS]
    seconds: list[list[float]] = [[] for _ in RUNGS]
    for _ in range(rounds + 1):
        for (rung, pair), found in zip(ready, seconds, strict=True):
            found.append(timed(lambda pair=pair, rung=rung: volumes(pair, rung))[1] / rung.batch)
    base = statistics.median(seconds[0][1:])
    flops = {rewrites: counted(PAPER, rewrites) for rewrites in (False, True)}
    return [
        {
            "rung": rung.name,
            "cpu_s_per_volume": round(statistics.median(found[1:]), 3),
            "cpu_s_all": [round(value, 3) for value in found[1:]],
            "times_fewer": round(base / statistics.median(found[1:]), 2),
            "paper_tflop": round(flops[rung.rewrites]["step"] * rung.steps + flops[rung.rewrites]["decode"], 1),
        }
        for rung, found in zip(RUNGS, seconds, strict=True)
    ]


@torch.no_grad()
def full() -> dict[str, Any]:
    """One denoiser evaluation at the paper's size, and one decode of the paper's decoder on an eighth of the grid."""
    torch.manual_seed(2)
    z, context = torch.randn(1, *PAPER.latents.shape_cxyz), torch.rand(1, 4)
    eighth = torch.randn(1, 3, *(n // 2 for n in PAPER.latents.shape_cxyz[1:]))
    networks = build(PAPER)
    found: dict[str, Any] = {}
    wanted: list[Tensor] = []
    for rung in RUNGS[:3]:
        # Rewritten networks are made when their turn comes: two pairs at a time need less memory.
        autoencoder, denoiser = networks if rung is RUNGS[0] else arranged(copy.deepcopy(networks), rung)
        with autocast(CPU, rung.precision):
            step, step_s = timed(lambda denoiser=denoiser: denoiser(z, torch.tensor([979.0]), context))
            image, decode_s = timed(lambda network=autoencoder.network: network.decode(eighth))
        wanted = wanted or [step, image]
        found[rung.name] = {
            "step_cpu_s": step_s,
            "decode_eighth_cpu_s": decode_s,
            "step_difference": float((step - wanted[0]).norm() / wanted[0].norm()),
            "decode_difference": float((image.float() - wanted[1]).norm() / wanted[1].norm()),
        }
        print(rung.name, found[rung.name], flush=True)
        del autoencoder, denoiser
        gc.collect()
    return found


def main() -> None:
    """Print the table and write docs/ladder.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="instead: single steps at full size, two CPU minutes, 5 GB")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    found |= {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(), "threads": 1}
    if arguments.full:
        found["full"] = full()
    else:
        found["reduced"] = reduced(arguments.rounds)
        found["tflop"] = {"plain": counted(PAPER, False), "rewritten": counted(PAPER, True)}
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
