"""The whole line on procedural brains: what `make demo` runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from brainsynth.config.load import load_config
from brainsynth.config.schema import EncodeConfig, ExportConfig, GenerateConfig, PhantomConfig, PrepareConfig
from brainsynth.config.training import AutoencoderTrainConfig, DiffusionTrainConfig
from brainsynth.executors import stages
from brainsynth.executors.session import ray_session
from brainsynth.storage.filesystem import local_folder, open_store
from brainsynth.storage.verify import verify_dataset

log = logging.getLogger(__name__)
STAGES: list[tuple[str, str, type[Any], Callable[[Any], object]]] = [
    ("make procedural brains", "1-phantoms.yaml", PhantomConfig, stages.make_phantoms),
    ("prepare the cohort", "2-cohort.yaml", PrepareConfig, stages.prepare_cohort),
    ("train the autoencoder", "3-autoencoder.yaml", AutoencoderTrainConfig, stages.train_autoencoder),
    ("encode the latents", "4-latents.yaml", EncodeConfig, stages.encode_latents),
    ("train the denoiser", "5-diffusion.yaml", DiffusionTrainConfig, stages.train_diffusion),
    ("export the bundle", "6-bundle.yaml", ExportConfig, stages.make_bundle),
    ("generate", "7-generate.yaml", GenerateConfig, stages.generate),
]


def run_demo(configs: Path) -> None:
    """Every stage of configs/demo in order, in one Ray session; run again, it goes on where it ended."""
    began = time.monotonic()
    with ray_session():
        for number, (title, name, cls, stage) in enumerate(STAGES, start=1):
            log.info(
                "[%d/%d] %s  (%s, %.0f s so far)", number, len(STAGES), title, configs / name, time.monotonic() - began
            )
            config = load_config(configs / name, cls)
            stage(config)
    root = local_folder(config.output, "output")
    log.info("verify: %s", verify_dataset(open_store(str(root))).summary())
    log.info("the demo took %.0f s", time.monotonic() - began)
    print(f"""
report: {root / "report.html"}

read the volumes:

  import brainsynth
  dataset = brainsynth.open_dataset("{root}")
  sample = dataset[0]  # sample["image"], sample["age"], …
""")
