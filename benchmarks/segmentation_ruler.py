"""Prints, as Markdown, how well the segmentation ruler measures real scans, and what a volume costs on one core.

    python -m benchmarks.segmentation_ruler [--data FOLDER] [--measurements FILE] [--subjects 48] [--grids "4 mm"] [--quick]

FOLDER (default: $BRAINSYNTH_DATA, or ../shared/data next to the repository) holds scans, tables and weights. Subjects are
the first ones of a seeded shuffle; the network was trained on none of them. Each scan is measured on its own 2 mm grid and
on the 4 mm grid of configs/ixi-4mm. `calibrated` volumes come from a line fitted to all the other subjects. FILE stores the
measurements: a second run resumes from it. The errors are also written to results/rulers.json.

    python -m benchmarks.segmentation_ruler --evaluation runs/ixi-4mm/evaluation

measures nothing, and reads what `brainsynth evaluate` measured on all scans of its reference.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from brainsynth.config.evaluation import SegmentationConfig
from brainsynth.instruments.measured import measured_table
from brainsynth.instruments.segmentation import Calibration, SegmentationRuler, table_line
from brainsynth.metrics.agreement import agreement
from brainsynth.records import to_dict
from brainsynth.volume import VolumeSpec, resample
from tests.gate.scans import COARSE, brain

SEGMENTER = "instruments/meshnet18/model.safetensors"
CPU = torch.device("cpu")
FLOAT32_SCANS = 6
QUANTITIES = {"ventricles": "ventricles_ml", "brain": "brain_ml"}
SETS = {
    "IXI": {"ventricles": "vent_ml", "brain": "brain_ml"},
    "OASIS-1": {"ventricles": "vent_mni_ml", "brain": "brain_mni_ml"},
}


def coarse(image: np.ndarray, grid: VolumeSpec) -> np.ndarray:
    """As a prepared cohort at 4 mm stores it: resampled, scaled to [0, 1], rounded."""
    small = resample(image, grid.affine, COARSE)
    return COARSE.as_stored(small / np.percentile(small, 99.9))


def subjects(data: Path, name: str, count: int) -> pd.DataFrame:
    """`count` subjects with reference volumes, one session each, in a seeded order; failed scans left out."""
    folder = {"IXI": "ixi_2mm", "OASIS-1": "oasis1_2mm"}[name]
    table = pd.read_csv(data / folder / "participants.tsv", sep="\t")
    table = table.dropna(subset=list(SETS[name].values()))
    if "qc" in table:
        table = table[table["qc"] != "fail"].drop_duplicates("participant_id")
    table = table.assign(folder=str(data / folder)).reset_index(drop=True)
    return table.iloc[np.random.default_rng(0).permutation(len(table))[:count]].reset_index(drop=True)


class Measurements:
    """What was measured, one line a scan and variant, kept in a file."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.lines: dict[str, dict[str, Any]] = {}
        if file and file.exists():
            self.lines = {line["key"]: line for line in pd.read_csv(file).to_dict("records")}

    def take(self, key: str, ruler: SegmentationRuler, image: np.ndarray, grid: VolumeSpec) -> dict[str, Any]:
        if key not in self.lines:
            began = time.perf_counter()
            found = table_line(ruler.measure_labelled(image, grid)[0])
            self.lines[key] = {"key": key, **found, "seconds": time.perf_counter() - began}
            print(key, f"{found['ventricles_ml']:.2f} {found['brain_ml']:.1f} {found['flags']}", flush=True)
            if self.file:
                pd.DataFrame(self.lines.values()).to_csv(self.file, index=False)
        return self.lines[key]


def measure_set(
    name: str, table: pd.DataFrame, ruler: SegmentationRuler, kept: Measurements, grids: list[str]
) -> dict[str, Any]:
    """grid → one table of measurements in the order of the subjects."""
    lines: dict[str, list[dict[str, Any]]] = {grid: [] for grid in grids}
    for row in table.itertuples():
        image, grid = brain(row)
        for label in grids:
            voxels, on = (image, grid) if label == "2 mm" else (coarse(image, grid), COARSE)
            lines[label].append(kept.take(f"{name}/{row.participant_id}/{label}", ruler, voxels, on))
    return {label: pd.DataFrame(found) for label, found in lines.items()}


