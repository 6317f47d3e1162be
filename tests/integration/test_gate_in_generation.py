"""The quality gate inside generation: what it refuses is drawn again, then set aside, and the books say so.

The gate of most tests is fitted, far too tightly, on volumes that the tiny model itself made: so it really refuses some of
its next ones, and others not.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from brainsynth import open_dataset, planning
from brainsynth.bundle.files import read_bundle
from brainsynth.bundle.spec import BUNDLE_FILE, GATE_FILE
from brainsynth.config.schema import ExportConfig, GenerateConfig, RuntimeConfig
from brainsynth.errors import UserError
from brainsynth.executors.dataset import make_dataset
from brainsynth.gate.file import load_gate, save_gate
from brainsynth.gate.gate import CHECKS, QualityGate
from brainsynth.generate import VolumeGenerator
from brainsynth.plan import attempt_seed
from brainsynth.planning import plan_generation
from brainsynth.records import seal
from brainsynth.stages import export_bundle, generate
from brainsynth.storage.commit import write_plan
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.finalise import SUBJECTS_KEY
from brainsynth.storage.verify import verify_dataset
from brainsynth.storage.whole_file import file_sha256
from brainsynth.storage.work import Work
from tests.integration.test_bad_input import run_job
from tests.integration.test_generated_labels import TABLE, labelled_work
from tests.integration.test_regenerate import brainsynth
from tests.line import Line, as_config

SOFT = [name for name in CHECKS if name not in ("finite", "range", "empty")]


def maker_of(config: dict[str, Any], folder: Path) -> VolumeGenerator:
    work = plan_generation(as_config(config, GenerateConfig, folder))
    write_plan(work.store, work.plan, work.samples)
    return work.build_maker(**work.arguments)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def tight(line: Line, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny bundle with a gate whose limits are drawn in until it refuses about a quarter of what the model makes."""
    folder = tmp_path_factory.mktemp("tight")
    plain = line.generate(folder / "sample", covariates={"draw": 60, "draw_seed": 5}, base_seed=5)
    maker = maker_of(plain, folder)
    volumes = maker.volumes(maker.samples, {"sample_s": 0.0, "decode_s": 0.0})
    stored = [maker.plan.volume.dequantise(x) for x in volumes]
    bundle = folder / "bundle"
    shutil.copytree(line.root / "bundle", bundle)
    gate = QualityGate.fit(stored, maker.plan.volume, 0.2)
    narrow = gate.envelope.copy()
    narrow[:, 3] *= np.quantile([gate.check(x).score for x in stored], 0.75)
    save_gate(dataclasses.replace(gate, envelope=narrow), bundle / GATE_FILE)
    spec = read_bundle(bundle)
    named = {**spec.weights, GATE_FILE: file_sha256(bundle / GATE_FILE)}
    (bundle / BUNDLE_FILE).write_bytes(seal(dataclasses.replace(spec, weights=named)))
    return str(bundle)


def gated(line: Line, bundle: str, root: Path, **changes: Any) -> dict[str, Any]:
    changes = {"covariates": {"draw": 36}, "gate": {"max_attempts": 2}} | changes
    return line.generate(root, bundle=bundle, samples_per_shard=9, **changes)


def made(config: dict[str, Any], folder: Path) -> pd.DataFrame:
    generate.run(as_config(config, GenerateConfig, folder))
    return pd.read_parquet(io.BytesIO(open_store(config["output"]).read(SUBJECTS_KEY)))


