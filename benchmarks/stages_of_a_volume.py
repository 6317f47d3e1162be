"""What a volume of the bundled model costs, stage by stage, in both precisions side by side.

    python -m benchmarks.stages_of_a_volume [--rounds 5] [--out benchmarks/results/stages-of-a-volume.json]

One thread. Each round makes a volume in float32 and the same in bfloat16: latents, decoding, the label map (always
float32) and rendering. Ratios are of medians of CPU seconds; the difference is that of the two rendered volumes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.rounding import rounded
from brainsynth.bundle.files import bundle_folder, read_bundle
from brainsynth.bundle.recommended import recommended_generation
from brainsynth.config.schema import SHIPPED_BUNDLE
from brainsynth.config.training import Precision
from brainsynth.models.device import autocast
from brainsynth.models.loading import load_labeller, load_models, load_renderer
from brainsynth.models.sampling import sample_rows
from brainsynth.models.schedule import NoiseSchedule

CPU = torch.device("cpu")
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
STAGES = ("latents", "decoding", "label map", "rendering")


def main() -> None:
    """Every stage, timed in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/stages-of-a-volume.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = bundle_folder(SHIPPED_BUNDLE)
    spec = read_bundle(folder)
    sampler = recommended_generation("unused", SHIPPED_BUNDLE, None, seed=0, workers=0).sampler
    assert spec.distribution is not None
    assert sampler is not None
    label, schedule = load_labeller(folder, CPU), NoiseSchedule(spec.schedule)
    context = torch.from_numpy(spec.covariates.encode(spec.distribution.draw(arguments.rounds, 0)))
    networks = {
        precision: (
            *load_models(folder, spec, CPU, precision, rewrites=True),
            load_renderer(folder, CPU, None, precision),
        )
        for precision in PRECISIONS
    }
    seconds = {precision: {stage: list[float]() for stage in STAGES} for precision in PRECISIONS}
    made = {precision: list[np.ndarray]() for precision in PRECISIONS}
    for row, precision in itertools.product(range(-1, arguments.rounds), PRECISIONS):  # the first row warms up
        autoencoder, denoiser, render = networks[precision]
        known, seed = context[max(row, 0)][None], max(row, 0)
        clock = [time.process_time()]
        with torch.no_grad(), autocast(CPU, precision):
            z = sample_rows(denoiser, known, [seed], spec.latents.shape_cxyz, schedule, sampler)
            clock.append(time.process_time())
            x = autoencoder.decode(z, known, [seed])
        image = spec.volume.as_stored(x[0, 0].float().numpy())
        clock.append(time.process_time())
        labels = label(image[None])[0]
        clock.append(time.process_time())
        image = render(labels, known[0].numpy(), seed, image)
        clock.append(time.process_time())
        if row >= 0:
            made[precision].append(image)
            for stage, took in zip(STAGES, np.diff(clock), strict=True):
                seconds[precision][stage].append(float(took))
    medians = {p: {s: float(np.median(times)) for s, times in of.items()} for p, of in seconds.items()}
    totals = {p: sum(of.values()) for p, of in medians.items()}
    exact, short = (np.stack(made[p]) for p in PRECISIONS)
    record = {
        "rounds": arguments.rounds,
        "cpu_seconds": medians,
        "float32_over_bfloat16": {s: medians["float32"][s] / medians["bfloat16"][s] for s in STAGES}
        | {"all": totals["float32"] / totals["bfloat16"]},
        "mean_difference_of_intensities": float(np.abs(exact - short).mean()),
    }
    arguments.out.write_text(json.dumps(rounded(record), indent=1) + "\n")
    print(json.dumps(rounded(record), indent=1))


if __name__ == "__main__":
    main()
