"""Which sampler for a bundle of configs/t1w-2mm? Generates and evaluates the same people and noises with each.

    python -m recipes.t1w_2mm_sampler --bundle t1w-2mm --cohort runs/t1w-2mm/cohort --work runs/t1w-2mm/samplers \
        --out benchmarks/results/t1w-2mm-samplers.json --samplers 8:1:1 8:6:1 8:6:1.5

A sampler is STEPS:TIME_SHIFT:GUIDANCE of `ab2`. The people are drawn from the bundle's distribution with a fixed seed, as
many as the cohort has validation scans. One embedder serves all; Fréchet distances are also given as multiples of the
validation scans' own. Rerun the command to resume.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from brainsynth.config.evaluation import EvaluateConfig, FeatureConfig
from brainsynth.config.schema import CovariateSource, GenerateConfig, RuntimeConfig, SamplerConfig
from brainsynth.progress import configure_logging
from brainsynth.reading.dataset import open_dataset
from brainsynth.stages import evaluate, generate

FRECHET = "Fréchet distance to training scans"
SHOWN = ("recall (k = 5)", "age: r of measured with asked", "brain_volume: r of measured with asked",
         "ventricular_volume: r of measured with asked", "ventricular_volume: slope")  # fmt: skip
DRAW_SEED = 77


def main() -> None:
    """Generate, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("bundle", "cohort", "work", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--samplers", nargs="+", required=True)
    parser.add_argument("--count", type=int, default=0, help="volumes; 0: as many as there are validation scans")
    parser.add_argument("--embedder-steps", type=int, default=40)
    arguments = parser.parse_args()
    configure_logging()
    work, runtime = Path(arguments.work), RuntimeConfig(workers=0, micro_batch=2)
    count = arguments.count or len(open_dataset(arguments.cohort, split="validation"))
    found: dict[str, Any] = {"volumes": count}
    features = FeatureConfig(steps=arguments.embedder_steps)
    for name in arguments.samplers:
        steps, shift, guidance = name.split(":")
        sampler = SamplerConfig(method="ab2", steps=int(steps), time_shift=float(shift), guidance_scale=float(guidance))
        dataset, judged = str(work / name / "generated"), work / name / "evaluation"
        covariates = CovariateSource(draw=count, draw_seed=DRAW_SEED)
        generate.run(
            GenerateConfig(
                bundle=arguments.bundle, output=dataset, covariates=covariates, sampler=sampler, runtime=runtime
            )
        )
        evaluate.run(
            EvaluateConfig(
                dataset=dataset, reference=arguments.cohort, output=str(judged), features=features, runtime=runtime
            )
        )
        features = FeatureConfig(embedder=features.embedder or str(next(judged.glob("*embedder*.safetensors"))))
        findings = {line["metric"]: line for line in json.loads((judged / "report.json").read_text())["findings"]}
        found[name] = {metric: findings[metric] for metric in (FRECHET, *SHOWN)}
        found[name]["Fréchet distance over real"] = findings[FRECHET]["value"] / findings[FRECHET]["real"]
        Path(arguments.out).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        print(name, {metric: round(found[name][metric]["value"], 3) for metric in SHOWN},
              "Fréchet, times real", round(found[name]["Fréchet distance over real"], 2))  # fmt: skip


if __name__ == "__main__":
    main()
