"""The bundle that travels with the package: whole, small, found by its name, and its brains follow what is asked."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brainsynth.bundle.files import bundle_folder, check_bundle_files, read_bundle
from brainsynth.bundle.spec import GATE_FILE
from brainsynth.config.schema import SHIPPED_BUNDLE, CovariateSource, GenerateConfig, RuntimeConfig, SamplerConfig
from brainsynth.gate.file import load_gate
from brainsynth.reading.dataset import open_dataset
from brainsynth.stages import generate

FOLDER = bundle_folder(SHIPPED_BUNDLE)
ASKED_ML = (10.0, 80.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two people who differ in their ventricles alone, from one noise, by a config that names no bundle."""
    folder = tmp_path_factory.mktemp("shipped")
    person = {"age": 70.0, "sex": "F", "brain_volume": 1250.0, "cohort": "oasis1", "noise_seed": 1}
    pd.DataFrame([{**person, "ventricular_volume": ml} for ml in ASKED_ML]).to_csv(folder / "rows.csv", index=False)
    generate.run(
        GenerateConfig(
            output=str(folder / "data"),
            covariates=CovariateSource(table=str(folder / "rows.csv"), allow_extrapolation=True),
            sampler=SamplerConfig(method="ab2", steps=6, time_shift=6.0),
            runtime=RuntimeConfig(workers=0, micro_batch=2),
        )
    )
    return folder / "data"


def test_it_is_whole_and_at_most_32_mib() -> None:
    spec = read_bundle(FOLDER)
    check_bundle_files(FOLDER, spec)
    assert spec.name == SHIPPED_BUNDLE
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 32 << 20
    assert {"IXI", "OASIS"} <= set(re.findall(r"IXI|OASIS", spec.training_data))


def test_its_card_is_of_these_weights() -> None:
    card = (FOLDER / "README.md").read_text()
    assert read_bundle(FOLDER).digest[:12] in card
    assert "not for diagnosis" in card.lower()


def test_its_brains_show_the_ventricles_that_were_asked_for(root: Path) -> None:
    dataset, gate = open_dataset(str(root)), load_gate(FOLDER / GATE_FILE)
    measured = [gate.measure_covariates(dataset.volume(i))["ventricular_volume"] for i in range(2)]
    error = next(ruler.mae for ruler in gate.spec.rulers if ruler.name == "ventricular_volume")
    assert np.all(np.abs(np.array(measured) - ASKED_ML) < np.maximum(4 * error, 0.3 * np.array(ASKED_ML)))
    assert all(gate.check(dataset.volume(i)).score < 3 for i in range(2))
