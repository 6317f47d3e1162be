"""Fit the quality gate that a bundle carries: on the training split of its cohort, one session a person."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from brainsynth.bundle.spec import GATE_FILE, BundleSpec
from brainsynth.config.gate import GateFitConfig
from brainsynth.errors import UserError
from brainsynth.gate.file import is_sound, save_gate
from brainsynth.gate.gate import MIN_COHORT, QualityGate, RulerSpec
from brainsynth.instruments.covariate_ruler import CovariateRuler
from brainsynth.instruments.measurement import open_volumes
from brainsynth.instruments.tissue_features import tissue_features
from brainsynth.models.autoencoder import Autoencoder, build_autoencoder
from brainsynth.models.device import choose_device
from brainsynth.models.loading import load_labeller, load_renderer
from brainsynth.models.weights import load_weights
from brainsynth.reading.dataset import SyntheticDataset
from brainsynth.storage.commit import read_plan, read_samples
from brainsynth.storage.filesystem import open_store

log = logging.getLogger(__name__)
F32 = npt.NDArray[np.float32]
RULER_ROWS, LEAST_LABELLED, BATCH = 2000, 20, 4
"""A ridge regression needs no more people than that, and can be fitted on no fewer."""


def reference_rows(config: GateFitConfig, spec: BundleSpec) -> tuple[SyntheticDataset, list[int]]:
    """The training split, and its places to fit on: the first session of each person.

    Raises:
        UserError: no cohort, another one than the bundle was trained on, or too few people.
    """
    cohort = open_volumes(config.cohort, "gate.cohort", split="train")
    trained_on = spec.provenance.get("cohort_fingerprint")
    if cohort.manifest["plan_fingerprint"] != trained_on:
        raise UserError(f"gate.cohort: {config.cohort} is not the cohort that this model was trained on")
    store = open_store(cohort.uri)
    samples = read_samples(store, read_plan(store)).iloc[cohort.rows]
    rows = np.flatnonzero(~samples["subject"].duplicated().to_numpy()).tolist()
    if len(rows) < MIN_COHORT:
        raise UserError(
            f"gate.cohort: a quality gate needs at least {MIN_COHORT} people to learn from; the training split of "
            f"{config.cohort} has {len(rows)}"
        )
    return cohort, rows


def write_gate(config: GateFitConfig, weights: Path, spec: BundleSpec, folder: Path) -> None:
    """Fit gate and rulers, and write them into a bundle's folder.

    Args:
        weights: the autoencoder's, which were checked.
        folder: with labeller and renderer, if `config.reference` is `rendered`.
    """
    cohort, rows = reference_rows(config, spec)
    if config.reference == "scans":
        volumes: Iterator[F32] = (cohort.volume(row) for row in rows)
    else:
        volumes = reconstructions(cohort, rows, weights, spec, folder if config.reference == "rendered" else None)
    features: dict[int, F32] = {}

    def watched() -> Iterator[F32]:
        for row, volume in zip(rows, volumes, strict=True):
            if len(features) < RULER_ROWS:
                with contextlib.suppress(UserError):  # a blank, which the gate leaves out, too
                    features[row] = tissue_features(volume, spec.volume)
            yield volume

    gate = QualityGate.fit(watched(), spec.volume, config.false_reject_rate)
    if not is_sound(gate.envelope):
        raise UserError(
            f"gate: the training scans' {config.reference} are too much alike to learn from; train the networks further, or "
            "give gate.reference: scans"
        )
    gate = gate.with_rulers(*fit_rulers(cohort.table.iloc[list(features)], np.stack(list(features.values())), spec))
    save_gate(gate, folder / GATE_FILE)
    read = ", ".join(f"{r.name} ± {r.mae:.3g} {r.unit} (r {r.r:.2f})" for r in gate.spec.rulers)
    log.info("quality gate: %d people's %s; measures %s", gate.spec.n, config.reference, read or "no covariate")


@torch.no_grad()
def reconstructions(
    cohort: SyntheticDataset, rows: list[int], weights: Path, spec: BundleSpec, renders: Path | None
) -> Iterator[F32]:
    """Scans after encoder and decoder, rounded as a dataset stores them; made again by the renderer of `renders`."""
    device = choose_device(False)
    if renders is not None:
        label, render = load_labeller(renders, device), load_renderer(renders, device)
    autoencoder = Autoencoder(build_autoencoder(spec.autoencoder, spec.covariates.context_size), spec.latents)
    load_weights(autoencoder.network, weights)
    autoencoder.requires_grad_(False).eval().to(device)
    contexts = spec.covariates.encode(cohort.table.iloc[rows])
    for start in range(0, len(rows), BATCH):
        x = torch.from_numpy(cohort.volumes(rows[start : start + BATCH]))[:, None].to(device)
        known = contexts[start : start + BATCH]
        decoded = autoencoder.decode(autoencoder.encode(x), torch.from_numpy(known).to(device))[:, 0].cpu().numpy()
        for volume, context in zip(decoded, known, strict=True):
            made = spec.volume.as_stored(volume)
            if renders is not None:
                made = spec.volume.as_stored(render.remade(made, label, context, 0)[0])
            yield made


def fit_rulers(table: pd.DataFrame, features: F32, spec: BundleSpec) -> tuple[list[RulerSpec], list[CovariateRuler]]:
    """A ruler for every continuous covariate of a table, one row a person, that enough know; others are logged."""
    specs: list[RulerSpec] = []
    rulers: list[CovariateRuler] = []
    for covariate in spec.covariates.covariates:
        if covariate.kind != "continuous":
            continue
        values = table[covariate.name].to_numpy(dtype=np.float64)
        known = np.flatnonzero(np.isfinite(values))
        if len(known) < LEAST_LABELLED or np.ptp(values[known]) == 0:
            log.info("quality gate: %s cannot be measured: %d people know it", covariate.name, len(known))
            continue
        ruler = CovariateRuler.fit(features[known], values[known], groups=known)
        assert ruler.own_error is not None
        assert ruler.own_error.corrected is not None
        own = ruler.own_error.corrected
        specs.append(
            RulerSpec(
                name=covariate.name,
                unit=covariate.unit,
                intercept=ruler.intercept,
                calibration=ruler.calibration,
                n=own.n_groups,
                mae=own.mae,
                r=own.r,
            )
        )
        rulers.append(ruler)
    return specs, rulers
