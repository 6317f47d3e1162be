"""Rows that are poison, NaN, blank, or too large for the memory: each ends as a record, and the others are as ever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from brainsynth import open_dataset
from brainsynth.config.schema import GenerateConfig
from brainsynth.errors import WorkerBroken
from brainsynth.executors.dataset import make_dataset
from brainsynth.generate import VolumeGenerator
from brainsynth.planning import plan_generation
from brainsynth.stages import generate
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.verify import verify_dataset
from brainsynth.storage.work import Work
from tests.chaos.ledger import Finding, Ledger
from tests.line import Line, as_config

Size = Callable[[int, int], int]
TOLERANCE = 2.0**-11


class Faulty(VolumeGenerator):
    """The real generator, but for what some seeds do to it."""

    fates: dict[int, str] = {}  # noqa: RUF012
    most = 1 << 30
    batches: list[int] = []  # noqa: RUF012

    def volumes(self, rows: pd.DataFrame, seconds: dict[str, float]) -> Any:
        if len(rows) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.batches.append(len(rows))
        images = super().volumes(rows, seconds)
        for image, seed in zip(images, rows["seed"], strict=True):
            fate = self.fates.get(int(seed))
            if fate == "poison":
                raise RuntimeError("a kernel refuses this row")
            if fate in ("NaN", "blank"):
                image[...] = np.nan if fate == "NaN" else 0.25
        return images


def faulty(line: Line, tmp_path: Path, name: str, rows: int) -> tuple[Work, GenerateConfig]:
    changes = {"covariates": {"draw": rows}, "samples_per_shard": 6}
    config = as_config(line.generate(tmp_path / name, **changes), GenerateConfig, tmp_path)
    work = plan_generation(config)
    work.build_maker = Faulty
    return work, config


@pytest.mark.slow
def test_the_books_balance(
    line: Line, tmp_path: Path, ledger: Ledger, size: Size, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = size(40, 240)
    work, config = faulty(line, tmp_path, "faulty", rows)
    bad = dict(zip(range(0, rows, 20), ["poison", "NaN", "blank"] * rows, strict=False))
    monkeypatch.setattr(Faulty, "fates", {int(work.samples["seed"][row]): fate for row, fate in bad.items()})
    manifest = make_dataset(work, config.runtime)
    peace = as_config(line.generate(tmp_path / "peace", covariates={"draw": rows}), GenerateConfig, tmp_path)
    generate.run(peace)
    store = open_store(work.root)
    assert verify_dataset(store).ok
    table = pd.read_parquet(tmp_path / "faulty" / "manifest" / "subjects.parquet")
    told = dict(zip(table["row"], table["reason"], strict=True))
    reasons = {"poison": "RuntimeError: a kernel refuses this row", "NaN": "not finite", "blank": "constant"}
    assert {row: told[row] for row in bad} == {row: reasons[fate] for row, fate in bad.items()}
    assert not any(told[row] for row in range(rows) if row not in bad)
    ok, rejected, failed = manifest.num_ok, manifest.num_rejected, manifest.num_failed
    after, before = open_dataset(work.root), open_dataset(str(tmp_path / "peace"))
    others = [row for row in range(rows) if row not in bad]
    assert list(after.rows) == others
    largest = float(np.abs(after.volumes() - before.volumes(others)).max())
    ledger.record(
        Finding(
            "books balance", "5 % poison, NaN and blank rows, real generator", len(bad),
            f"{rows} planned = {ok} ok + {rejected} rejected + {failed} failed, each with its reason; the others differ "
            f"from an undisturbed run by at most {largest:.2g}", "planned = ok + rejected + failed",
            lost=rows - ok - rejected - failed,
        )
    )  # fmt: skip
    assert ok + rejected + failed == rows == ok + len(bad)
    assert largest <= TOLERANCE


@pytest.mark.parametrize("most", [3, 2, 1])
def test_out_of_memory_halves_the_batch_and_changes_nothing(
    line: Line, tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    peace = line.generate(tmp_path / "peace", samples_per_shard=6)
    generate.run(as_config(peace, GenerateConfig, tmp_path))
    work, config = faulty(line, tmp_path, "small", 12)
    monkeypatch.setattr(Faulty, "most", most)
    monkeypatch.setattr(Faulty, "batches", [])
    manifest = make_dataset(work, config.runtime)
    after, before = open_dataset(work.root), open_dataset(str(tmp_path / "peace"))
    assert manifest.num_ok == 12
    assert max(Faulty.batches) == {3: 2, 2: 2, 1: 1}[most]  # halved from 4
    pd.testing.assert_frame_equal(after.table, before.table)
    largest = float(np.abs(after.volumes() - before.volumes()).max())
    ledger.record(
        Finding(
            "books balance", f"out of memory above a micro-batch of {most} (asked for 4)", 12,
            f"12 ok; same rows and seeds; largest difference {largest:.2g} of the range",
            "micro-batch halves, rows and seeds unchanged",
        )
    )  # fmt: skip
    assert largest <= TOLERANCE


def test_a_row_that_never_fits_is_set_aside(line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, config = faulty(line, tmp_path, "tiny", 12)
    greedy = int(work.samples["seed"][7])
    real = Faulty.volumes

    def volumes(self: Faulty, rows: pd.DataFrame, seconds: dict[str, float]) -> Any:
        if greedy in set(rows["seed"]):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, rows, seconds)

    monkeypatch.setattr(Faulty, "volumes", volumes)
    manifest = make_dataset(work, config.runtime)
    assert (manifest.num_ok, manifest.num_failed) == (11, 1)
    assert "OutOfMemoryError" in (tmp_path / "tiny" / "rejects.tsv").read_text()


def test_a_broken_accelerator_is_no_fault_of_the_row(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, config = faulty(line, tmp_path, "broken", 12)

    def volumes(self: Faulty, rows: pd.DataFrame, seconds: dict[str, float]) -> Any:
        raise torch.AcceleratorError("device-side assert triggered")

    monkeypatch.setattr(Faulty, "volumes", volumes)
    with pytest.raises(WorkerBroken, match="device-side assert"):
        make_dataset(work, config.runtime)
    assert not list((tmp_path / "broken").glob("commits/*"))
