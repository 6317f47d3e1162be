"""How sound `brainsynth vary --scan` is, on the second scans of OASIS-1: two scans of one person show what is noise.

    python -m recipes.scan_in --table runs/t1w-2mm/participants.tsv --out benchmarks/results/scan-in.json

The table is that of recipes.t1w_2mm_cohort. Of each person with two sessions the first scan is taken through the bundled
model: reconstructed, with ventricles 1.6 times as large, 30 years older, and from the larger ventricles back. People who are
measured already are kept: run the command again to resume.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from brainsynth.bundle.files import bundle_folder, read_bundle
from brainsynth.bundle.recommended import recommended_generation
from brainsynth.bundle.spec import BundleSpec
from brainsynth.config.schema import SHIPPED_BUNDLE
from brainsynth.evaluation.counterfactual import composition, difference, point, reversibility
from brainsynth.metrics.intervals import bootstrap_interval
from brainsynth.models.counterfactual import ScanGenerator
from brainsynth.plan import GenerationIdentity, PersonScan
from brainsynth.stages.vary import ScanFile, read_person

LARGER, OLDER = 1.6, 30.0


def person_of(row: pd.Series, spec: BundleSpec) -> tuple[PersonScan, Any]:
    """A scan of the table, read as `vary` reads it."""
    config = recommended_generation("unused", SHIPPED_BUNDLE, None)
    text = ",".join(f"{name}={row[name]}" for name in spec.covariates.names)
    return read_person(config, spec, ScanFile(row["image"], row["mask"], text), allow_extrapolation=True)


def measured(first: pd.Series, seconds: pd.DataFrame, spec: BundleSpec) -> dict[str, Any]:
    """One person; `seconds` are everybody's second scans."""
    person, gate = person_of(first, spec)
    config = recommended_generation("unused", SHIPPED_BUNDLE, None)
    identity = GenerationIdentity(
        bundle=spec.digest, sampler=config.sampler, precision="float32", base_seed=0, scan=person.identity
    )
    generator = ScanGenerator(bundle_folder(SHIPPED_BUNDLE), spec, identity, True, person.volume)
    generator.load("cpu")
    own, scan = generator.own, person.volume
    larger = own.assign(ventricular_volume=own["ventricular_volume"] * LARGER)
    older = own.assign(age=own["age"] + OLDER)
    made = generator.predict(generator.person, pd.concat([larger, older]))
    others = {str(row["participant_id"]): person_of(row, spec)[0].volume for _, row in seconds.iterrows()}
    distances = {name: difference(made[0], volume, scan) for name, volume in others.items()}
    name, measured = str(first["participant_id"]), gate.measure_covariates(scan)
    return {
        "seen_in_training": bool(first["seen"]),
        "retest": difference(scan, others[name], scan),
        "retest_measured_change": {
            key: value - measured[key] for key, value in gate.measure_covariates(others[name]).items()
        },
        "nearest_other_person": min(difference(scan, v, scan) for key, v in others.items() if key != name),
        "composition": composition(generator),
        "reversibility": reversibility(generator, made[0], larger),
        "asked_change_ml": float(own["ventricular_volume"].iloc[0] * (LARGER - 1)),
        "larger": point(gate, scan, measured, made[0]),
        "older": point(gate, scan, measured, made[1]),
        "own_retest_is_nearest": min(distances, key=lambda key: distances[key]) == name,
        "scan_passes_gate": bool(point(gate, scan, measured, scan)["gate_passed"]),
    }


def summary(people: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and 95 % bootstrap interval over people."""
    flat = pd.json_normalize(list(people.values())).astype(float)
    flat["effectiveness"] = flat["larger.measured_change_ventricular_volume"] / flat["asked_change_ml"]
    flat["effectiveness_age"] = flat["older.measured_change_age"] / OLDER
    found = {}
    for name, values in flat.items():
        interval = bootstrap_interval(np.mean, [values.to_numpy()]).figure
        found[str(name)] = {"mean": interval[0], "low": interval[1], "high": interval[2], "n": len(values)}
    return found


def main() -> None:
    """Everybody who is not measured yet; the file is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=Path("runs/t1w-2mm/participants.tsv"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scan-in.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    spec = read_bundle(bundle_folder(SHIPPED_BUNDLE))
    table = pd.read_csv(arguments.table, sep="\t", na_values="n/a")
    from brainsynth.cohort.prepare import split_of

    table["seen"] = [split_of(name, 0, 0.2) == "train" for name in table["participant_id"]]
    twice = table[table["participant_id"].duplicated(keep=False) & (table["cohort"] == "oasis1")]
    firsts, seconds = twice[twice["session"] == "MR1"], twice[twice["session"] == "MR2"]
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"people": {}}
    for _, first in firsts.sort_values("seen").iterrows():
        name = str(first["participant_id"])
        if name in found["people"]:
            continue
        found["people"][name] = measured(first, seconds, spec)
        print(name, json.dumps(found["people"][name]), flush=True)
        result = {"bundle": spec.digest, "people": found["people"]}
        if len(found["people"]) > 1:
            result["summary"] = summary(found["people"])
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
