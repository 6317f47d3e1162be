"""Fixtures that every suite shares: procedural brains, a cohort prepared from them, and the folder of real scans."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from brainsynth.cohort.phantom import phantom_grid
from brainsynth.cohort.phantom_cohort import write_phantom_cohort
from brainsynth.cohort.prepare import plan_cohort
from brainsynth.config.schema import PrepareConfig, RuntimeConfig, SourceConfig
from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.executors.dataset import make_dataset
from tests.line import generated, line, ray_cluster

__all__ = ["generated", "line", "ray_cluster"]

GRID = phantom_grid(8.0, (20, 26, 20))
SCHEMA = CovariateSchema(
    covariates=(
        Covariate(name="age", kind="continuous", unit="years", low=18.0, high=95.0),
        Covariate(name="sex", kind="binary", categories=("F", "M")),
        Covariate(name="ventricular_volume", kind="continuous", unit="ml", low=3.0, high=150.0, scale="log"),
    )
)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch computes on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos", action="store_true", help="the chaos suite at full size; it writes docs/reliability.md")


@pytest.fixture(scope="session")
def phantom_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve phantoms at 8 mm as a BIDS folder; read it, never write to it."""
    return write_phantom_cohort(tmp_path_factory.mktemp("phantoms") / "bids", 12, 1, GRID)


@pytest.fixture(scope="session")
def labelled_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six phantoms at 8 mm with their label maps, as a BIDS folder with a derivative; read it, never write to it."""
    return write_phantom_cohort(tmp_path_factory.mktemp("labelled") / "bids", 6, 1, GRID, labels=True)


@pytest.fixture
def prepared_cohort(phantom_folder: Path, tmp_path: Path) -> Path:
    """The phantoms as a prepared cohort of three shards; a test may damage it."""
    root = tmp_path / "cohort"
    config = PrepareConfig(
        source=SourceConfig(path=str(phantom_folder)),
        output=str(root),
        covariates=SCHEMA,
        volume=GRID,
        samples_per_shard=5,
        runtime=RuntimeConfig(workers=0),
    )
    make_dataset(plan_cohort(config), config.runtime)
    return root


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real scans and tables."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("BRAINSYNTH_DATA", beside))
    if not root.is_dir():
        pytest.skip("the real scans are not here: set BRAINSYNTH_DATA to their folder")
    return root
