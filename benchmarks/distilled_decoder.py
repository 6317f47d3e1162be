"""What a distilled decoder saves and what it loses, for docs/distilled-decoder.md. One thread; shows no scan.

    python -m benchmarks.distilled_decoder --bundle runs/ixi-4mm/bundle-distilled --training runs/ixi-4mm/distilled \
        --latents runs/ixi-4mm/latents --cohort runs/ixi-4mm/cohort --out benchmarks/results/distilled-decoder.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from brainsynth import open_dataset
from brainsynth.bundle.files import read_bundle
from brainsynth.metrics.intervals import bootstrap_interval
from brainsynth.models.autoencoder import Autoencoder, build_autoencoder
from brainsynth.models.device import autocast, choose_device
from brainsynth.models.distilled_decoder import DistilledDecoder, decode_flops
from brainsynth.models.loading import load_models
from brainsynth.records import to_dict
from brainsynth.training.diffusion import LatentTable
from brainsynth.training.image_quality import closeness, sharpness

ROUNDS = 12
CPU = choose_device(False)


def interval(values: list[float]) -> dict[str, float]:
    """Mean over volumes with its 95 % interval (BCa bootstrap over volumes)."""
    found = bootstrap_interval(lambda x: float(np.mean(x)), [np.array(values)])
    return {"mean": round(found.value, 5), "low": round(found.low, 5), "high": round(found.high, 5), "n": len(values)}


def seconds(decoders: dict[str, Autoencoder], z: Tensor, precision: str) -> dict[str, float]:
    """CPU seconds of one decode, medians of interleaved rounds, and the median of the ratios within a round."""
    taken: dict[str, list[float]] = {name: [] for name in decoders}
    for round_number in range(ROUNDS + 1):
        for name, decoder in decoders.items():
            began = time.process_time()
            with autocast(CPU, precision):
                decoder.decode(z)
            if round_number:  # the first one warms up
                taken[name].append(time.process_time() - began)
    ratios = [own / light for own, light in zip(taken["own"], taken["distilled"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    medians = {f"{name}_s": round(statistics.median(values), 4) for name, values in taken.items()}
    return {
        **medians,
        "ratio": round(quartiles[1], 2),
        "ratio_q1": round(quartiles[0], 2),
        "ratio_q3": round(quartiles[2], 2),
    }


def to_own(decoders: dict[str, Autoencoder], latents: Tensor) -> dict[str, Any]:
    """Closeness of the distilled decoder's images to the original one's, volume by volume."""
    rows = []
    for z in latents.split(1):
        own, made = decoders["own"].decode(z), decoders["distilled"].decode(z)
        rows.append({**closeness(made, own), "sharpness_ratio": sharpness(made) / sharpness(own)})
    return {name: interval([row[name] for row in rows]) for name in rows[0]}


def to_scans(decoders: dict[str, Autoencoder], latents: Tensor, scans: np.ndarray) -> dict[str, Any]:
    """Closeness of both decoders' images to the scans that the latents come from, and the paired difference."""
    rows = []
    for z, scan in zip(latents.split(1), torch.from_numpy(scans), strict=True):
        rows.append({name: closeness(decoder.decode(z), scan[None, None]) for name, decoder in decoders.items()})
    found: dict[str, Any] = {}
    for measure in ("psnr_db", "ssim"):
        each = {name: [row[name][measure] for row in rows] for name in decoders}
        found[measure] = {name: interval(values) for name, values in each.items()}
        lost = [b - a for a, b in zip(each["own"], each["distilled"], strict=True)]
        found[measure]["distilled minus own"] = interval(lost)
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("bundle", "training", "latents", "cohort", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    spec = read_bundle(arguments.bundle)
    assert spec.distilled is not None
    builds = {
        "own": lambda: Autoencoder(build_autoencoder(spec.autoencoder), spec.latents).decode,
        "distilled": lambda: DistilledDecoder(spec.distilled.architecture, spec.autoencoder),
    }
    operations = {name: decode_flops(build, spec.latents.shape_cxyz) for name, build in builds.items()}
    decoders = {name: load_models(arguments.bundle, spec, CPU, decoder=name)[0] for name in ("own", "distilled")}
    validation = LatentTable(str(arguments.latents), "validation", spec.covariates, spec.latents)
    files = sorted(arguments.training.glob("latents-*/validation-*.safetensors"))
    generated = torch.cat([load_file(file)["latents"] for file in files])
    cohort = open_dataset(str(arguments.cohort), split="validation")
    if list(cohort.table["sample_id"]) != list(validation.table["sample_id"]):
        raise SystemExit("latents and cohort are not of the same scans")
    result = {
        "gflop": {name: round(value / 1e9, 3) for name, value in operations.items()},
        "flops_ratio": round(operations["own"] / operations["distilled"], 2),
        "cpu": {how: seconds(decoders, validation.mean[:1], how) for how in ("float32", "bfloat16")},
        "to_own_on_validation_latents": to_own(decoders, validation.mean),
        "to_own_on_generated_latents": to_own(decoders, generated),
        "to_scans": to_scans(decoders, validation.mean, cohort.volumes()),
        "recorded": to_dict(spec.distilled),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
