"""The bundled model taken further on a few scans of one cohort, against a model of those scans alone (equal updates).

    python -m recipes.fine_tune --table runs/t1w-2mm/participants.tsv --output runs/fine-tune

The table is that of recipes.t1w_2mm_cohort. The cohort is OASIS-1. Scans that the bundled model has never seen (the held-out
people of its cohort) come first: of the 42 that the split of this recipe leaves for training, n = 20 and 40 take unseen
people alone; 80 needs people that the bundled model was trained on, and the result says how many. People who are held out
here calibrate the audit. Rulers and the components of the Fréchet distance are fitted once, on the OASIS-1 scans that the
bundled model was trained on, and are the same for every cell. A cell is a folder of the output, and every job in it resumes:
run the command again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainsynth.audit.verdict import read_audit
from brainsynth.bundle.files import bundle_folder, read_bundle
from brainsynth.bundle.spec import BundleSpec
from brainsynth.cohort.prepare import split_of
from brainsynth.config.load import build_config
from brainsynth.config.schema import SHIPPED_BUNDLE
from brainsynth.covariates.described import draw_cohort
from brainsynth.instruments.covariate_ruler import CovariateRuler
from brainsynth.instruments.tissue_features import tissue_features
from brainsynth.metrics.agreement import agreement
from brainsynth.metrics.frechet import frechet_of_rows
from brainsynth.metrics.intervals import jackknife_interval
from brainsynth.progress import configure_logging
from brainsynth.reading.dataset import SyntheticDataset, open_dataset
from brainsynth.records import to_dict
from brainsynth.stages.jobs import JOBS, run_job
from brainsynth.storage.filesystem import open_store

log = logging.getLogger(__name__)
COUNTS, ARMS = (20, 40, 80), ("fine-tuned", "scratch")
NUMBERS = ("age", "ventricular_volume", "brain_volume")
SPLIT_SEED, VALIDATION = 1, 0.3
"""Of the cells' cohorts; under seed 0 and 0.2 the split is that of the bundled model's cohort."""
HELD_OUT, FALSE_ALARMS = 32, 0.02
"""People held out in each cell, and the rate of the audit, which n = 20 with them can calibrate (1 % needs 99 people)."""
RUNTIME = {"workers": 0, "threads_per_worker": 1}
SAMPLER = {"method": "ab2", "steps": 8, "time_shift": 6}
COMPONENTS = 8
"""Principal components of the tissue maps in which the Fréchet distance is taken: two dozen volumes bear no more."""


def job(verb: str, **config: Any) -> int:
    """A job of the command line, with a config in place of its YAML file."""
    log.info("%s: %s", verb, config.get("output"))
    return run_job(verb, build_config(config, JOBS[verb].config))


def chosen(table: pd.DataFrame, count: int) -> tuple[pd.DataFrame, int]:
    """The rows of a cell: a scan each of `count` people to train on and of those held out; and how many of the first the
    bundled model has seen."""
    oasis = table[(table["cohort"] == "oasis1") & (table["qc"] != "fail")]
    people = oasis["participant_id"].drop_duplicates()
    held_out = people[[split_of(p, SPLIT_SEED, VALIDATION) == "validation" for p in people]]
    train = people[~people.isin(held_out)]
    seen = pd.Series([split_of(p, 0, 0.2) == "train" for p in train], train.index)
    own = pd.concat([train[~seen], train[seen]])[:count]
    first = oasis.drop_duplicates("participant_id")
    rows = first[first["participant_id"].isin(set(own) | set(held_out[:HELD_OUT]))]
    return rows, int(seen[own.index].sum())


def prepared(table: pd.DataFrame, folder: Path, spec: BundleSpec, without: tuple[str, ...] = (), **split: Any) -> str:
    """A cohort, prepared as the bundled model's was."""
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "participants.tsv", sep="\t", index=False, na_rep="n/a")
    columns = {"image_column": "image", "mask_column": "mask", "session_column": "session"}
    job(
        "prepare-cohort",
        source={"path": str(folder / "participants.tsv"), **columns},
        output=str(folder / "cohort"),
        covariates={"covariates": [c for c in to_dict(spec.covariates)["covariates"] if c["name"] not in without]},
        missing_covariates="keep",
        volume=to_dict(spec.volume),
        intensity_rule="percentiles",
        intensity_percentiles=[0.0, 99.0],
        samples_per_shard=32,
        runtime=RUNTIME,
        **split,
    )
    return str(folder / "cohort")


