"""Every config file that the repository offers is one that its job takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from brainsynth.config.audit import AuditConfig
from brainsynth.config.distillation import DistillConfig, StepDistillConfig
from brainsynth.config.evaluation import EvaluateConfig
from brainsynth.config.load import load_config
from brainsynth.config.schema import EncodeConfig, ExportConfig, GenerateConfig, PhantomConfig, PrepareConfig
from brainsynth.config.training import AutoencoderTrainConfig, DiffusionTrainConfig

FILES = sorted(Path(__file__).parents[2].joinpath("configs").rglob("*.yaml"))
CLASSES: dict[str, type[Any]] = {
    "phantoms": PhantomConfig,
    "cohort": PrepareConfig,
    "autoencoder": AutoencoderTrainConfig,
    "latents": EncodeConfig,
    "diffusion": DiffusionTrainConfig,
    "diffusion-transformer": DiffusionTrainConfig,
    "bundle": ExportConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "audit": AuditConfig,
    "distill-decoder": DistillConfig,
    "distill-steps": StepDistillConfig,
}


@pytest.mark.parametrize("path", FILES, ids=[f"{path.parent.name}/{path.name}" for path in FILES])
def test_it_loads(path: Path) -> None:
    load_config(path, CLASSES[re.sub(r"^\d-", "", path.stem)])
