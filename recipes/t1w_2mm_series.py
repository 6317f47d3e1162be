"""Does a bundle follow one covariate varied alone, and beyond its training range? Writes a figure and a JSON file.

    python -m recipes.t1w_2mm_series --bundle t1w-2mm --work runs/t1w-2mm/series \
        --out benchmarks/results/t1w-2mm-series.json --figure docs/images/t1w-2mm-series.png

Two series, each at 4 noises: age from 20 to 90 years, and ventricular volume from 5 ml to 1.5 times its upper bound
(155 ml); everything else is fixed. The sampler is that of configs/t1w-2mm/6-generate.yaml, without its gate. The rulers of
the bundle's own gate measure the volumes; their own errors are given too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainsynth.bundle.files import bundle_folder, read_bundle
from brainsynth.bundle.spec import GATE_FILE
from brainsynth.config.load import load_config
from brainsynth.config.schema import CovariateSource, GenerateConfig, RuntimeConfig
from brainsynth.gate.file import load_gate
from brainsynth.progress import configure_logging
from brainsynth.reading.dataset import open_dataset
from brainsynth.records import to_dict
from brainsynth.report import figures
from brainsynth.stages import generate

GENERATION = Path(__file__).parents[1] / "configs" / "t1w-2mm" / "6-generate.yaml"
SEEDS = 4
PERSON = {"age": 60.0, "sex": "F", "ventricular_volume": 25.0, "brain_volume": 1250.0, "cohort": "oasis1"}
SERIES = {"age": [20, 35, 50, 65, 80, 90], "ventricular_volume": [5, 10, 20, 40, 80, 155, 232.5]}


def table() -> pd.DataFrame:
    """One row for each value of each series and each noise."""
    lines = [
        {**PERSON, name: float(value), "noise_seed": seed, "series": name}
        for name, values in SERIES.items()
        for value in values
        for seed in range(SEEDS)
    ]
    return pd.DataFrame(lines)


def judged(measured: np.ndarray, values: list[float]) -> dict[str, Any]:
    """(seeds, values) measured: mean by value, share of neighbouring steps that go up, correlation and slope."""
    asked = np.broadcast_to(np.asarray(values, float), measured.shape)
    return {
        "asked": list(map(float, values)),
        "measured_mean": measured.mean(0).round(2).tolist(),
        "measured_sd_over_noises": measured.std(0, ddof=1).round(2).tolist(),
        "steps_that_go_up": float((np.diff(measured, axis=1) > 0).mean()),
        "r": float(np.corrcoef(asked.ravel(), measured.ravel())[0, 1]),
        "slope": float(np.polyfit(asked.ravel(), measured.ravel(), 1)[0]),
        "noises": len(measured),
    }


def main() -> None:
    """Generate, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("bundle", "work", "out", "figure"):
        parser.add_argument(f"--{name}", required=True)
    arguments = parser.parse_args()
    configure_logging()
    work, folder = Path(arguments.work), bundle_folder(arguments.bundle)
    work.mkdir(parents=True, exist_ok=True)
    rows = table()
    rows.to_csv(work / "rows.csv", index=False)
    generate.run(
        GenerateConfig(
            bundle=arguments.bundle,
            output=str(work / "generated"),
            covariates=CovariateSource(table=str(work / "rows.csv"), allow_extrapolation=True),
            sampler=load_config(GENERATION, GenerateConfig).sampler,
            runtime=RuntimeConfig(workers=0, micro_batch=2),
        )
    )
    dataset, gate = open_dataset(str(work / "generated")), load_gate(folder / GATE_FILE)
    found = pd.DataFrame([gate.measure_covariates(dataset.volume(i)) for i in range(len(dataset))])
    result: dict[str, Any] = {"bundle": read_bundle(folder).digest, "person": PERSON}
    result["rulers"] = {ruler.name: to_dict(ruler) for ruler in gate.spec.rulers}
    for name, values in SERIES.items():
        mine = rows.index[rows["series"] == name]
        result[name] = judged(found.loc[mine, name].to_numpy().reshape(len(values), SEEDS).T, values)
    Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n")
    shown = [(name, value, seed) for name, values in SERIES.items() for seed in range(2) for value in values[:6]]
    places = [rows.index[(rows.series == n) & (rows[n] == v) & (rows.noise_seed == s)][0] for n, v, s in shown]
    units = dataset.units
    captions = [f"{n.replace('_', ' ')} {v:g} {units[n]}" for n, v, _ in shown]
    picture = figures.gallery([dataset.volume(int(place)) for place in places], captions, columns=6)
    picture.savefig(arguments.figure, dpi=70, bbox_inches="tight")
    print(json.dumps({name: result[name] for name in SERIES}, indent=1))


if __name__ == "__main__":
    main()
