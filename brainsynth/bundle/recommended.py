"""What a bundle recommends: sampler and gate of its model card, and the whole config that follows for who has none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from brainsynth.bundle.files import bundle_folder, read_bundle
from brainsynth.bundle.spec import GATE_FILE, BundleSpec
from brainsynth.config.load import build_config
from brainsynth.config.schema import GenerateConfig, RecommendedConfig, SynthesisConfig
from brainsynth.errors import UserError
from brainsynth.places import is_generator
from brainsynth.records import seal, to_dict, unseal

RECOMMENDED_FILE = "recommended.json"


def recommended(folder: Path, spec: BundleSpec) -> RecommendedConfig:
    """The recommendation of a bundle. Raises UserError where it has none."""
    if spec.few_steps is not None:
        return RecommendedConfig(sampler=spec.few_steps.sampler)
    try:
        return unseal(RecommendedConfig, (folder / RECOMMENDED_FILE).read_bytes(), str(folder / RECOMMENDED_FILE))
    except FileNotFoundError:
        raise UserError(
            f"the bundle {folder} recommends no sampler (it has no {RECOMMENDED_FILE}): give --config with a sampler, or "
            "export it again with `recommended` in its config"
        ) from None


def write_recommended(folder: Path, config: RecommendedConfig) -> None:
    """Put it into a bundle's folder."""
    (folder / RECOMMENDED_FILE).write_bytes(seal(config))


def recommended_generation(
    output: str,
    bundle: str,
    covariates: dict[str, Any] | None,
    seed: int = 0,
    workers: int | None = None,
    gpus: int = 0,
    overrides: Sequence[str] = (),
) -> SynthesisConfig:
    """The config of a generation that names neither sampler nor gate: the bundle's own recommendation.

    Args:
        output: folder or URI of the dataset.
        bundle: folder of a bundle, the name of the bundled model, or a generator.
        covariates: keys of `CovariateSource`: `{"draw": 64}` or `{"table": "rows.csv"}`; None where the caller has rows.
        seed: another number is other people and other brains.
        workers: processes; 0 works in this one without Ray; by default one a GPU, else two where there are two cores.
        gpus: GPUs, one a worker.
        overrides: `key.sub=value` as for `--set`.

    Raises:
        UserError: bad bundle or bundle without a recommendation, or values that do not fit together.
    """
    if gpus < 0 or (workers is not None and workers < 0):
        raise UserError("--workers and --gpus must be 0 or more")
    if gpus and workers is not None and workers != gpus:
        raise UserError(f"--gpus {gpus} starts one worker a GPU: leave --workers out, or give --workers {gpus}")
    if workers is None:
        workers = gpus or min(2, os.cpu_count() or 1)
    runtime: dict[str, Any] = {"workers": workers}
    value: dict[str, Any] = {"bundle": bundle, "output": output, "base_seed": seed, "runtime": runtime}
    if not is_generator(bundle):
        folder = bundle_folder(bundle)
        spec = read_bundle(folder)
        advice = recommended(folder, spec)
        runtime["micro_batch"] = advice.micro_batch
        value |= {"sampler": to_dict(advice.sampler), "decoder": advice.decoder}
        value |= {"samples_per_shard": advice.samples_per_shard}
        value |= {} if advice.gate is None or GATE_FILE not in spec.weights else {"gate": to_dict(advice.gate)}
    if gpus:
        runtime |= {"gpus_per_worker": 1.0, "cpus_per_worker": 1.0, "micro_batch": 8}
    if covariates is None:
        return build_config(value, SynthesisConfig, overrides, "the options")
    value["covariates"] = covariates | ({"draw_seed": seed} if "draw" in covariates else {})
    return build_config(value, GenerateConfig, overrides, "the options")