@pytest.fixture(scope="module")
def dataset(line: Line, tight: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    folder = tmp_path_factory.mktemp("gated")
    return folder / "data", made(gated(line, tight, folder / "data"), folder)


def test_refused_rows_are_drawn_again_then_set_aside(
    line: Line, tight: str, dataset: tuple[Path, pd.DataFrame], tmp_path: Path
) -> None:
    root, rows = dataset
    kept, aside = rows[rows["status"] == "ok"], rows[rows["status"] == "rejected"]
    first, redrawn = kept[kept["gate_attempts"] == 1], kept[kept["gate_attempts"] == 2]
    assert len(first) > len(redrawn) > 0
    assert len(first) + len(redrawn) + len(aside) == 36
    assert (kept["gate_score"] < 1).all()
    assert (kept["gate_refused"].str.split().str.len() == kept["gate_attempts"] - 1).all()
    assert (aside["gate_attempts"] == 2).all()
    assert (aside["gate_score"] >= 1).all()
    assert aside["reason"].str.startswith("quality gate, 2 attempts, the last: ").all()

    plain = made(line.generate(tmp_path / "plain", covariates={"draw": 36}, samples_per_shard=9), tmp_path)
    assert (plain["voxel_sha256"][first.index] == first["voxel_sha256"]).all(), "an accepted volume differs"
    assert (plain["voxel_sha256"][redrawn.index] != redrawn["voxel_sha256"]).all()
    assert "gate_score" not in plain.columns
    maker = maker_of(gated(line, tight, tmp_path / "again"), tmp_path)
    row = int(redrawn.index[0])
    one = maker.samples.iloc[[row]]
    again = maker.volumes(one.assign(seed=[attempt_seed(int(one["seed"].iloc[0]), 1)]), {"sample_s": 0, "decode_s": 0})
    data = open_dataset(str(root))
    stored = data.volume(list(data.rows).index(row))
    assert np.abs(stored - again[0]).max() <= 2.0**-10  # made alone it may round otherwise than in its micro-batch


def test_with_every_check_exempt_nothing_changes_but_the_record(line: Line, tight: str, tmp_path: Path) -> None:
    plain = made(line.generate(tmp_path / "plain"), tmp_path)
    lenient = made(line.generate(tmp_path / "lenient", bundle=tight, gate={"exempt": SOFT}), tmp_path)
    assert lenient["voxel_sha256"].tolist() == plain["voxel_sha256"].tolist()
    assert (lenient["gate_attempts"] == 1).all()


def test_a_decoder_that_fails_once_is_asked_again(line: Line, tight: str, tmp_path: Path) -> None:
    """Row 1 comes out as NaN, row 2 blank, each at its own seed only; row 3 always blank."""
    config = line.generate(tmp_path / "data", bundle=tight, gate={"max_attempts": 3, "exempt": SOFT})
    maker = maker_of(config, tmp_path)
    sound, seeds = maker.volumes, maker.samples["seed"].tolist()
    asked: list[int] = []

    def broken(rows: pd.DataFrame, seconds: dict[str, float]) -> Any:
        images = sound(rows, seconds)
        for place, (sample_id, seed) in enumerate(zip(rows["sample_id"], rows["seed"], strict=True)):
            row = maker.samples["sample_id"].tolist().index(sample_id)
            asked.append(row)
            images[place] *= {1: np.nan, 2: 0.0}.get(row, 1.0) if seed == seeds[row] else 1.0
            images[place] *= row != 3
        return images

    maker.volumes = broken  # type: ignore[method-assign]
    done = [maker.finish(maker.make(maker.plan.shard(index))) for index in (0, 1)]
    records = [record for part in done for record in part.samples]
    assert [r.status for r in records] == ["ok", "ok", "ok", "rejected", "ok", "ok"]
    assert [r.extra["gate_attempts"] for r in records] == [1, 2, 2, 3, 1, 1]
    assert [r.extra["gate_refused"] for r in records[:4]] == ["", "finite", "empty", "empty empty empty"]
    assert records[3].reason == "quality gate, 3 attempts, the last: hardly anything in the volume"
    assert np.isnan(done[1].arrays[0][0]).all()
    assert sorted(asked) == [0, 1, 1, 2, 2, 3, 3, 3, 4, 5], "only refused rows are drawn again"


@pytest.mark.parametrize(
    "runtime",
    [{"workers": 0, "micro_batch": 2}, pytest.param({"workers": 2, "micro_batch": 4}, marks=pytest.mark.slow)],
)
def test_any_worker_count_and_micro_batch_keep_the_same_attempts(
    line: Line,
    tight: str,
    dataset: tuple[Path, pd.DataFrame],
    tmp_path: Path,
    runtime: dict[str, Any],
    ray_cluster: None,
) -> None:
    _, rows = dataset
    runtime = {"cpus_per_worker": 0.5, "threads_per_worker": 1, **runtime} if runtime["workers"] else runtime
    other = made(gated(line, tight, tmp_path / "other", runtime=runtime), tmp_path)
    for column in ("status", "gate_attempts", "gate_refused"):
        assert other[column].tolist() == rows[column].tolist()
    assert np.allclose(other["mean"], rows["mean"], atol=1e-4)


def test_resume_regenerate_verify_and_report(
    line: Line, tight: str, dataset: tuple[Path, pd.DataFrame], tmp_path: Path
) -> None:
    before, rows = dataset
    root = tmp_path / "data"
    shutil.copytree(before, root)
    digest = json.loads((root / "dataset.json").read_text())["record"]["shards_digest"]
    for key in ("commits/shard-000001.json", "dataset.json"):
        (root / key).unlink()
    made(gated(line, tight, root), tmp_path)
    assert json.loads((root / "dataset.json").read_text())["record"]["shards_digest"] == digest
    redrawn = int((rows["gate_attempts"] > 1).sum() - (rows["status"] == "rejected").sum())
    report = verify_dataset(open_store(str(root)))
    assert report.ok
    assert f", {redrawn} redrawn, " in report.summary()
    told = json.loads((root / "report.json").read_text())["gate"]
    assert told["rows_redrawn"] == redrawn
    assert told["rows_set_aside"] == (rows["status"] == "rejected").sum()
    assert told["refused"] == told["attempts"] - (rows["status"] == "ok").sum()
    assert "Quality gate" in (root / "report.html").read_text()
    done = brainsynth("regenerate", root, "--bundle", tight, "--random", "36")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "36 of 36 rows have the voxels that their records name" in done.stdout
    with pytest.raises(UserError, match="gate"):
        generate.run(as_config(gated(line, tight, root, gate={"max_attempts": 3}), GenerateConfig, tmp_path))


@pytest.mark.parametrize("reference", [pytest.param("scans", marks=pytest.mark.slow), "reconstructions"])
def test_export_fits_a_gate_that_travels(line: Line, tmp_path: Path, reference: str) -> None:
    config = line.bundle() | {"output": str(tmp_path / "bundle")}
    config["gate"] = {"cohort": str(line.root / "cohort"), "reference": reference}
    if reference == "reconstructions":  # of an autoencoder trained for six steps
        config["gate"]["false_reject_rate"] = 0.2
    for _ in range(2):  # harmless to repeat
        export_bundle.run(as_config(config, ExportConfig, tmp_path))
    spec = read_bundle(tmp_path / "bundle")
    gate = load_gate(tmp_path / "bundle" / GATE_FILE)
    assert spec.weights[GATE_FILE] == file_sha256(tmp_path / "bundle" / GATE_FILE)
    assert gate.spec.n >= 30
    assert {r.name for r in gate.spec.rulers} == {"age", "ventricular_volume", "brain_volume"}
    assert all(r.mae > 0 for r in gate.spec.rulers)
    assert GATE_FILE not in read_bundle(line.root / "bundle").weights
    if reference == "scans":
        held_to_age = line.generate(tmp_path / "data", bundle=str(tmp_path / "bundle"), covariates={"draw": 4})
        held_to_age["gate"] = {"exempt": SOFT, "max_attempts": 2, "tolerance": {"age": 1e-6}}
        rows = made(held_to_age | {"samples_per_shard": 4}, tmp_path)
        assert (rows["status"] == "rejected").all()
        assert rows["reason"].str.contains(r"attempts, the last: age is .* where .* was asked").all()
        assert np.isfinite(rows["measured_age"]).all()


def without_gate(config: dict[str, Any]) -> str:
    config["gate"] = {}
    return "has no quality gate; export it again"


def unknown_check(config: dict[str, Any]) -> str:
    config["gate"]["exempt"] = ["blurriness"]
    return "no checks that could be left out: blurriness"


def no_attempts(config: dict[str, Any]) -> str:
    config["gate"]["max_attempts"] = 0
    return "gate: max_attempts must be from 1 to 100"


def no_ruler(config: dict[str, Any]) -> str:
    config["gate"]["tolerance_errors"] = {"height": 2.0}
    return "no tolerance can be held for height: the bundle's gate measures no covariate"


def twice(config: dict[str, Any]) -> str:
    config["gate"] |= {"tolerance_errors": {"age": 2.0}, "tolerance": {"age": 5.0}}
    return "age: give tolerance or tolerance_errors, not both"


@pytest.mark.parametrize("mistake", [without_gate, unknown_check, no_attempts, no_ruler, twice])
def test_mistakes_are_told_once(line: Line, tight: str, tmp_path: Path, mistake: Any) -> None:
    config = gated(line, str(line.root / "bundle") if mistake is without_gate else tight, tmp_path / "data")
    told = mistake(config)
    done = run_job("generate", config, tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()


def test_a_gate_needs_the_cohort_of_its_model(line: Line, tmp_path: Path) -> None:
    config = line.bundle() | {"output": str(tmp_path / "bundle"), "gate": {"cohort": str(line.root / "latents")}}
    done = run_job("export_bundle", config, tmp_path)
    assert done.returncode == 2
    assert "gate.cohort: " in done.stderr
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("micro_batch", [2, 4])
def test_judging_while_the_next_are_drawn_changes_nothing(
    line: Line, tight: str, tmp_path: Path, micro_batch: int
) -> None:
    """As on a GPU. The same rows go through the networks together, so voxels are equal to the last bit."""
    runtime = {"workers": 0, "threads_per_worker": 1, "micro_batch": micro_batch}
    maker = maker_of(gated(line, tight, tmp_path / "data", runtime=runtime), tmp_path)
    shard = maker.plan.shard(0)
    outputs = []
    for ahead in (0, 1):
        maker.ahead = ahead
        outputs.append(maker.finish(maker.make(shard)))
    plain, overlapped = outputs
    np.testing.assert_array_equal(plain.arrays[0], overlapped.arrays[0])
    assert list(plain.samples) == list(overlapped.samples)
    assert any(int(sample.extra["gate_attempts"]) > 1 for sample in plain.samples)


COUNTED = {"ventricular_volume": {"structures": ["band 1", "band 2"], "intercept": 3.0}}


def counting(
    line: Line, bundle: str, folder: Path, tolerance: float, monkeypatch: pytest.MonkeyPatch, **counted: Any
) -> Work:
    """A generation whose gate counts the ventricles on the label maps, and refuses for nothing else."""
    monkeypatch.setattr(planning, "planned_labels", lambda *_: (None, TABLE))
    folder.mkdir(exist_ok=True)
    gate = {
        "max_attempts": 2,
        "exempt": SOFT,
        "tolerance": {"ventricular_volume": tolerance},
        "counted": counted or COUNTED,
    }
    return labelled_work(line, folder, bundle=bundle, gate=gate)


def test_the_gate_counts_on_the_label_map(
    line: Line, tight: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wide tolerance keeps all, and the count is in the manifest; one at the median refuses half of the volumes."""

    def generated(folder: Path, tolerance: float) -> pd.DataFrame:
        work = counting(line, tight, folder, tolerance, monkeypatch)
        make_dataset(work, RuntimeConfig(workers=0, micro_batch=4))
        assert verify_dataset(open_store(work.root)).ok
        rows = pd.read_parquet(io.BytesIO(open_store(work.root).read(SUBJECTS_KEY)))
        kept = rows[rows["status"] == "ok"]
        counted = kept["label_volume_band_1"] + kept["label_volume_band_2"] - 3.0
        np.testing.assert_allclose(kept["measured_ventricular_volume"], counted, rtol=1e-5)
        return rows.assign(away=(rows["measured_ventricular_volume"] - rows["ventricular_volume"]).abs())

    wide = generated(tmp_path / "wide", 1e6)
    assert (wide["status"] == "ok").all()
    middle = float(wide["away"].median())
    narrow = generated(tmp_path / "narrow", middle)
    assert narrow.loc[narrow["status"] == "ok", "away"].max() <= middle
    assert (narrow["status"] == "ok").sum() >= 6
    assert narrow["gate_refused"].str.contains("adherence.ventricular_volume").sum() >= 6


@pytest.mark.parametrize(
    ("counted", "says"),
    [
        ({"ventricular_volume": {"structures": ["band 9"]}}, "no structure band 9: the label maps have band 1"),
        ({"sex": {"structures": ["band 1"]}}, "counted: sex: give its tolerance, too"),
        ({"ventricular_volume": {"structures": []}}, "give at least one structure"),
        ({"ventricular_volume": {"structures": ["band 1"], "slope": 0}}, "a slope above 0"),
    ],
)
def test_a_count_that_cannot_be_made_is_refused(
    line: Line, tight: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        counting(line, tight, tmp_path, 5.0, monkeypatch, **counted)


def test_without_label_maps_nothing_is_counted(line: Line, tight: str, tmp_path: Path) -> None:
    gate = {"tolerance": {"ventricular_volume": 5.0}, "counted": COUNTED}
    with pytest.raises(UserError, match=r"this dataset has none: set labels to true"):
        plan_generation(as_config(line.generate(tmp_path / "data", bundle=tight, gate=gate), GenerateConfig, tmp_path))
