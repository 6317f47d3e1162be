"""Any text that a category may be is read back as itself, by every table, reader and export; others are refused at once."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import zarr

import brainsynth
from brainsynth import monai_items
from brainsynth.config.load import load_config
from brainsynth.config.schema import PrepareConfig, SamplerConfig
from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.errors import UserError
from brainsynth.export.plan import plan_export
from brainsynth.manifest import SampleRecord, describe_sample
from brainsynth.plan import GenerationIdentity, generation_plan, generation_samples
from brainsynth.stages.export import run_export
from brainsynth.storage.cells import read_cells
from brainsynth.storage.commit import commit_shard, write_plan
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.finalise import finalise
from brainsynth.storage.tsv import tsv_lines
from brainsynth.volume import VolumeSpec
from tests.line import write_yaml

TEXTS = [
    "line\u2028separator", "paragraph\u2029end", "next\x85line", "form\x0cfeed", "vertical\x0btab", "\x1cfile\x1d\x1e\x1f",
    "line\nfeed", "carriage\rreturn", "both\r\nof them", "a\ttab", 'the "quoted"', '"', "'", "it's", "back`tick",
    "back\\slash",     "北京", "מרכז", "Zürich",
    "e\u0301", "\U0001f9e0", "\ufeffmark", "None", "NA", "nan", "null", "TRUE", "007", "1.0", "-",
    " in front", "behind ", "a, b; c", "a|b", "{id}", "%s", "# note", "=1+2", "[1]", "N/A", "n/a or more",
]  # fmt: skip
IMPOSSIBLE = ["", " ", "n/a", "\t", " n/a", "a\0b"]


def make(root: Path, text: str, site_first: bool) -> None:
    """A dataset of four tiny volumes; the third has no site, and the second is a reject."""
    age = Covariate(name="age", kind="continuous", unit="years", low=1.0, high=90.0)
    site = Covariate(name="site", kind="categorical", categories=("B", text, "C"))
    schema = CovariateSchema(covariates=(site, age) if site_first else (age, site))
    rows = pd.DataFrame({"age": [20.0, 30.0, 40.0, np.nan], "site": [text, "B", None, text]})
    table = schema.validate(rows, "rows")
    samples = generation_samples(table, schema, 0, schema.out_of_range(table))
    volume = VolumeSpec(shape_xyz=(3, 4, 5), spacing_mm=(9.0, 9.0, 9.0), origin_mm=(0.0, 0.0, 0.0))
    sampler = SamplerConfig(method="ddim", steps=5)
    identity = GenerationIdentity(bundle="b" * 64, sampler=sampler, precision="float32", base_seed=0)
    plan, store = generation_plan(identity, volume, schema, samples, 4), open_store(str(root))
    write_plan(store, plan, samples)
    stored = np.stack([volume.quantise(np.random.default_rng(row).random((3, 4, 5))) for row in range(4)])
    records = [
        describe_sample(samples["sample_id"][row], row, [stored[row]])
        if row != 1
        else SampleRecord(sample_id=samples["sample_id"][row], row=row, status="rejected", reason=f"of {text}")
        for row in range(4)
    ]
    commit_shard(store, plan, plan.shard(0), [stored], records, {})
    finalise(store, plan)


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
@pytest.mark.parametrize("site_first", [True, False])
def test_a_category_is_read_back(text: str, site_first: bool, tmp_path: Path) -> None:
    root = tmp_path / "d"
    make(root, text, site_first)
    dataset = brainsynth.open_dataset(str(root))
    assert [dataset.facts(index)["site"] for index in range(len(dataset))] == [text, "", text]
    assert [dataset.facts(index)["age"] for index in range(2)] == [20.0, 40.0]
    assert dataset.table["site"].dropna().tolist() == [text, text]
    assert [item["site"] for item in monai_items(dataset)][::2] == [text, text]
    assert len(brainsynth.open_dataset(str(root), where=f"site == {text!r}")) == 2
    assert len(brainsynth.open_dataset(str(root), where=f"site in ['C', {text!r}]")) == 2
    (reject,) = tsv_lines((root / "rejects.tsv").read_bytes())
    assert (reject["site"], reject["reason"]) == ("B", f"of {text}")
    assert text in json.loads((root / "participants.json").read_text())["site"]["Levels"]
    (root / "dataset.json").rename(tmp_path / "away")
    so_far = brainsynth.open_dataset(str(root), partial=True)
    assert [so_far.facts(index)["site"] for index in range(len(so_far))] == [text, "", text]
    (tmp_path / "away").rename(root / "dataset.json")
    run_export(plan_export(str(root), str(tmp_path / "e"), "bids"))
    exported = tmp_path / "e" / "participants.tsv"
    assert [line["site"] for line in tsv_lines(exported.read_bytes())] == [text, "n/a", text]
    assert read_cells(str(exported), "table")["site"].tolist() == [text, None, text]


@pytest.mark.parametrize("text", [TEXTS[0], TEXTS[7], TEXTS[9], TEXTS[16]], ids=ascii)
def test_the_files_of_an_export_say_it(text: str, tmp_path: Path) -> None:
    make(tmp_path / "d", text, True)
    for to in ("webdataset", "ome-zarr"):
        run_export(plan_export(str(tmp_path / "d"), str(tmp_path / to), to))  # type: ignore[arg-type]
    with tarfile.open(tmp_path / "webdataset" / "shard-000000.tar") as tar:
        member = tar.extractfile("syn000000.json")
        assert member is not None
        assert json.load(member)["covariates"]["site"] == text
    group = zarr.open_group(tmp_path / "ome-zarr" / "sub-syn000000_T1w.ome.zarr", mode="r")
    facts: Any = group.attrs["brainsynth"]
    assert facts["covariates"]["site"] == text


@pytest.mark.parametrize("text", IMPOSSIBLE, ids=ascii)
def test_what_no_table_gives_back_is_refused_in_the_config(text: str, tmp_path: Path) -> None:
    site = {"name": "site", "kind": "categorical", "categories": ["B", text, "C"]}
    config = {
        "source": {"path": "scans.csv"},
        "output": str(tmp_path / "out"),
        "covariates": {"covariates": [site]},
        "volume": {"shape_xyz": [8, 8, 8], "spacing_mm": [4.0, 4.0, 4.0], "origin_mm": [0.0, 0.0, 0.0]},
    }
    with pytest.raises(
        UserError, match="covariate 'site': .* cannot be a category: tables read an empty cell and n/a as"
    ):
        load_config(write_yaml(config, tmp_path), PrepareConfig)
    assert not (tmp_path / "out").exists()
