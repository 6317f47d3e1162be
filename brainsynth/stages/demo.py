"""What `make demo` and `make demo-train` run."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

from brainsynth.config.load import load_config
from brainsynth.config.schema import EncodeConfig, ExportConfig, GenerateConfig, PhantomConfig, PrepareConfig
from brainsynth.config.training import AutoencoderTrainConfig, DiffusionTrainConfig
from brainsynth.executors.session import ray_session
from brainsynth.places import user_path
from brainsynth.stages import (
    encode_latents,
    export_bundle,
    generate,
    make_phantoms,
    prepare_cohort,
    train_autoencoder,
    train_diffusion,
)
from brainsynth.stages.configs import examples
from brainsynth.storage.filesystem import local_folder, open_store
from brainsynth.storage.verify import verify_dataset

log = logging.getLogger(__name__)
GENERATION = "generate.yaml"
STAGES: list[tuple[str, str, type[Any], Callable[[Any], object]]] = [
    ("make procedural brains", "1-phantoms.yaml", PhantomConfig, make_phantoms.run),
    ("prepare the cohort", "2-cohort.yaml", PrepareConfig, prepare_cohort.run),
    ("train the autoencoder", "3-autoencoder.yaml", AutoencoderTrainConfig, train_autoencoder.run),
    ("encode the latents", "4-latents.yaml", EncodeConfig, encode_latents.run),
    ("train the denoiser", "5-diffusion.yaml", DiffusionTrainConfig, train_diffusion.run),
    ("export the bundle", "6-bundle.yaml", ExportConfig, export_bundle.run),
    ("generate", "7-generate.yaml", GenerateConfig, generate.run),
]


def run_demo(configs: Path) -> None:
    """Generate with the bundled model, verify, report; rerun to resume."""
    began = time.monotonic()
    config = load_config(configs / GENERATION, GenerateConfig)
    with ray_session():
        generate.run(config)
    _verify_and_tell(config, began)


def run_training_demo(configs: Path) -> None:
    """Every stage of configs/demo-train in order, in one Ray session; rerun to resume."""
    began = time.monotonic()
    with ray_session():
        for number, (title, name, cls, stage) in enumerate(STAGES, start=1):
            log.info(
                "[%d/%d] %s  (%s, %.0f s so far)", number, len(STAGES), title, configs / name, time.monotonic() - began
            )
            config = load_config(configs / name, cls)
            stage(config)
    _verify_and_tell(config, began)


def _verify_and_tell(config: GenerateConfig, began: float) -> None:
    root = local_folder(config.output, "output")
    log.info("verify: %s", verify_dataset(open_store(str(root))).summary())
    log.info("the demo took %.0f s", time.monotonic() - began)
    report = root / "report.html"
    print(f"""
report: {report}

read the volumes:

  import brainsynth
  dataset = brainsynth.open_dataset("{root}")
  sample = dataset[0]  # sample["image"], sample["age"], …
""")
    if sys.stdout.isatty() and (sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)):
        webbrowser.open(report.as_uri())


def command(arguments: argparse.Namespace) -> int:
    """The demo, or with --train the training demo."""
    if arguments.train:
        run_training_demo(user_path(str(arguments.configs or examples() / "demo-train"), "--configs"))
    else:
        run_demo(user_path(str(arguments.configs or examples() / "demo"), "--configs"))
    return 0
