"""CPU seconds per volume at 2 mm: the model zoo's loop against the bundled model.

    python -m recipes.own_model --rounds 2 --out benchmarks/results/own-model.json

The zoo's networks (random weights: only cost is measured) on the smallest grid that they accept and that holds the
80×112×80 of the bundled model: 96×128×96 voxels, latents 12×16×12, 50 steps of MONAI's DDIM in float32, one volume at a
time. Ours: the bundled model, whole, with the sampler of configs/t1w-2mm/6-generate.yaml. One thread, whole loops
alternating in one process, so that load on the machine affects all alike. For the quality of the volumes see the model card.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ladder import CPU, REPO, RUNGS, Size, arranged, build, timed, volumes
from brainsynth.bundle.files import bundle_folder, read_bundle
from brainsynth.bundle.spec import LatentSpec
from brainsynth.config.load import load_config
from brainsynth.config.schema import SHIPPED_BUNDLE, GenerateConfig
from brainsynth.config.training import Precision
from brainsynth.models.device import autocast, has_bfloat16
from brainsynth.models.loading import load_models
from brainsynth.models.sampling import sample_rows
from brainsynth.models.schedule import NoiseSchedule
from brainsynth.stages.import_bundle import PAPER

ZOO_CELLS = (12, 16, 12)


def zoo(steps: int) -> Callable[[], Tensor]:
    """One volume by the zoo's loop at 2 mm."""
    latents = LatentSpec(shape_cxyz=(3, *ZOO_CELLS), shift=(0.0,) * 3, scale=(1.0,) * 3)
    size = Size(dataclasses.replace(PAPER, latents=latents), None)  # type: ignore[arg-type]
    rung = dataclasses.replace(RUNGS[0], steps=steps)
    networks = arranged(build(size), rung, size)
    return lambda: volumes(networks, rung, size)


def ours(precision: Precision, batch: int) -> Callable[[], Tensor]:
    """A micro-batch of the shipped model, as `generate` makes it."""
    config = load_config(REPO / "configs" / "t1w-2mm" / "6-generate.yaml", GenerateConfig)
    folder = bundle_folder(SHIPPED_BUNDLE)
    spec = read_bundle(folder)
    autoencoder, denoiser = load_models(folder, spec, CPU, precision)
    context, schedule = torch.rand(batch, spec.covariates.context_size), NoiseSchedule(spec.schedule)

    @torch.no_grad()
    def run() -> Tensor:
        with autocast(CPU, precision):
            z = sample_rows(denoiser, context, range(batch), spec.latents.shape_cxyz, schedule, config.sampler)
            return autoencoder.decode(z)

    return run


def main() -> None:
    """Measure in turn; print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--zoo-steps", type=int, default=50, help="fewer for a quick try; the result says how many")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    precisions: list[Precision] = ["float32", "bfloat16"] if has_bfloat16(CPU) else ["float32"]
    ways: dict[str, tuple[Callable[[], Tensor], int]] = {"the zoo's loop": (zoo(arguments.zoo_steps), 1)}
    ways |= {f"ours, {precision}": (ours(precision, arguments.batch), arguments.batch) for precision in precisions}
    for name, (run, _) in ways.items():
        if name != "the zoo's loop":
            run()  # warm; the zoo's own first step is a fiftieth of its loop
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, (run, count) in ways.items():
            seconds[name].append(round(timed(run)[1] / count, 3))
            print(name, seconds[name][-1], flush=True)
    base = statistics.median(seconds["the zoo's loop"])
    found: dict[str, Any] = {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": 1,
        "zoo": {"voxels": [8 * cells for cells in ZOO_CELLS], "steps": arguments.zoo_steps, "weights": "random"},
        "bundle": read_bundle(bundle_folder(SHIPPED_BUNDLE)).digest,
        "rows": [
            {
                "way": name,
                "cpu_s_per_volume": statistics.median(values),
                "cpu_s_all": values,
                "times_fewer": round(base / statistics.median(values), 1),
            }
            for name, values in seconds.items()
        ],
    }
    print(json.dumps(found, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
