"""Do synthetic volumes with label maps teach to segment real scans? Curves over the number of scans, over seeds.

    python -m recipes.t1w_2mm_segmentation --dataset runs/t1w-2mm/generated --cohort runs/t1w-2mm/cohort-labels \
        --out benchmarks/results/segmentation-usefulness.json [--spread DATASET] [--figure docs/images/NAME.png]

The U-Net and the fixed budget of steps of the task `structures` of `brainsynth evaluate`, trained from scratch on: n real
scans; n, and 4 n, synthetic volumes; n real scans with 4 n synthetic volumes in half of each batch. With `--spread`, the
last three again from a dataset whose ventricular volume was drawn evenly (`cohort --spread`). Tested on the cohort's
validation scans, against their label maps. Scans and volumes are drawn by seed; the arms of a seed share the n real scans,
those of 50 hold those of 20, and the network's first weights. An arm that needs more than there are is left out, and named.

Every finished training is kept in `--work`, so the same command resumes; with other options they are other trainings.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure

from brainsynth.instruments.measurement import check_same_grid
from brainsynth.models.device import choose_device
from brainsynth.reading.dataset import SyntheticDataset, open_dataset
from brainsynth.records import digest, to_dict
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.whole_file import write_whole
from brainsynth.usefulness.budgeted_training import Source, TrainingBudget, train_and_predict
from brainsynth.usefulness.scores import METRICS, estimates, metrics_of, outcome_of, per_seed, resampled
from brainsynth.usefulness.structures import Structures, shared_structures
from brainsynth.usefulness.tasks import DatasetVolumes, label_maps

F64 = npt.NDArray[np.float64]
MORE = 4  # synthetic volumes for each real scan, in the arms that have more
PAIRS = (
    ("synthetic", "real"),
    ("4n synthetic", "real"),
    ("real and 4n synthetic", "real"),
    ("spread", "real"),
    ("spread", "synthetic"),
    ("4n spread", "4n synthetic"),
    ("real and 4n spread", "real"),
    ("real and 4n spread", "real and 4n synthetic"),
)
"""Arms that are compared at equal n: a difference, and a ratio."""


def labelled(dataset: SyntheticDataset, structures: Structures) -> Source:
    """All its volumes, and the classes of their voxels; read when needed."""
    rows = np.arange(len(dataset))
    return Source(DatasetVolumes(dataset, rows), label_maps(dataset, rows, structures))


def arms(n: int, seed: int, real: Source, made: dict[str, Source]) -> dict[str, list[Source]]:
    """Training sets of n, each a list of sources with equal shares of a batch; without those that have too few."""

    def first(source: Source, count: int) -> Source | None:
        order = np.random.default_rng([seed, 3]).permutation(len(source))
        return source.subset(order[:count]) if count <= len(source) else None

    few = first(real, n)
    sets: dict[str, list[Source | None]] = {"real": [few]}
    for name, source in made.items():
        sets[name] = [first(source, n)]
        sets[f"{MORE}n {name}"] = [first(source, MORE * n)]
        sets[f"real and {MORE}n {name}"] = [few, first(source, MORE * n)]
    return {name: [p for p in parts if p is not None] for name, parts in sets.items() if None not in parts}


def cell(
    path: Path, sources: list[Source], test: Source, budget: TrainingBudget, seed: int, structures: Structures
) -> dict[str, Any]:
    """One training and its test, read if it is there: (N, K) metrics of each test scan, and CPU seconds."""
    if not path.is_file():
        began, device = time.process_time(), choose_device(False)
        predicted = train_and_predict("structures", sources, test.volumes, budget, seed, device, structures)
        outcome = outcome_of("structures", predicted, test.labels, structures)
        found = {"outcome": outcome.tolist(), "cpu_s": time.process_time() - began}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(found).encode())
    done: dict[str, Any] = json.loads(path.read_text())
    return done


def summary(outcomes: dict[str, list[F64]], people: npt.NDArray[Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Arms, and their differences and ratios, at one n: each metric with intervals over seeds and over test people."""
    seeds = {arm: per_seed("structures", each) for arm, each in outcomes.items()}
    drawn = {arm: resampled("structures", each, people) for arm, each in outcomes.items()}
    found: dict[str, Any] = {"arms": {}, "differences": {}, "ratios": {}}
    for arm in outcomes:
        known = estimates(names, seeds[arm], drawn[arm])
        found["arms"][arm] = {name: plain(known.pop(name)) for name in METRICS["structures"] if name in known}
        found["arms"][arm]["structures"] = {name: round(one.mean, 4) for name, one in known.items()}
    main = [names.index(name) for name in METRICS["structures"] if name in names]
    for a, b in PAIRS:
        if a in outcomes and b in outcomes:
            for what, pair in (("differences", np.subtract), ("ratios", np.divide)):
                values = (pair(each[a][:, main], each[b][:, main]) for each in (seeds, drawn))
                known = estimates(METRICS["structures"][: len(main)], *values, clip=False)
                found[what][f"{a}, {b}"] = {name: plain(one) for name, one in known.items()}
    return found


def plain(estimate: Any) -> dict[str, Any]:
    """With four decimals."""
    return {k: np.round(v, 4).tolist() for k, v in to_dict(estimate).items()}


