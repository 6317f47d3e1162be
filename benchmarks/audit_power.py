"""Measures the memorisation audit on real scans: which planted copies it detects, and its false-alarm rate.

    python -m benchmarks.audit_power --cache FOLDER [--data FOLDER] [--set oasis|ixi] [--steps 160] [--out FILE]

Half of the subjects are "training": the template and the embedder are fitted on them alone. The others stand in for
generated volumes that copy nobody, and for the held-out scans of the calibration. Copies are training scans, exact and
under seven changes whose severities were fixed before any measurement (SEVERITIES). All draws use fixed seeds.
--steps 0 trains no embedder; voxels are then the only space.
The --cache FOLDER stores features of real scans: keep it outside the repository. IXI was used to choose the method.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from scipy import ndimage

from brainsynth.audit.memorisation import CopyDetector, judge_copies
from brainsynth.errors import UserError
from brainsynth.instruments.alignment import (
    Aligner,
    CanonicalFrame,
    VoxelDescriptor,
    fit_frame,
    to_working_grid,
    working_grid,
)
from brainsynth.models.embedder import load_embedder, save_embedder
from brainsynth.training.embedder import EmbedderTraining, train_embedder
from brainsynth.volume import VolumeSpec

GRID = VolumeSpec(shape_xyz=(80, 112, 80), spacing_mm=(2.0, 2.0, 2.0), origin_mm=(-80.0, -128.0, -72.0))
SPACING = (4.0, 4.0, 4.0)
CPU = torch.device("cpu")
SEVERITIES = {
    "exact": "none",
    "shift": "uniform within 8 mm along each axis",
    "rotation": "uniform within 8 degrees about each axis",
    "flip": "left-right",
    "noise": "Gaussian, sigma 0.05 of the range at 2 mm, clipped to [0, 1]",
    "blur": "Gaussian, FWHM 6 mm",
    "gamma": "0.7 to 1.4, log-uniform",
    "warp": "smooth random field (Gaussian, sigma 16 mm), largest displacement 4 mm",
}
KINDS = tuple(SEVERITIES)
RATE = 0.01


def rigid(volume: np.ndarray, degrees: np.ndarray, shift_mm: np.ndarray) -> np.ndarray:
    """Turned about the centre and shifted, trilinear."""
    turn = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        i, j = [k for k in range(3) if k != axis]
        step = np.eye(3)
        step[i, i] = step[j, j] = np.cos(angle)
        step[i, j], step[j, i] = -np.sin(angle), np.sin(angle)
        turn = turn @ step
    centre = (np.array(volume.shape) - 1) / 2
    return ndimage.affine_transform(volume, turn, centre - turn @ centre + shift_mm / 2.0, order=1)


def warped(volume: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moved along a smooth random field by at most 4 mm."""
    small = [-(-n // 4) for n in volume.shape]  # a grid of 8 mm holds a field that is smooth over 16 mm
    field = np.stack([ndimage.gaussian_filter(rng.normal(size=small), 2.0) for _ in range(3)])
    field = np.stack(
        [ndimage.zoom(part, [a / b for a, b in zip(volume.shape, small, strict=True)], order=1) for part in field]
    )
    field *= 4.0 / 2.0 / np.sqrt((field**2).sum(0)).max()
    return ndimage.map_coordinates(volume, np.indices(volume.shape) + field, order=1)


def changed(volume: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """A copy of a 2 mm volume in [0, 1], changed in one of the eight ways."""
    if kind == "shift":
        return rigid(volume, np.zeros(3), rng.uniform(-8, 8, 3))
    if kind == "rotation":
        return rigid(volume, rng.uniform(-8, 8, 3), np.zeros(3))
    if kind == "flip":
        return volume[::-1].copy()
    if kind == "noise":
        return np.clip(volume + rng.normal(0, 0.05, volume.shape), 0, 1).astype(np.float32)
    if kind == "blur":
        return ndimage.gaussian_filter(volume, 6 / 2.3548 / 2.0)
    if kind == "gamma":
        return volume ** np.float32(np.exp(rng.uniform(np.log(0.7), np.log(1.4))))
    return warped(volume, rng) if kind == "warp" else volume


def scans(data: Path, name: str) -> pd.DataFrame:
    """One line a scan: subject, session, path, mask path."""
    folder = data / {"ixi": "ixi_2mm", "oasis": "oasis1_2mm"}[name]
    table = pd.read_csv(folder / "participants.tsv", sep="\t")
    if "qc" in table:
        table = table[table["qc"] != "fail"]
    dseg = table["dseg"] if "dseg" in table else [""] * len(table)
    session = table["session"] if "session" in table else ["MR1"] * len(table)
    return pd.DataFrame(
        {
            "subject": table["participant_id"].to_numpy(),
            "session": list(session),
            "path": [str(folder / file) for file in table["t1w"]],
            "brain_mask": [str(folder / file) if file else "" for file in dseg],
        }
    )


def load(row: Any) -> np.ndarray:
    """The brain of a scan at 2 mm, in [0, 1]."""
    image = np.asarray(nib.load(row.path).dataobj, np.float32)
    if row.brain_mask:
        image = image * (np.asarray(nib.load(row.brain_mask).dataobj) > 0)
    return np.clip(image / np.percentile(image, 99.9), 0, 1).astype(np.float32)


def describe(task: tuple[Any, int, int, CanonicalFrame, str]) -> tuple[np.ndarray, np.ndarray, float]:
    """One scan: (versions, 2, 512) voxel and (versions, 1, 128) embedding features, and seconds per volume of the audit."""
    row, number, draws, frame, weights = task
    torch.set_num_threads(1)
    image, rng = load(row), np.random.default_rng((20, number))
    aligner, descriptor = Aligner(frame), VoxelDescriptor(frame)
    embedder = load_embedder(Path(weights), CPU) if weights else None
    kinds = [*KINDS, *(kind for _ in range(draws - 1) for kind in KINDS[1:])]
    versions = [changed(image, kind, rng) for kind in kinds]
    began = time.process_time()
    aligned = np.concatenate([aligner.align(to_working_grid(version, GRID)[None]).volumes for version in versions])
    voxels = descriptor.describe(aligned)
    embedding = embedder.embed(aligned)[:, None] if embedder else np.empty((len(aligned), 1, 0), np.float32)
    return voxels, embedding, (time.process_time() - began) / len(versions)


def features(options: argparse.Namespace, table: pd.DataFrame, training: np.ndarray) -> tuple[dict, float]:
    """Space → list of features per scan, versions first; computed once, kept in the cache."""
    cache = options.cache / f"audit-{options.set}-{options.steps}-{options.draws}.npz"
    if not cache.exists():
        grid = working_grid(GRID)
        mine = np.stack([to_working_grid(load(row), GRID) for row in table[training].itertuples()])
        frame = fit_frame(mine, grid.spacing_mm)
        weights = options.cache / f"embedder-{options.set}.safetensors" if options.steps else None
        if weights and not weights.exists():
            began, aligned = time.perf_counter(), np.concatenate([Aligner(frame).align(v[None]).volumes for v in mine])
            embedder = train_embedder(
                aligned,
                grid.spacing_mm,
                EmbedderTraining(steps=options.steps),
                CPU,
                lambda step, loss: print(step, round(loss, 3), flush=True) if step % 20 == 0 else None,
            )
            save_embedder(embedder, weights)
            print(f"embedder: {time.perf_counter() - began:.0f} s", flush=True)
        draws = [1 if mine else options.draws for mine in training]
        tasks = [(table.iloc[i], i, draws[i], frame, str(weights or "")) for i in range(len(table))]
        with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
            done = list(pool.map(describe, tasks, chunksize=4))
        np.savez(
            cache,
            voxels=np.concatenate([d[0] for d in done]),
            embedding=np.concatenate([d[1] for d in done]),
            versions=np.array([len(d[0]) for d in done]),
            seconds=np.median([d[2] for d in done]),
        )
    kept = np.load(cache)
    cuts = np.cumsum(kept["versions"])[:-1]
    return {name: np.split(kept[name], cuts) for name in ("voxels", "embedding")}, float(kept["seconds"])


class Study:
    """Splits of one set of scans, scored in chosen spaces."""

    def __init__(self, found: dict, names: tuple[str, ...], table: pd.DataFrame, training: np.ndarray) -> None:
        self.found, self.names = found, names
        self.number = np.unique(table["subject"], return_inverse=True)[1]
        self.first = ~table["subject"].duplicated().to_numpy()
        self.training, self.others = np.nonzero(training & self.first)[0], np.nonzero(~training & self.first)[0]
        # In voxels nothing but a mean was fitted to the training half, so that any partition of the subjects will do.
        self.free = names == ("voxels",)

    def partition(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Training scans and other scans, in random order, of different subjects."""
        if self.free:
            drawn = rng.permutation(np.concatenate([self.training, self.others]))
            return drawn[:size], drawn[size:]
        return rng.choice(self.training, size, replace=False), rng.permutation(self.others)

    def take(self, rows: np.ndarray, version: int | slice = slice(0, 1)) -> dict:
        """Features of some versions of some scans, scan by scan."""
        part = slice(version, version + 1) if isinstance(version, int) else version
        return {
            name: np.concatenate([self.found[name][0][:0], *(self.found[name][i][part] for i in rows)])
            for name in self.names
        }

    def detector(self, rows: np.ndarray, held: np.ndarray) -> CopyDetector:
        return CopyDetector(self.take(rows), self.number[rows], self.take(held), self.number[held])

    def false_alarms(self, size: int, held: int, transformed: bool, splits: int) -> dict:
        """Share of stand-ins flagged at 1 %, over random splits; the interval resamples splits."""
        rates, null, queries = [], 0, 0
        rng = np.random.default_rng((21, size, held, transformed))
        for _ in range(splits):
            rows, drawn = self.partition(rng, size)
            detector = self.detector(rows, drawn[:held])
            part = slice(0, None) if transformed else slice(0, 1)
            scored = detector.score(self.take(drawn[held:], part)).statistic
            rates.append(float((detector.null.p_values(scored) <= RATE + 1e-12).mean()))
            null, queries = len(detector.null.values), len(scored)
        means = np.array(rates)[rng.integers(0, splits, (2000, splits))].mean(1)
        nominal = int(RATE * (null + 1) + 1e-9) / (null + 1)
        return {
            "training": size,
            "held_out_in_null": held,
            "null": null,
            "queries": queries,
            "queries_per_training_scan": round(queries / size, 3),
            "splits": splits,
            "queries_transformed_too": transformed,
            "exact_expectation": round(nominal, 5),
            "false_alarm_rate": round(float(np.mean(rates)), 5),
            "interval_95": np.quantile(means, [0.025, 0.975]).round(5).tolist(),
        }

    def power(self, splits: int, held: int) -> dict:
        """Copies of every training scan, per kind: flagged at 1 %, right subject, outright among 100 and 100,000."""
        rng, out = np.random.default_rng(22), {}
        detectors = [self.detector(self.training, rng.permutation(self.others)[:held]) for _ in range(splits)]
        for version, kind in enumerate(KINDS):
            shares = {"flagged": [], "right_subject": [], "outright_of_100": [], "outright_of_100000": []}
            worst = -np.inf
            for detector in detectors:
                scored = detector.score(self.take(self.training, version))
                tail = detector.null.tail_p_values(scored.statistic)
                shares["flagged"].append((detector.null.p_values(scored.statistic) <= RATE + 1e-12).mean())
                shares["right_subject"].append((scored.subjects == self.number[self.training]).mean())
                shares["outright_of_100"].append((tail * 100 <= 0.01).mean())
                shares["outright_of_100000"].append((tail * 1e5 <= 0.01).mean())
                worst = max(worst, float(scored.statistic.max()))
            out[kind] = {
                "copies": len(self.training),
                **{name: round(float(np.mean(values)), 4) for name, values in shares.items()},
                "least_suspicious_statistic": round(worst, 2),
            }
        out["null_lowest_statistic"] = round(float(min(d.null.values[0] for d in detectors)), 2)
        out["null_drift_p_values"] = [round(d.null.drift_p, 4) for d in detectors]
        return out

    def verdicts(self, trials: int) -> dict:
        """Datasets of up to 100 stand-ins, each another person, as they are or changed; none or one of them a copy."""
        rng, failed = np.random.default_rng(23), dict.fromkeys(("clean", *KINDS), 0)
        names, held = {int(n): str(n) for n in self.number}, max(len(self.others) - 100, 99 - len(self.training))
        for _ in range(trials):
            rows, drawn = self.partition(rng, len(self.training))
            detector, versions = self.detector(rows, drawn[:held]), rng.integers(0, len(KINDS), len(drawn))
            parts = [self.take(drawn[i : i + 1], int(versions[i])) for i in range(held, len(drawn))]
            for kind in failed:
                if kind != "clean":
                    parts[-1] = self.take(rng.choice(rows, 1), KINDS.index(kind))
                whole = {name: np.concatenate([part[name] for part in parts]) for name in self.names}
                ids = [str(i) for i in range(len(parts))]
                failed[kind] += not judge_copies(detector.null, detector.score(whole), ids, names).passed
        return {"trials": trials, "volumes": len(parts), "null": len(detector.null.values), "failed": failed}

    def repeats(self, table: pd.DataFrame, held: int) -> dict:
        """Second scans of people whose first scan is in training: are they called copies?"""
        again = np.nonzero((table["session"] != "MR1").to_numpy() & ~self.first)[0]
        if not len(again):
            return {}
        firsts = np.array([np.nonzero((self.number == self.number[i]) & self.first)[0][0] for i in again])
        rest = np.setdiff1d(self.others, firsts)
        rows = np.union1d(self.training, firsts)
        detector = self.detector(rows, rest[:held])
        scored = detector.score(self.take(again))
        tail = detector.null.tail_p_values(scored.statistic)
        return {
            "pairs": len(again),
            "flagged": int((detector.null.p_values(scored.statistic) <= RATE + 1e-12).sum()),
            "right_subject": int((scored.subjects == self.number[again]).sum()),
            "outright_of_100000": int((tail * 1e5 <= 0.01).sum()),
            "statistics": np.sort(scored.statistic).round(2).tolist(),
        }


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("BRAINSYNTH_DATA", beside)))
    parser.add_argument("--set", choices=("oasis", "ixi"), default="oasis")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--draws", type=int, default=2, help="of each change of the stand-ins")
    parser.add_argument("--same", nargs="*", default=[], metavar="ID=ID", help="ids that are one person")
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.workers)
    table = scans(options.data, options.set)
    subjects = np.random.default_rng(19).permutation(np.unique(table["subject"]))
    training = table["subject"].isin(subjects[: len(subjects) // 2]).to_numpy()
    found, seconds = features(options, table, training)
    for pair in options.same:
        table["subject"] = table["subject"].replace(dict([pair.split("=")]))
    result: dict[str, Any] = {
        "set": options.set,
        "scans": len(table),
        "ids_taken_for_one_person": options.same,
        "subjects": len(subjects),
        "training_subjects": len(subjects) // 2,
        "severities": SEVERITIES,
        "cpu_seconds_per_volume": round(seconds, 3),
        "spaces": {},
    }
    for names in (("voxels",), ("embedding",), ("voxels", "embedding"))[: 3 if options.steps else 1]:
        study = Study(found, names, table, training)
        most = len(study.training)
        half = max(len(study.others) // 2, 99 - most)
        people = most + len(study.others)
        plans = [
            (7, 100, False),
            (7, 100, True),
            (20, 100, False),
            (50, 100, False),
            (most, half, False),
            (most, half, True),
        ]
        if study.free:
            plans += [(people - 100, 50, False), (people - 3, 0, False)]
        else:
            plans += [(most, len(study.others) - 1, False)]
        plans = [plan for plan in plans if plan[1] < (people - plan[0] if study.free else len(study.others))]
        alarms = []
        for size, held, transformed in plans:
            try:
                alarms.append(study.false_alarms(size, held, transformed, options.splits))
            except UserError as error:
                print("left out:", error)
        result["spaces"][" + ".join(names)] = {
            "power": study.power(10, half),
            "verdicts": study.verdicts(options.splits // 2),
            "repeat_scans": study.repeats(table, half),
            "false_alarms": alarms,
        }
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
