"""Train on synthetic, test on real: does a dataset teach what real scans teach? Minutes; one JSON file.

    python -m recipes.t1w_2mm_usefulness --dataset runs/t1w-2mm/generated --cohort runs/t1w-2mm/cohort \
        --out benchmarks/results/t1w-2mm-usefulness.json

For each covariate a ridge regression on tissue maps is fitted on n generated volumes (labels: what was asked) and on n
training scans, and tested on the validation scans, which neither saw. n is the size of the dataset, or of its first
`--volumes`; `--scans` takes fewer scans than that, to ask what ten times as many volumes are worth. Real subsets of n are
drawn 200 times, and with them the test scans (bootstrap), so that the interval covers both. `all real` has every training
scan. Scans without the covariate are left out. The small networks of `usefulness` in `brainsynth evaluate` are the stronger
instrument, and take hours at this size.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from brainsynth.instruments.covariate_ruler import CovariateRuler
from brainsynth.instruments.tissue_features import tissue_features
from brainsynth.reading.dataset import open_dataset
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import open_store

F32, F64 = npt.NDArray[np.float32], npt.NDArray[np.float64]
COVARIATES = ("age", "ventricular_volume", "brain_volume")
REPEATS = 200


def features(uri: str, split: str | None = None, count: int | None = None) -> tuple[F32, dict[str, F64]]:
    """(N, F) tissue maps of all, or of the first `count`, and each covariate (N,) in its unit."""
    dataset, grid = open_dataset(uri, split=split), read_plan(open_store(uri)).volume
    found = np.stack([tissue_features(dataset.volume(i), grid) for i in range(len(dataset))[:count]])
    return found, {name: dataset.table[name].to_numpy(np.float64)[:count] for name in COVARIATES}


def errors(train: F32, labels: F64, test: F32, true: F64) -> F64:
    """(M,) absolute errors on the test scans; the penalty is chosen within the training rows."""
    ruler = CovariateRuler.fit(train, labels, groups=np.arange(len(train)), own_error=False)
    return np.abs(ruler.predict(test) - true)


def compared(synthetic: F64, equal_real: list[F64], all_real: F64) -> dict[str, Any]:
    """Mean absolute errors, and the ratio real over synthetic (1: as useful) with a 95 % bootstrap interval."""
    rng, ratios = np.random.default_rng(0), []
    for _ in range(2000):
        people = rng.integers(len(synthetic), size=len(synthetic))
        ratios.append(equal_real[rng.integers(len(equal_real))][people].mean() / synthetic[people].mean())
    low, high = np.percentile(ratios, [2.5, 97.5])
    real = float(np.mean([e.mean() for e in equal_real]))
    return {
        "mae_synthetic": float(synthetic.mean()), "mae_real_equal_n": real, "mae_all_real": float(all_real.mean()),
        "real_over_synthetic": real / float(synthetic.mean()), "low": float(low), "high": float(high),
        "all_real_over_synthetic": float(all_real.mean() / synthetic.mean()),
    }  # fmt: skip


def main() -> None:
    """Fit, test, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("dataset", "cohort", "out"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("volumes", "scans"):
        parser.add_argument(f"--{name}", type=int)
    arguments = parser.parse_args()
    made, asked = features(arguments.dataset, count=arguments.volumes)
    scans = {split: features(arguments.cohort, split) for split in ("train", "validation")}
    result: dict[str, Any] = {}
    for name in COVARIATES:
        (train, known), (test, true) = (
            (found[np.isfinite(values[name])], values[name][np.isfinite(values[name])])
            for found, values in scans.values()
        )
        rng, n = np.random.default_rng(0), min(arguments.scans or len(made), len(train))
        subsets = [rng.choice(len(train), n, replace=False) for _ in range(REPEATS)]
        equal = [errors(train[rows], known[rows], test, true) for rows in subsets]
        result[name] = {"volumes": len(made), "n": n, "all_real": len(train), "test_scans": len(test)}
        result[name] |= compared(errors(made, asked[name], test, true), equal, errors(train, known, test, true))
        print(name, {key: round(value, 3) for key, value in result[name].items()})
    Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