def curves(found: dict[str, Any]) -> Figure:
    """Dice over n, a line for each arm, with the interval over seeds; a panel for each metric."""
    sizes = sorted(found["curve"], key=int)
    first = next(iter(found["curve"][sizes[0]]["arms"].values()))
    metrics = [name for name in METRICS["structures"] if name in first]
    figure = Figure(figsize=(4.6 * len(metrics), 4.0), layout="constrained")
    names = list(dict.fromkeys(arm for n in sizes for arm in found["curve"][n]["arms"]))
    for metric, axis in zip(metrics, np.atleast_1d(figure.subplots(1, len(metrics))), strict=True):
        for place, arm in enumerate(names):
            there = [n for n in sizes if arm in found["curve"][n]["arms"]]
            known = [found["curve"][n]["arms"][arm][metric] for n in there]
            mean = np.array([one["mean"] for one in known])
            error = [mean - [one["low"] for one in known], [one["high"] for one in known] - mean]
            x = np.array([int(n) for n in there]) * 1.02 ** (place - len(names) / 2)
            axis.errorbar(x, mean, error, marker="o", ms=4, lw=1, capsize=2, label=arm)
        axis.set_xscale("log")
        axis.set_xticks([int(n) for n in sizes], sizes)
        axis.minorticks_off()
        axis.set_xlabel("n")
        axis.set_ylabel("Dice, " + ("mean of structures" if metric == "dice" else "all ventricles"))
    axis.legend(fontsize=8)
    return figure


def measured(a: argparse.Namespace) -> dict[str, Any]:
    """Every training that is not done yet, and what all of them say."""
    train, held = (open_dataset(a.cohort, split=split) for split in ("train", "validation"))
    given = {"synthetic": a.dataset} | ({"spread": a.spread} if a.spread else {})
    datasets = {"real": train} | {name: open_dataset(uri, partial=a.partial) for name, uri in given.items()}
    plans = {name: read_plan(open_store(dataset.uri)) for name, dataset in datasets.items()}
    structures = shared_structures({f"{name}: {datasets[name].uri}": plan.labels for name, plan in plans.items()})
    for dataset in datasets.values():
        check_same_grid(dataset, train)
    made = {name: labelled(dataset, structures) for name, dataset in datasets.items()}
    real, test = made.pop("real"), labelled(held, structures)
    budget = TrainingBudget(a.steps, a.batch_size, a.learning_rate, 1e-2, tuple(a.box))
    data = {name: [plan.fingerprint, datasets[name].sample_ids] for name, plan in plans.items()}
    outcomes: dict[int, dict[str, list[F64]]] = {n: {} for n in a.sizes}
    seconds = []
    for seed, n in itertools.product(range(a.seeds), a.sizes):
        sets = arms(n, seed, real, made)
        for arm, sources in sets.items():
            if arm not in a.arms:
                continue
            known = [data["real"], *(data[name] for name in made if name in arm)]
            identity = digest({"budget": asdict(budget), "data": known, "arm": arm, "n": n, "seed": seed})
            done = cell(Path(a.work) / f"{identity[:16]}.json", sources, test, budget, seed, structures)
            outcomes[n].setdefault(arm, []).append(np.array(done["outcome"]))
            seconds.append(done["cpu_s"])
            print(f"seed {seed}, n = {n}, {arm}: Dice {outcomes[n][arm][-1][:, 0].mean():.3f}", flush=True)
        if missing := set(arms(1, seed, real, made)) - set(sets):
            print(f"n = {n}: too few scans or volumes for {', '.join(sorted(missing))}")
    names, people = metrics_of("structures", structures), np.array(held.sample_ids)
    return {
        "budget": asdict(budget),
        "seeds": a.seeds,
        "scans": {"training": len(train), "test": len(held)},
        "volumes": {name: len(source) for name, source in made.items()},
        "all ventricles": [structures.names[c - 1] for c in structures.ventricles],
        "CPU seconds a training": round(float(np.mean(seconds)), 1),
        "curve": {str(n): summary(each, people, names) for n, each in outcomes.items() if each},
    }


def main() -> None:
    """Train what is missing, then write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="synthetic volumes with label maps")
    parser.add_argument("--spread", help="the same, ventricular volume drawn evenly")
    parser.add_argument("--partial", action="store_true", help="the datasets are still being made: what is there now")
    parser.add_argument("--cohort", default="runs/t1w-2mm/cohort-labels")
    parser.add_argument("--out", required=True)
    parser.add_argument("--figure")
    parser.add_argument("--work", default="runs/t1w-2mm/segmentation-usefulness", help="keeps finished trainings")
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 50, 100])
    named = sorted({arm for pair in PAIRS for arm in pair})
    parser.add_argument(
        "--arms", nargs="+", choices=named, default=named, metavar="ARM", help="only these training sets"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--box", type=int, nargs=3, default=[48, 48, 48], help="voxels of the box that a step sees")
    parser.add_argument("--learning-rate", type=float, default=5e-2)
    a = parser.parse_args()
    if a.seeds < 2 or min(a.sizes) < 2 or min(a.box) < 8 or a.batch_size < 2 or a.batch_size % 2:
        parser.error("--seeds and --sizes must be at least 2, --box at least 8 voxels, --batch-size even")
    torch.set_num_threads(1)
    found = measured(a)
    write_whole(Path(a.out), (json.dumps(found, indent=1) + "\n").encode())
    if a.figure:
        curves(found).savefig(a.figure, dpi=70)
    for n, each in found["curve"].items():
        for what in ("differences", "ratios"):
            for pair, metrics in each[what].items():
                shown = "; ".join(f"{m} {e['mean']} ({e['low']}, {e['high']})" for m, e in metrics.items())
                print(f"n = {n}, {what}, {pair}: {shown}")


if __name__ == "__main__":
    main()
