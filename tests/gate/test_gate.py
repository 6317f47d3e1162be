"""The quality gate: what it lets pass, what it stops and why, what it refuses, and its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from brainsynth.cohort.phantom import make_phantom, phantom_covariates, phantom_grid
from brainsynth.errors import UserError
from brainsynth.gate.envelope import fit_envelope, tail_quantile
from brainsynth.gate.features import COARSE_MM, blocks, measure
from brainsynth.gate.file import gate_tensors, load_gate, save_gate
from brainsynth.gate.gate import CHECKS, QualityGate
from brainsynth.gate.maps import COMPONENTS
from brainsynth.records import to_dict
from tests.gate.artefacts import ARTEFACTS, FURTHER
from tests.gate.scans import GRIDS, prepared, scans

GRID = phantom_grid(6.0, (28, 36, 28))
MM = GRID.spacing_mm


def phantom_brain(row: object, seed: int) -> np.ndarray:
    """A phantom without its skull, as a stripped scan is stored."""
    made = make_phantom(row.age, row.sex, row.ventricular_volume, row.brain_volume, GRID, seed)  # type: ignore[attr-defined]
    share = sum(made.fractions[tissue] for tissue in ("csf", "grey", "white", "ventricle"))
    return np.where(share > 0.5, made.image, 0).astype(np.float32)


@pytest.fixture(scope="module")
def brains() -> list[np.ndarray]:
    table = phantom_covariates(72, 5)
    return [phantom_brain(row, i) for i, row in enumerate(table.itertuples())]


@pytest.fixture(scope="module")
def gate(brains: list[np.ndarray]) -> QualityGate:
    return QualityGate.fit(iter(brains[:56]), GRID)


def test_unseen_brains_pass(gate: QualityGate, brains: list[np.ndarray]) -> None:
    found = [gate.check(x) for x in brains[56:]]
    assert sum(not r.passed for r in found) <= 1
    assert all(
        set(r.values) <= set(CHECKS) and r.score == max(v for k, v in r.values.items() if k != "flip") for r in found
    )


@pytest.mark.parametrize("kind", ["cropped", "checkerboard", "ghosting", "noise", "blur", "spike", "wrap_around"])
def test_planted_artefacts_are_stopped(gate: QualityGate, brains: list[np.ndarray], kind: str) -> None:
    results = [
        gate.check(ARTEFACTS[kind](x, MM, np.random.default_rng(i), brains[0])) for i, x in enumerate(brains[56:66])
    ]
    assert sum(not r.passed for r in results) >= 9
    stopped = [r for r in results if not r.passed]
    assert all(r.reason.startswith(CHECKS[r.worst]) and r.score >= 1 for r in stopped)


def test_there_are_twelve_kinds_and_they_change_the_volume(brains: list[np.ndarray]) -> None:
    assert len(ARTEFACTS) == 12
    for kind, plant in (ARTEFACTS | FURTHER).items():
        before = brains[0].copy()
        broken = plant(brains[0], MM, np.random.default_rng(1), brains[1])
        assert broken.shape == before.shape, kind
        assert 0 <= broken.min() <= broken.max() <= 1, kind
        assert np.abs(broken - before).max() > 0.02, kind
        assert (brains[0] == before).all(), f"{kind} wrote into its input"


@pytest.mark.parametrize(
    ("break_it", "check"),
    [
        (lambda x: np.where(x == x.max(), np.nan, x), "finite"),
        (lambda x: np.where(x == x.max(), np.inf, x), "finite"),
        (lambda x: x * 1.5, "range"),
        (lambda x: x - 0.1, "range"),
        (lambda x: x * 0, "empty"),
        (lambda x: np.full_like(x, 0.05), "empty"),
    ],
)
def test_hard_faults_have_names(gate: QualityGate, brains: list[np.ndarray], break_it: object, check: str) -> None:
    result = gate.check(break_it(brains[60]).astype(np.float32))  # type: ignore[operator]
    assert (result.passed, result.worst, result.reason) == (False, check, CHECKS[check])
    to_dict(result)  # travels as JSON, so its scores are finite


def test_a_full_volume_is_no_brain(gate: QualityGate) -> None:
    assert not gate.check(np.full(GRID.shape_xyz, 0.5, np.float32)).passed


def test_an_exempt_check_is_reported_but_stops_nothing(gate: QualityGate, brains: list[np.ndarray]) -> None:
    blurred = ARTEFACTS["blur"](brains[60], MM, np.random.default_rng(0), brains[1])
    strict = gate.check(blurred)
    lenient = gate.exempting(strict.worst).check(blurred)
    assert lenient.values == strict.values
    assert lenient.worst != strict.worst
    assert lenient.score < strict.score
    silent = gate.exempting(*[name for name in CHECKS if name not in ("finite", "range", "empty")])
    assert silent.check(blurred).passed
    assert not silent.check(blurred * np.nan).passed
    with pytest.raises(UserError, match="no checks that could be left out: blurriness"):
        gate.exempting("blurriness")


def test_brightness_alone_changes_no_score(gate: QualityGate, brains: list[np.ndarray]) -> None:
    full, dim = gate.check(brains[60]), gate.check(brains[60] * np.float32(0.8))
    assert dim.score == pytest.approx(full.score, abs=0.1)


def test_left_and_right_are_told_apart_where_they_differ(brains: list[np.ndarray]) -> None:
    """Phantoms are nearly symmetric; with a dark left front, the mirrored ones are known."""
    marked = [x.copy() for x in brains]
    for i, x in enumerate(marked):
        x[6:12, 20:28, 10:18] *= 0.6 + 0.1 * np.sin(i)
    gate = QualityGate.fit(marked[:56], GRID)
    assert gate.spec.flip_accuracy == 1.0
    mirrored = [gate.check(FURTHER["mirrored"](x, MM, np.random.default_rng(0), x)).values["flip"] for x in marked[56:]]
    assert np.mean(np.array(mirrored) >= 1) > 0.9
    assert np.mean([gate.check(x).values["flip"] >= 1 for x in marked[56:]]) < 0.1


def test_a_gate_needs_a_cohort_on_its_grid(brains: list[np.ndarray], gate: QualityGate) -> None:
    with pytest.raises(UserError, match="at least 30 usable volumes to learn from, not 20"):
        QualityGate.fit([*brains[:20], brains[0] * np.nan, brains[0] * 0], GRID)
    with pytest.raises(UserError, match="has \\(5, 5, 5\\) voxels"):
        QualityGate.fit([np.zeros((5, 5, 5), np.float32)], GRID)
    with pytest.raises(UserError, match="false_reject_rate is 0;"):
        QualityGate.fit(brains, GRID, 0.0)
    with pytest.raises(UserError, match="not \\(5, 5, 5\\)"):
        gate.check(np.zeros((5, 5, 5), np.float32))


def test_limits_hold_for_numbers_never_seen() -> None:
    """Pure noise of 40 numbers: about one in a hundred new rows fails, from 90 rows or from 1500."""
    names = [f"contrast.{i}" for i in range(40)]
    rng = np.random.default_rng(3)
    for n in (90, 1500):
        rates = []
        for _ in range(5):
            envelope = fit_envelope(rng.standard_normal((n, 40)), names, 0.01)
            new = rng.standard_normal((4000, 40))
            away = np.abs(new - envelope[:, 0]) / np.where(new > envelope[:, 0], envelope[:, 2], envelope[:, 1])
            rates.append(np.mean((away / envelope[:, 3]).max(1) >= 1))
        assert 0.0005 < np.mean(rates) < 0.02, (n, rates)


def test_a_broken_scan_in_the_cohort_does_not_widen_the_gate() -> None:
    scores = np.random.default_rng(0).exponential(size=90)
    spoilt = np.append(scores[:-1], 1000.0)
    assert tail_quantile(spoilt, 0.01) == pytest.approx(tail_quantile(scores, 0.01), rel=0.2)
    assert tail_quantile(np.arange(10000.0), 0.01) == pytest.approx(9900, abs=2)


def test_a_file_keeps_the_gate(gate: QualityGate, brains: list[np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / "gate.safetensors"
    save_gate(gate.exempting("noise"), path)
    read = load_gate(path)
    assert path.stat().st_size < sum(x.nbytes for x in gate_tensors(gate).values()) + (1 << 14)
    assert read.spec.exempt == ("noise",)
    assert read.check(brains[60]) == gate.exempting("noise").check(brains[60])
    assert to_dict(read.spec) == to_dict(gate.exempting("noise").spec)


@pytest.mark.parametrize("label", GRIDS)
def test_a_gate_at_the_size_of_real_scans_is_under_a_megabyte(label: str) -> None:
    """8 components and 3 maps, twice, and 2 maps more, in half precision; finer blocks than 8 mm would take more."""
    grid = GRIDS[label]
    block = blocks(grid.shape_xyz, grid.spacing_mm, COARSE_MM)
    count = np.prod([-(-n // b) for n, b in zip(grid.shape_xyz, block, strict=True)])
    assert (2 * (COMPONENTS + 3) + 2) * count * 2 + 60 * 4 * 8 < 1 << 20


def test_a_damaged_file_is_refused(gate: QualityGate, tmp_path: Path) -> None:
    path = tmp_path / "gate.safetensors"
    with pytest.raises(UserError, match="there is no quality gate at"):
        load_gate(path)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="is damaged"):
        load_gate(path)
    save_file(gate_tensors(gate), path)
    with pytest.raises(UserError, match="is not a quality gate: it has no record"):
        load_gate(path)
    save_file(gate_tensors(gate), path, metadata={"quality_gate": "{"})
    with pytest.raises(UserError, match="its record is not JSON"):
        load_gate(path)


@pytest.mark.parametrize("fault", ["missing", "shape", "nan", "limit", "stranger"])
def test_arrays_that_do_not_fit_are_refused(gate: QualityGate, tmp_path: Path, fault: str) -> None:
    from brainsynth.gate.file import gate_from_tensors

    arrays = gate_tensors(gate)
    if fault == "missing":
        del arrays["gate.direction"]
    elif fault == "shape":
        arrays["gate.bright.mean"] = arrays["gate.bright.mean"][1:]
    elif fault == "nan":
        arrays["gate.filled.rough"] = arrays["gate.filled.rough"] * np.float16(np.nan)
    elif fault == "limit":
        arrays["gate.envelope"] = arrays["gate.envelope"] * 0
    else:
        arrays["gate.subject"] = arrays["gate.direction"]
    with pytest.raises(UserError, match="is not a quality gate for"):
        gate_from_tensors(gate.spec, arrays, "the file")


def test_any_shape_and_spacing_can_be_measured() -> None:
    rng = np.random.default_rng(0)
    for shape, mm in (((21, 25, 19), 7.0), ((40, 41, 39), 4.0), ((12, 12, 12), 12.0)):
        x = np.zeros(shape, np.float32)
        x[2:-2, 2:-2, 2:-2] = 0.6 + 0.2 * rng.random([n - 4 for n in shape], np.float32)
        found = measure(x, (mm, mm, mm))
        assert found is not None
        assert all(np.isfinite(v) for v in found.numbers.values())


@pytest.mark.real
def test_real_scans_pass_and_broken_ones_do_not(data_root: Path) -> None:
    """OASIS-1 at 4 mm: fitted on 92 people that the gate was not developed on, a first look at 24 others.

    Not on fewer: limits are extrapolated, and widen as people become few. A gate of 46 lets one of the two failed scans
    pass, and catches half of the planted wrong orientations where one of 90 catches nearly all (docs/quality-gate.md).
    """
    if not (data_root / "oasis1_2mm" / "participants.tsv").exists():
        pytest.skip(f"the scans are not in {data_root}")
    grid, table = GRIDS["4 mm"], scans(data_root, "OASIS-1")
    good = table[table.good].iloc[:116]
    volumes = [prepared(row, grid) for row in good.itertuples()]
    gate = QualityGate.fit(volumes[:92], grid)
    rest = volumes[92:]
    assert sum(not gate.check(x).passed for x in rest) <= 2
    for kind in ("cropped", "checkerboard", "ghosting", "noise", "blur", "wrap_around", "bias"):
        found = [
            gate.check(ARTEFACTS[kind](x, grid.spacing_mm, np.random.default_rng(i), rest[0])).passed
            for i, x in enumerate(rest[:10])
        ]
        assert sum(found) <= 1, kind
    failed = table[table.qc == "fail"]
    assert isinstance(failed, pd.DataFrame)
    assert len(failed) == 2
    assert not any(gate.check(prepared(row, grid)).passed for row in failed.itertuples())