def optimisation(updates: int, batch: int, rate: float) -> dict[str, Any]:
    """Of either network; averaged over the last fiftieth of the updates or so."""
    every = max(1, updates // 4)
    return {
        "steps": updates, "batch_size": batch, "learning_rate": rate, "warmup_steps": min(20, updates // 4),
        "precision": "bfloat16", "ema_decay": 0.98, "log_every": every, "validate_every": updates,
        "checkpoint_every": every, "keep_checkpoints": 1,
    }  # fmt: skip


def train(arm: str, cohort: str, folder: Path, spec: BundleSpec, updates: int, count: int) -> str:
    """A bundle of one cell."""
    architecture = to_dict(spec.diffusion)
    start: dict[str, Any] = {"start_from": SHIPPED_BUNDLE}
    autoencoder, whitening = SHIPPED_BUNDLE, {}
    if arm == "scratch":
        autoencoder, whitening, start = str(folder / "autoencoder"), {"whitening": 0.5}, {}
        architecture["rank"] = min(architecture["rank"], count)  # a fifth is left out when components are found
        architecture["crossed"] = ""  # of the cohort, which these models do without
        losses = {"kl_weight": 0.0, "square_weight": 10.0, "adversarial_weight": 0.0, "perceptual_weight": 0.0}
        job(
            "train-autoencoder", cohort=cohort, output=autoencoder, architecture=to_dict(spec.autoencoder),
            losses=losses, optimisation=optimisation(updates, 1, 1.5e-3), runtime=RUNTIME,
        )  # fmt: skip
    latents, diffusion, bundle = (str(folder / name) for name in ("latents", "diffusion", "bundle"))
    job(
        "encode-latents",
        cohort=cohort,
        autoencoder=autoencoder,
        output=latents,
        mirror=True,
        runtime=RUNTIME,
        **whitening,
    )
    job(
        "train-diffusion", latents=latents, autoencoder=autoencoder, output=diffusion, architecture=architecture,
        schedule=to_dict(spec.schedule), conditioning_dropout=0.05, figure_steps=4, runtime=RUNTIME,
        optimisation=optimisation(updates, 4, 2e-4 if start else 1e-3), **start,
    )  # fmt: skip
    about = {"licence": spec.licence, "training_data": f"{count} scans of OASIS-1; {arm}: {spec.name}"}
    job("export-bundle", diffusion=diffusion, output=bundle, name=f"{arm}-{count}", weights="float16", **about)
    return bundle


class Instruments:
    """The same for every cell: rulers, components and levels of the OASIS-1 scans that the bundled model was trained on."""

    def __init__(self, cohort: str, spec: BundleSpec) -> None:
        self.grid = spec.volume
        train, validation = (open_dataset(cohort, split=split) for split in ("train", "validation"))
        features, self.sharpness = self.look(train)
        people = train.table["sample_id"].str.removesuffix("MR1").str.removesuffix("MR2").to_numpy()
        self.rulers = {
            name: CovariateRuler.fit(features, train.table[name].to_numpy(float), groups=people, own_error=False)
            for name in NUMBERS
        }
        self.mean = features.mean(0)
        self.axes = np.linalg.svd(features - self.mean, full_matrices=False)[2][:COMPONENTS].T
        self.train = (features - self.mean) @ self.axes
        self.real = self.judge(validation)

    def look(self, dataset: SyntheticDataset) -> tuple[np.ndarray, float]:
        """(N, F) tissue maps, and the mean absolute difference of neighbouring voxels inside the brain."""
        volumes = [dataset.volume(index) for index in range(len(dataset))]
        edges = [np.abs(np.diff(v, axis=0))[v[1:] > 0.2].mean() for v in volumes]
        return np.stack([tissue_features(v, self.grid) for v in volumes]), float(np.mean(edges))

    def judge(self, dataset: SyntheticDataset) -> dict[str, Any]:
        """Agreement of measured with asked values, Fréchet distance to the training scans, sharpness relative to theirs."""
        features, sharpness = self.look(dataset)
        asked = {name: dataset.table[name].to_numpy(float) for name in NUMBERS}
        distance = jackknife_interval(
            frechet_of_rows, [(features - self.mean) @ self.axes, self.train], groups=12, least=0
        )
        return {
            **{name: to_dict(agreement(self.rulers[name].predict(features), asked[name])) for name in NUMBERS},
            "frechet": {"value": distance.value, "low": distance.low, "high": distance.high, "n": len(features)},
            "sharpness": sharpness / self.sharpness,
        }


def judged(bundle: str, cohort: str | None, folder: Path, rows: Path, instruments: Instruments) -> dict[str, Any]:
    """Volumes of one bundle, judged: adherence and Fréchet distance by common instruments, copies by its own cohort."""
    generated, audit = str(folder / "generated"), folder / "audit"
    job(
        "generate", bundle=bundle, output=generated, covariates={"table": str(rows), "allow_extrapolation": True},
        sampler=SAMPLER, precision="bfloat16", samples_per_shard=8, runtime={**RUNTIME, "micro_batch": 4},
    )  # fmt: skip
    found = instruments.judge(open_dataset(generated))
    if cohort is None:
        return found
    job(
        "audit", dataset=generated, reference=cohort, bundle=bundle, output=str(audit), pictures=False,
        false_alarm_rate=FALSE_ALARMS, runtime=RUNTIME,
    )  # fmt: skip
    record = to_dict(read_audit(open_store(str(audit))))
    kept = ("verdict", "reasons", "volumes", "training_people", "held_out_people", "copies", "membership", "replay")
    del record["copies"]["worst"]  # it names participants
    return {**found, "audit": {key: record[key] for key in kept}}


def main() -> None:
    """Every cell that is not there yet; the figures are written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=Path("runs/t1w-2mm/participants.tsv"))
    parser.add_argument("--output", type=Path, default=Path("runs/fine-tune"))
    parser.add_argument("--updates", type=int, default=24, help="of the denoiser; from scratch, of the autoencoder too")
    parser.add_argument("--volumes", type=int, default=24)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    configure_logging()
    spec = read_bundle(bundle_folder(SHIPPED_BUNDLE))
    table = pd.read_csv(arguments.table, sep="\t", na_values="n/a")
    output = arguments.output
    oasis = table[(table["cohort"] == "oasis1") & (table["qc"] != "fail")]
    reference = prepared(oasis, output / "reference", spec, validation_fraction=0.2)
    rows = output / f"rows-{arguments.volumes}.csv"
    assert spec.distribution is not None
    draw_cohort(spec.distribution, arguments.volumes, 0, ["cohort=oasis1"])[0].to_csv(rows, index=False)
    figures: dict[str, Any] = {"bundle": spec.digest, "updates": arguments.updates, "cells": []}
    instruments = Instruments(reference, spec)
    figures |= {"real": instruments.real}
    figures["bundled"] = judged(SHIPPED_BUNDLE, None, output / "bundled", rows, instruments)
    for count, arm in itertools.product(arguments.counts, ARMS):
        people, seen = chosen(table, count)
        split = {"validation_fraction": VALIDATION, "split_seed": SPLIT_SEED}
        # In one cohort the covariate of that name is constant: a model of this cohort alone does without.
        without = ("cohort",) if arm == "scratch" else ()
        cohort = prepared(people, output / f"n{count}-{arm}", spec, without, **split)
        folder = output / f"n{count}-{arm}" / f"{arguments.updates}-updates"
        bundle = train(arm, cohort, folder, spec, arguments.updates, count)
        found = judged(bundle, cohort, folder, rows, instruments)
        figures["cells"].append({"n": count, "seen_by_the_bundled_model": seen, "arm": arm, **found})
        (arguments.out or output / "fine-tune.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
