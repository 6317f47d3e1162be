"""Phantoms with label maps as a prepared cohort, for the tests of every room that knows both arrays."""

from __future__ import annotations

from pathlib import Path

from brainsynth.cohort.phantom_cohort import DERIVATIVE
from brainsynth.cohort.prepare import plan_cohort
from brainsynth.config.schema import PrepareConfig, RuntimeConfig, SourceConfig
from brainsynth.executors.dataset import make_dataset
from tests.conftest import GRID, SCHEMA


def labelled_config(folder: Path, root: Path) -> PrepareConfig:
    return PrepareConfig(
        source=SourceConfig(path=str(folder), label_folder=DERIVATIVE, label_source="construction"),
        output=str(root),
        covariates=SCHEMA,
        volume=GRID,
        samples_per_shard=5,
        runtime=RuntimeConfig(workers=0),
    )


def prepare_labelled(folder: Path, root: Path) -> Path:
    config = labelled_config(folder, root)
    make_dataset(plan_cohort(config), config.runtime)
    return root
