"""A generator with a labeller: every label map is that of the stored image next to it, whichever way the row was made."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest

from brainsynth import open_dataset, verify_dataset
from brainsynth.config.schema import GenerateConfig
from brainsynth.evaluation.dataset_report import report_dataset
from brainsynth.executors.dataset import make_dataset
from brainsynth.generate import VolumeGenerator
from brainsynth.labels import Label, LabelTable
from brainsynth.plan import ShardSpec, volume_arrays
from brainsynth.planning import plan_generation
from brainsynth.stages import regenerate
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.repair import repair
from brainsynth.storage.work import ShardOutput, Work
from tests.line import LOCAL, Line, as_config
from tests.storage.conftest import flip

TABLE = LabelTable(labels=tuple(Label(index=i, name=f"band {i}") for i in (1, 2, 3)), source="bands of intensity")
F32, U8 = npt.NDArray[np.float32], npt.NDArray[np.uint8]


def bands(images: F32) -> U8:
    return np.digitize(images, [0.1, 0.4, 0.6]).astype(np.uint8)


class Labelled(VolumeGenerator):
    """A generator whose bundle has a labeller."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.labeller = bands


class Poisoned(Labelled):
    """Of which the decoder breaks one row."""

    def finish(self, made: Any) -> ShardOutput:
        for offset, drawn in enumerate(made.rows):
            if made.shard.start + offset == 4 and drawn.volume is not None:
                drawn.volume[3, 3, 3] = np.nan
        return super().finish(made)


def labelled_work(line: Line, tmp_path: Path, maker: type[VolumeGenerator] = Labelled, **changes: Any) -> Work:
    work = plan_generation(as_config(line.generate(tmp_path / "generated", **changes), GenerateConfig, tmp_path))
    plan = dataclasses.replace(work.plan, labels=TABLE, arrays=volume_arrays(work.plan.volume, TABLE))
    return Work(work.root, plan, work.samples, maker, {**work.arguments, "plan": plan})


def runtime(line: Line, tmp_path: Path, **changes: Any) -> Any:
    return as_config(line.generate(tmp_path / "x", runtime=LOCAL | changes), GenerateConfig, tmp_path).runtime


def check(root: Path, count: int) -> None:
    dataset = open_dataset(str(root))
    assert len(dataset) == count
    seen = set()
    for sample in dataset:
        np.testing.assert_array_equal(sample["labels"], bands(sample["image"]))
        seen.add(sample["labels"].tobytes())
    assert len(seen) == count
    assert verify_dataset(str(root)).ok


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_a_label_map_follows_from_the_stored_image(line: Line, tmp_path: Path, dtype: str) -> None:
    """As readers see it: after rounding to what is stored."""
    make_dataset(labelled_work(line, tmp_path, stored_dtype=dtype), runtime(line, tmp_path))
    check(tmp_path / "generated", 12)
    report = report_dataset(str(tmp_path / "generated"), str(line.root / "bundle"))
    assert report is not None
    html = report.read_text()
    assert "label maps over generated volumes" in html
    assert "band 2" in html


def test_with_labels_the_images_are_the_same(line: Line, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    make_dataset(labelled_work(line, tmp_path), runtime(line, tmp_path))
    work = plan_generation(as_config(line.generate(plain / "generated"), GenerateConfig, plain))
    make_dataset(work, runtime(line, tmp_path))
    pair = [(root / "generated/dataset.zarr/t1w/c/1/0/0/0").read_bytes() for root in (tmp_path, plain)]
    assert pair[0] == pair[1]


def test_rows_are_made_again_with_their_label_maps(line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = labelled_work(line, tmp_path)
    make_dataset(work, runtime(line, tmp_path))
    monkeypatch.setattr(regenerate, "VolumeGenerator", Labelled)
    again = list(regenerate.regenerate(work.root, str(line.root / "bundle"), list(range(12))))
    assert all(one.same_voxels and one.as_recorded and one.largest_difference == 0 for one in again)
    store = open_store(work.root)
    flip(store, "dataset.zarr/dseg/c/2/0/0/0", 8 * 60)
    hit = {row for row, one in enumerate(regenerate.regenerate(work.root, str(line.root / "bundle"), [6, 7, 8]), 6)
           if not one.as_recorded}  # fmt: skip
    assert hit
    lost = repair(store, verify_dataset(work.root))
    assert set(lost[2]) == hit
    make_dataset(work, runtime(line, tmp_path))
    check(tmp_path / "generated", 12)


def test_a_volume_that_is_set_aside_has_no_label_map(line: Line, tmp_path: Path) -> None:
    manifest = make_dataset(labelled_work(line, tmp_path, Poisoned), runtime(line, tmp_path))
    assert (manifest.num_ok, manifest.num_rejected) == (11, 1)
    check(tmp_path / "generated", 11)
    table = pd.read_parquet(tmp_path / "generated" / "manifest" / "subjects.parquet")
    assert table["label_volume_band_1"].isna().tolist() == [row == 4 for row in range(12)]


def test_a_labeller_that_fails_is_a_failed_row_with_its_reason(line: Line, tmp_path: Path) -> None:
    class Moody(Labelled):
        def make(self, shard: ShardSpec) -> Any:
            def labeller(images: F32) -> U8:
                if shard.start <= 7 < shard.stop:
                    raise RuntimeError("no kernel for this volume")
                return bands(images)

            self.labeller = labeller
            return super().make(shard)

    manifest = make_dataset(labelled_work(line, tmp_path, Moody), runtime(line, tmp_path, max_attempts=2))
    assert (manifest.num_ok, manifest.num_failed) == (11, 1)
    check(tmp_path / "generated", 11)
    assert "RuntimeError: no kernel for this volume" in (tmp_path / "generated" / "rejects.tsv").read_text()


def test_a_labeller_that_does_not_know_its_table_is_a_reject(line: Line, tmp_path: Path) -> None:
    class Stranger(Labelled):
        def make(self, shard: ShardSpec) -> Any:
            self.labeller = lambda images: bands(images) + 3 * (bands(images) == 3).astype(np.uint8)
            return super().make(shard)

    manifest = make_dataset(labelled_work(line, tmp_path, Stranger), runtime(line, tmp_path))
    table = pd.read_parquet(tmp_path / "generated" / "manifest" / "subjects.parquet")
    bad = table[table["status"] != "ok"]
    assert manifest.num_rejected == len(bad) > 0
    assert set(bad["reason"]) == {"label map: the label table lacks 6"}


@pytest.mark.slow
def test_in_ray_actors_it_is_the_same_dataset(line: Line, tmp_path: Path, ray_cluster: None) -> None:
    here = tmp_path / "here"
    here.mkdir()
    first = make_dataset(labelled_work(line, here), runtime(line, tmp_path))
    second = make_dataset(labelled_work(line, tmp_path), runtime(line, tmp_path, workers=2))
    assert first.shards_digest == second.shards_digest
    check(tmp_path / "generated", 12)