def errors(name: str, table: pd.DataFrame, measured: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Scans and quantity → error as measured, and of every subject by the line through the others."""
    return {
        f"{name}, {label}, {quantity}": error(
            lines[column].to_numpy(), table[SETS[name][quantity]].to_numpy(dtype=float)
        )
        for label, lines in measured.items()
        for quantity, column in QUANTITIES.items()
    }


def in_ml(measured: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """How well volumes in ml agree."""
    found = agreement(measured, true)
    kept = {name: getattr(found, name) for name in ("n", "r", "r_low", "r_high", "slope")}
    return kept | {"mae_ml": found.mae, "bias_ml": found.bias}


def error(measured: np.ndarray, true: np.ndarray) -> dict[str, Any]:
    """As measured, and calibrated by the line through all the other subjects."""
    others = [np.arange(len(true)) != i for i in range(len(true))]
    left_out = [float(Calibration.fit(measured[o], true[o]).apply(measured[i])) for i, o in enumerate(others)]
    return {
        "as measured": in_ml(measured, true),
        "calibrated": in_ml(np.array(left_out), true),
        "line": to_dict(Calibration.fit(measured, true)),
    }


def evaluated(folder: Path) -> dict[str, dict[str, Any]]:
    """The same of the reference scans that brainsynth evaluate measured with the segmentation (its output folder)."""
    table = measured_table(str(folder / "measured-reference"))
    found = {}
    for quantity, column, covariate in (
        ("ventricles", "ventricles_ml", "ventricular_volume"),
        ("brain", "brain_ml", "brain_volume"),
    ):
        both = table[[column, covariate]].dropna().to_numpy(np.float64)
        found[f"reference of {folder.name}, {quantity}"] = error(both[:, 0], both[:, 1])
    return found


def error_rows(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The errors as Markdown."""
    for scans, both in found.items():
        line = both["line"]
        for what, words in (
            ("as measured", "none"),
            ("calibrated", f"{line['ml_per_ml']:.3f} x {line['offset_ml']:+.1f}"),
        ):
            e = both[what]
            yield (
                f"| {scans} | {words} | {e['n']} | {e['r']:.4f} [{e['r_low']:.4f}, {e['r_high']:.4f}] | {e['slope']:.3f} | "
                f"{e['bias_ml']:+.2f} | {e['mae_ml']:.2f} |"
            )


def precision_rows(table: pd.DataFrame, config: SegmentationConfig, kept: Measurements) -> Iterator[str]:
    """What bfloat16 changes, in ml, on the same scans."""
    exact = SegmentationRuler.load(SegmentationConfig(segmenter=config.segmenter, precision="float32"), CPU)
    lines = []
    for row in table.itertuples():
        image, grid = brain(row)
        full = kept.take(f"IXI/{row.participant_id}/2 mm float32", exact, image, grid)
        lines.append((full, kept.lines[f"IXI/{row.participant_id}/2 mm"]))
    for quantity, column in QUANTITIES.items():
        change = np.array([half[column] - full[column] for full, half in lines])
        share = 100 * np.abs(change).max() / np.mean([full[column] for full, _ in lines])
        yield f"| {quantity} | {len(lines)} | {change.mean():+.3f} | {np.abs(change).max():.3f} | {share:.2f} % |"


def speed_rows(config: SegmentationConfig, shape: tuple[int, int, int]) -> Iterator[str]:
    """Seconds of the network alone, on noise of a brain's size: the best of three rounds through all variants."""
    image, best = torch.rand(shape), {}
    networks = {}
    for name, layout in (("channels-last", torch.channels_last_3d), ("contiguous", torch.contiguous_format)):
        for precision in ("float32", "bfloat16"):
            loaded = SegmentationConfig(segmenter=config.segmenter, precision=precision)
            networks[precision, name] = SegmentationRuler.load(loaded, CPU).segmenter.to(memory_format=layout)
    for _ in range(3):
        for key, network in networks.items():
            began = time.perf_counter()
            network.labels(image)
            best[key] = min(best.get(key, 1e9), time.perf_counter() - began)
    return (f"| {precision} | {name} | {seconds:.1f} |" for (precision, name), seconds in best.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("BRAINSYNTH_DATA", beside)))
    parser.add_argument("--measurements", type=Path, help="CSV file that keeps what was measured")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "rulers.json"
    )
    parser.add_argument("--grids", nargs="+", default=["2 mm", "4 mm"], choices=["2 mm", "4 mm"])
    parser.add_argument("--quick", action="store_true", help="only the errors on IXI")
    for name, default in (("subjects", 48), ("oasis-subjects", 24)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--evaluation", type=Path, help="judge what this evaluation measured on its reference instead")
    a = parser.parse_args()
    torch.set_num_threads(1)
    config = SegmentationConfig(segmenter=str(a.data / SEGMENTER))
    ruler, kept = SegmentationRuler.load(config, CPU), Measurements(a.measurements)
    found: dict[str, Any] = evaluated(a.evaluation) if a.evaluation else {}
    sets = [("IXI", a.subjects), *([] if a.quick else [("OASIS-1", a.oasis_subjects)])]
    for name, count in [] if a.evaluation else sets:
        table = subjects(a.data, name, count)
        found |= errors(name, table, measure_set(name, table, ruler, kept, a.grids))
    print(
        "\n| scans | calibration | n | r [95 % CI] | slope | bias [ml] | MAE [ml] |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *error_rows(found),
        sep="\n",
        flush=True,
    )
    a.output.write_text(json.dumps(found, indent=1) + "\n")
    if not a.quick and not a.evaluation:
        print_costs(a, config, kept)


def print_costs(a: argparse.Namespace, config: SegmentationConfig, kept: Measurements) -> None:
    """What precision and memory layout change."""
    few = subjects(a.data, "IXI", a.subjects)
    print(
        "\n| precision | layout | seconds |\n| --- | --- | --- |",
        *speed_rows(config, (144, 184, 144)),
        "\n| bfloat16 minus float32 | scans | mean [ml] | largest [ml] | largest / mean volume |",
        "| --- | --- | --- | --- | --- |",
        *precision_rows(few[:FLOAT32_SCANS], config, kept),
        f"\nseconds per IXI volume at 2 mm, all in, one thread: median {_median_seconds(kept):.1f}",
        sep="\n",
    )


def _median_seconds(kept: Measurements) -> float:
    return float(
        np.median([v["seconds"] for k, v in kept.lines.items() if k.startswith("IXI/") and k.endswith("2 mm")])
    )


if __name__ == "__main__":
    main()
