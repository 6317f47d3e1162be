"""The plan: seeds by subject and not by row, shards that cover each row once, and a fingerprint of all that matters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from brainsynth.config.schema import SamplerConfig
from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.errors import UserError
from brainsynth.plan import (
    GenerationIdentity,
    Plan,
    generation_identity,
    generation_plan,
    generation_samples,
    plan_differences,
    seed_for,
    table_digest,
    volume_array,
)
from brainsynth.records import to_dict
from brainsynth.volume import VolumeSpec

SCHEMA = CovariateSchema(
    covariates=(
        Covariate(name="age", kind="continuous", unit="years", low=18.0, high=90.0),
        Covariate(name="sex", kind="binary", categories=("F", "M")),
    )
)
VOLUME = VolumeSpec(shape_xyz=(40, 48, 33), spacing_mm=(4.0, 4.0, 4.0), origin_mm=(-78.0, -94.0, -78.0))


def rows_of(n: int, **columns: list[Any]) -> pd.DataFrame:
    return pd.DataFrame({"age": [20.0 + i for i in range(n)], "sex": ["FM"[i % 2] for i in range(n)]} | columns)


def samples_of(rows: pd.DataFrame, base_seed: int = 0) -> pd.DataFrame:
    return generation_samples(rows, SCHEMA, base_seed, SCHEMA.out_of_range(rows))


def plan_of(samples: pd.DataFrame, **changes: Any) -> Plan:
    identity = {
        "bundle": "b" * 64,
        "sampler": SamplerConfig(method="ddim", steps=50),
        "precision": "float32",
        "base_seed": 0,
    }
    other = {"volume": VOLUME, "schema": SCHEMA, "samples_per_shard": 4}
    identity |= {key: value for key, value in changes.items() if key not in other}
    other |= {key: value for key, value in changes.items() if key in other}
    return generation_plan(GenerationIdentity(**identity), samples=samples, **other)


def test_golden_values() -> None:
    """Stored datasets are found again, and resumed, by these: they may never change."""
    assert seed_for(0, "syn000000") == 3910722530923587377
    assert seed_for(7, "Subject42") == 7751742411570180881
    samples = samples_of(rows_of(10))
    assert table_digest(samples) == "c7702b469767141b234e91f7a2b34fd49492f512f0b67d7c7256d5a6f0c556ae"
    assert plan_of(samples).fingerprint == "466fd64f18a760a355aad1df967d9aeae2fb6fb2a5f615cc9cfda7238f7fd7dd"


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"decoder": "distilled"},
        {"gate": {"sha256": "0" * 64, "max_attempts": 3, "exempt": [], "tolerance": {"age": 3.5}, "measures": ["age"]}},
    ],
)
def test_what_identifies_a_generation_is_written_as_ever(more: dict[str, Any]) -> None:
    sampler = {"method": "ddim", "steps": 50, "guidance_scale": 1.0}
    written = {"bundle": "b" * 64, "sampler": sampler, "precision": "float32", "base_seed": 0, "noise": "philox4x64"}
    plan = replace(plan_of(samples_of(rows_of(4))), identity=written | more)
    assert to_dict(generation_identity(plan)) == written | more
    assert generation_plan(generation_identity(plan), VOLUME, SCHEMA, samples_of(rows_of(4)), 4) == plan


def test_seeds_are_63_bit_and_all_different() -> None:
    seeds = {seed_for(base, f"syn{i:06d}") for base in range(3) for i in range(2000)}
    assert len(seeds) == 6000
    assert min(seeds) >= 0
    assert 2**61 < max(seeds) < 2**63
    assert seed_for(1, "1x") != seed_for(11, "x")


def test_seeds_do_not_depend_on_row_order_or_on_other_rows() -> None:
    rows = rows_of(50, sample_id=[f"S{i:03d}" for i in range(50)])
    samples = samples_of(rows).set_index("sample_id")["seed"]
    shuffled = samples_of(rows.sample(frac=1, random_state=3)).set_index("sample_id")["seed"]
    assert not (samples.index == shuffled.index).all()
    assert samples.to_dict() == shuffled.to_dict()
    assert samples.iloc[:20].to_dict() == samples_of(rows.iloc[:20]).set_index("sample_id")["seed"].to_dict()
    assert (samples_of(rows, base_seed=1)["seed"].to_numpy() != samples.to_numpy()).all()


def test_rows_of_one_noise_seed_share_their_noise_whatever_their_ids() -> None:
    rows = rows_of(4, sample_id=["a", "b", "c", "d"], noise_seed=[0, 0, 1, 1])
    seeds = samples_of(rows)["seed"].tolist()
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]
    assert samples_of(rows, base_seed=1)["seed"].tolist() != seeds
    assert "noise_seed" not in samples_of(rows)


def test_rows_without_ids_get_them() -> None:
    samples = samples_of(rows_of(3, age=[20.0, 95.0, 30.0]))
    assert list(samples.columns) == ["sample_id", "seed", "extrapolated", "age", "sex"]
    assert list(samples["sample_id"]) == ["syn000000", "syn000001", "syn000002"]
    assert list(samples["extrapolated"]) == [False, True, False]


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        (["a", "b", "a"], "must be unique; given twice: a"),
        (["a", "b c", "d"], r"letters and digits \(BIDS labels\); not so: 'b c'"),
        (["a", "", "d"], "letters and digits"),
        (["a", "sub-01", "d"], "letters and digits"),
        (["a", "é", "d"], "letters and digits"),
        (["a", "../d", "d"], "letters and digits"),
        (["a", "x" * 65, "d"], "letters and digits"),
    ],
)
def test_ids_that_cannot_be_file_names_are_refused(ids: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        samples_of(rows_of(3, sample_id=ids))


@pytest.mark.parametrize("gap", [None, float("nan"), pd.NA])
def test_a_missing_id_is_refused(gap: Any) -> None:
    with pytest.raises(UserError, match="sample_id is missing in row 1"):
        samples_of(rows_of(3, sample_id=["a", gap, "c"]))


def test_no_rows_are_refused() -> None:
    with pytest.raises(UserError, match="there are no rows to plan"):
        plan_of(samples_of(rows_of(0)))


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 17, 64])
@pytest.mark.parametrize("samples_per_shard", [1, 4, 7, 100])
def test_shards_cover_each_row_once(rows: int, samples_per_shard: int) -> None:
    plan = plan_of(samples_of(rows_of(rows)), samples_per_shard=samples_per_shard)
    shards = [plan.shard(index) for index in range(plan.num_shards)]
    assert [row for shard in shards for row in range(shard.start, shard.stop)] == list(range(rows))
    assert all(0 < shard.stop - shard.start <= samples_per_shard for shard in shards)
    assert all(shard.stop - shard.start == samples_per_shard for shard in shards[:-1])
    assert [shard.index for shard in shards] == list(range(plan.num_shards))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"bundle": "c" * 64}, "identity.bundle"),
        ({"sampler": SamplerConfig(method="ddim", steps=51)}, "identity.sampler.steps"),
        ({"sampler": SamplerConfig(method="ddim", steps=50, guidance_scale=1.5)}, "identity.sampler.guidance_scale"),
        ({"sampler": SamplerConfig(method="ddim", steps=50, eta=1.0)}, "identity.sampler.eta"),
        ({"precision": "bfloat16"}, "identity.precision"),
        ({"base_seed": 1}, "identity.base_seed"),
        ({"volume": replace(VOLUME, step=0.0)}, "volume.step"),
        ({"samples_per_shard": 5}, "samples_per_shard"),
        ({"schema": replace(SCHEMA, missing="refuse")}, "covariates.missing"),
        ({"samples": samples_of(rows_of(10), base_seed=1)}, "samples_digest"),
    ],
)
def test_all_that_changes_voxels_changes_the_fingerprint_and_is_named(changes: dict[str, Any], field: str) -> None:
    plan, other = plan_of(samples_of(rows_of(10))), plan_of(**{"samples": samples_of(rows_of(10)), **changes})
    assert other.fingerprint != plan.fingerprint
    (told,) = plan_differences(plan, other)
    assert told.startswith(f"{field}: the folder has ")
    assert plan_differences(plan, plan) == []


def test_the_samples_digest_sees_every_value_and_no_file_format(tmp_path: Any) -> None:
    samples = samples_of(rows_of(10))
    expected = table_digest(samples)
    samples.to_parquet(tmp_path / "samples.parquet", index=False)
    assert table_digest(pd.read_parquet(tmp_path / "samples.parquet")) == expected
    changed = samples.copy()
    changed.loc[3, "age"] = np.nextafter(changed.loc[3, "age"], 100)
    assert table_digest(changed) != expected
    assert table_digest(samples.iloc[::-1]) != expected
    assert table_digest(samples.rename(columns={"age": "years"})) != expected


def test_size_and_chunks() -> None:
    plan = plan_of(samples_of(rows_of(10)))
    assert plan.raw_bytes() == 10 * 40 * 48 * 33 * 2
    assert volume_array("t1w", VOLUME).chunk_shape == (20, 24, 33)
    assert volume_array("t1w", replace(VOLUME, shape_xyz=(32, 34, 64))).chunk_shape == (32, 17, 32)
    assert volume_array("t1w", replace(VOLUME, shape_xyz=(160, 224, 160))).chunk_shape == (40, 56, 40)
    assert volume_array("t1w", replace(VOLUME, shape_xyz=(130, 256, 134))).chunk_shape == (65, 64, 67)
