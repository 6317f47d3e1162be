"""A structure's counted volume as one more covariate: a column of the table and three words of YAML, no code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from brainsynth import open_dataset
from brainsynth.cohort.phantom_cohort import DERIVATIVE, write_phantom_cohort
from brainsynth.config.schema import PrepareConfig
from brainsynth.covariates.distribution import fit_distribution
from brainsynth.stages import prepare_cohort
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import open_store
from tests.line import GRID, Line, as_config

YAML = "{name: white_matter_volume, kind: continuous, unit: ml, low: 200.0, high: 900.0}"


def test_a_structure_is_declared_in_yaml_alone(tmp_path: Path) -> None:
    folder = write_phantom_cohort(tmp_path / "phantoms", 40, 2, GRID, labels=True)
    config = Line(tmp_path).prepare()
    config["source"] |= {"label_folder": DERIVATIVE, "label_source": "construction"}
    prepare_cohort.run(as_config(config, PrepareConfig, tmp_path))
    counted = open_dataset(str(tmp_path / "cohort")).label_volumes["White-Matter"]

    table = pd.read_csv(folder / "participants.tsv", sep="\t")
    names = table["participant_id"].str.removeprefix("sub-").str.replace("-", "")
    table["white_matter_volume"] = counted.loc[names].to_numpy()
    table.to_csv(folder / "participants.tsv", sep="\t", index=False)
    known = {"covariates": [*config["covariates"]["covariates"], yaml.safe_load(YAML)]}
    more = config | {"covariates": known, "output": str(tmp_path / "more")}
    prepare_cohort.run(as_config(more, PrepareConfig, tmp_path))

    dataset, schema = open_dataset(str(tmp_path / "more")), read_plan(open_store(str(tmp_path / "more"))).covariates
    assert schema.names[-1] == "white_matter_volume"
    np.testing.assert_allclose(dataset.table["white_matter_volume"], dataset.label_volumes["White-Matter"])
    drawn = fit_distribution(dataset.table, schema, "the cohort").draw(300, 0)
    real = dataset.table[["brain_volume", "white_matter_volume"]].corr().iloc[0, 1]
    assert drawn[["brain_volume", "white_matter_volume"]].corr().iloc[0, 1] > 0.5 * real > 0.2
    context, before = schema.encode(drawn), read_plan(open_store(str(tmp_path / "cohort"))).covariates.context_size
    assert context.shape == (300, schema.context_size)
    assert schema.context_size > before
    assert np.isfinite(context).all()
