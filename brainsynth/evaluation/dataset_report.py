"""After generation: measure the ventricles on the images, and write the report (report.html, report.json)."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from brainsynth.bundle.files import bundle_folder, read_bundle
from brainsynth.cohort.scan_file import FileRejected, read_volume
from brainsynth.config.schema import RulerConfig
from brainsynth.covariates.distribution import CovariateDistribution
from brainsynth.errors import UserError
from brainsynth.gate.report import gate_section
from brainsynth.instruments.ventricles import RulerError, VentricleRuler, agreement, ruler_error
from brainsynth.plan import Plan
from brainsynth.reading.dataset import SyntheticDataset, open_dataset
from brainsynth.records import to_dict
from brainsynth.report import figures
from brainsynth.report.html import Page
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import LocalStore, open_store, resolve_uri
from brainsynth.storage.finalise import SHARDS_KEY, SUBJECTS_KEY
from brainsynth.volume import resample

log = logging.getLogger(__name__)
GALLERY = 24
MEASURE_AT_MOST = 2000
MAX_PRIOR_MIB = 512


def check_ruler(config: RulerConfig | None, plan: Plan) -> None:
    """Raises UserError when the ruler's cohort, prior or covariate does not fit the dataset."""
    if config is None:
        return
    cohort = read_plan(open_store(resolve_uri(config.cohort, "ruler.cohort")))
    if cohort.volume.shape_xyz != plan.volume.shape_xyz or cohort.volume.spacing_mm != plan.volume.spacing_mm:
        raise UserError(f"ruler.cohort {config.cohort} is on another grid than the bundle")
    for names in (cohort.covariates.names, plan.covariates.names):
        if config.covariate not in names:
            raise UserError(f"ruler.covariate {config.covariate!r} is not one of {', '.join(names)}")
    _read_prior(config, plan)


def _read_prior(config: RulerConfig, plan: Plan) -> npt.NDArray[np.float32]:
    """The prior on the dataset's grid."""
    path = resolve_uri(config.prior, "ruler.prior")
    try:
        prior, affine = read_volume(Path(path), MAX_PRIOR_MIB)
    except FileRejected as error:
        raise UserError(f"ruler.prior: {path} cannot be read: {error}") from None
    return np.clip(resample(prior, affine, plan.volume), 0, 1)


def fit_ruler(config: RulerConfig, plan: Plan) -> tuple[VentricleRuler, RulerError]:
    """The ruler, calibrated on the cohort's training split, and its own error on the validation split."""
    uri = resolve_uri(config.cohort, "ruler.cohort")
    prior = _read_prior(config, plan)
    train, validation = open_dataset(uri, split="train"), open_dataset(uri, split="validation")
    ruler = VentricleRuler.fit(*_labelled(train, config.covariate), prior, plan.volume.voxel_ml)
    images, true = _labelled(validation, config.covariate)
    return ruler, ruler_error(ruler.measure(images), true)


def _labelled(dataset: SyntheticDataset, covariate: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    values = dataset.table[covariate].to_numpy(dtype=np.float64)
    known = np.flatnonzero(np.isfinite(values))
    return dataset.volumes(known.tolist()), values[known]


def report_dataset(root: str, ruler: RulerConfig | None, bundle: str | None) -> Path | None:
    """Write the report of a finished generated dataset beside it. Returns its path (None on an object store).

    Without the bundle, the covariates are not shown over the distribution of the training cohort.

    Raises:
        UserError: the dataset is not finished, was not generated, or not with this bundle.
    """
    store = open_store(root)
    plan = read_plan(store)
    if plan.kind != "generated":
        raise UserError(f"{root} holds {plan.kind} data; a generation report is of a generated dataset")
    try:
        dataset = open_dataset(root)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{root} is not finished, or damaged: {error}") from None
    spec = None if bundle is None else read_bundle(bundle_folder(bundle))
    if spec is not None and spec.digest != plan.identity["bundle"]:
        raise UserError(f"{bundle} is not the bundle that {root} was made with")
    page = Page("brainsynth generation report", f"{root} · plan {plan.fingerprint[:16]}")
    page.text(
        "Every volume here is synthetic: made by a generative model, of no real person. Not for diagnosis.", "warning"
    )
    subjects = pd.read_parquet(io.BytesIO(store.read(SUBJECTS_KEY)))
    facts = _facts(store.read(SHARDS_KEY), dataset, plan)
    facts["rows outside the training support"] = int(subjects["extrapolated"].sum())
    page.heading("Run")
    digest, name = plan.identity["bundle"], "" if spec is None else spec.name
    page.table(["", ""], [["bundle", f"{name} ({digest[:12]})"], *facts.items()])
    result: dict[str, Any] = {"run": facts, "bundle": name, "bundle_digest": digest}
    if ruler is not None:
        result["ventricles"] = _ventricles(page, ruler, plan, dataset)
    _published(page, root)
    _drawn(page, dataset, None if spec is None else spec.distribution)
    page.heading("Gallery")
    page.text("Evenly spaced through the dataset, nothing picked: sagittal, coronal and axial slices.", "note")
    chosen = (
        np.unique(np.linspace(0, len(dataset) - 1, GALLERY).astype(int)) if len(dataset) else np.array([], dtype=int)
    )
    if len(chosen):
        table = dataset.table
        captions = [caption(table.iloc[i], dataset) for i in chosen]
        page.figure(figures.gallery([dataset.volume(int(i)) for i in chosen], captions), "slices of generated volumes")
    if "gate" in plan.identity:
        result["gate"] = gate_section(page, plan, dataset, subjects)
    page.heading("Rejected and failed rows")
    _rejects(page, subjects)
    store.write("report.html", page.render().encode())
    store.write("report.json", (json.dumps(result, indent=1) + "\n").encode())
    if isinstance(store, LocalStore):
        path = store.path / "report.html"
        log.info("report: %s", path)
        return path
    return None


def _drawn(page: Page, dataset: SyntheticDataset, distribution: CovariateDistribution | None) -> None:
    reference = None if distribution is None else distribution.draw(4000, seed=0)
    page.heading("Covariates: this dataset beside the training cohort")
    page.figure(
        figures.covariate_histograms(dataset.table, reference, {n: dataset.units[n] for n in dataset.covariates}),
        "covariate histograms",
    )
    filled = "Filled: the distribution that was fitted on the training cohort. " if reference is not None else ""
    page.text(f"{filled}Line: what was asked of the volumes of this dataset.", "note")


def _published(page: Page, root: str) -> None:
    """What an evaluation measured on the images and published, where there is exactly one."""
    try:
        dataset = open_dataset(root, measured=True)
    except ValueError:
        return
    table = dataset.table
    numbers = [n for n in dataset.covariates if f"measured_{n}" in table and pd.api.types.is_numeric_dtype(table[n])]
    page.heading("Asked against measured, as an evaluation published it")
    for name in numbers:
        both = table[[name, f"measured_{name}"]].dropna()
        if len(both):
            figure = figures.agreement(*both.to_numpy(np.float64).T, name, dataset.units[name])
            page.figure(figure, f"{name}: asked against measured")


def _facts(shards_parquet: bytes, dataset: SyntheticDataset, plan: Plan) -> dict[str, Any]:
    shards = pd.read_parquet(io.BytesIO(shards_parquet))
    runtime = [json.loads(text) for text in shards["runtime"]]
    busy_s = sum(entry["make_s"] for entry in runtime)
    manifest = dataset.manifest
    sampler = plan.identity["sampler"]
    extras = "".join(f", {k} {v}" for k, v in sampler.items() if k not in ("method", "steps", "guidance_scale"))
    return {
        "planned = ok + rejected + failed": f"{manifest['num_samples']} = {manifest['num_ok']} + "
        f"{manifest['num_rejected']} + {manifest['num_failed']}",
        "volume": f"{'×'.join(map(str, plan.volume.shape_xyz))} at {plan.volume.spacing_mm[0]:g} mm, {plan.volume.dtype}",
        "sampler": f"{sampler['method']}, {sampler['steps']} steps, guidance {sampler['guidance_scale']:g}{extras}, "
        f"{plan.identity['precision']}",
        "base seed": plan.identity["base_seed"],
        "shards": f"{len(shards)}, {shards['size_bytes'].sum() / 1e6:.1f} MB",
        "device": ", ".join(sorted({entry["device"] for entry in runtime})),
        "worker time": f"{busy_s:.1f} s, of which sampling {sum(e['sample_s'] for e in runtime):.1f} s and decoding "
        f"{sum(e['decode_s'] for e in runtime):.1f} s",
        **_gate_time(runtime, busy_s),
        "volumes per worker-second": f"{manifest['num_samples'] / max(busy_s, 1e-9):.2f}",
    }


def _gate_time(runtime: list[dict[str, Any]], busy_s: float) -> dict[str, str]:
    gate_s = sum(entry.get("gate_s", 0.0) for entry in runtime)
    return {"of which the quality gate": f"{gate_s:.1f} s ({gate_s / max(busy_s, 1e-9):.1%})"} if gate_s else {}


def _ventricles(page: Page, config: RulerConfig, plan: Plan, dataset: SyntheticDataset) -> dict[str, Any]:
    """Asked against measured on the image, beside the ruler's own error."""
    fitted, own = fit_ruler(config, plan)
    asked_all = dataset.table[config.covariate].to_numpy(dtype=np.float64)
    rows = np.flatnonzero(np.isfinite(asked_all))[:MEASURE_AT_MOST]
    measured = np.concatenate(
        [fitted.measure(dataset.volumes(part.tolist())) for part in np.array_split(rows, -(-len(rows) // 64))]
    )
    asked = asked_all[rows]
    page.heading("Do the images follow the covariates?")
    if len(asked) < 4 or np.ptp(asked) == 0 or np.ptp(measured) == 0:
        # A case in which another covariate moves, say: nothing to correlate, and no mistake of the user's either.
        return _few_ventricles(page, asked, measured) | {"ruler": to_dict(own)}
    found = agreement(asked, measured)
    page.table(
        ["", "n", "r", "95 % CI", "MAE [ml]", "slope", "bias [ml]"],
        [
            ["generated: measured against asked", *_row(found)],
            ["the ruler's own error (validation scans, measured against known)", *_row(own)],
        ],
    )
    page.figure(figures.agreement(asked, measured, config.covariate, "ml"), "asked against measured ventricular volume")
    page.text(
        "The ruler sums the CSF fraction under a ventricle prior; it is calibrated on the cohort's training split. "
        "It sees the generated image only.",
        "note",
    )
    log.info(
        "ventricular volume, measured on the images against asked: r = %.3f [%.3f, %.3f], n = %d (ruler's own r = %.3f)",
        found.r,
        found.r_low,
        found.r_high,
        found.n,
        own.r,
    )
    return {"generated": to_dict(found), "ruler": to_dict(own)}


def _row(error: RulerError) -> list[object]:
    interval = f"[{error.r_low:.3f}, {error.r_high:.3f}]"
    return [error.n, f"{error.r:.3f}", interval, f"{error.mae_ml:.2f}", f"{error.slope:.3f}", f"{error.bias_ml:+.2f}"]


def caption(row: pd.Series, dataset: SyntheticDataset) -> str:
    """The covariates of one line of a dataset's table, short enough to stand above a picture."""
    parts = []
    for name in dataset.covariates:
        value = row[name]
        if pd.isna(value):
            continue
        short = {"ventricular_volume": "vent", "brain_volume": "brain"}.get(name, name)
        parts.append(f"{short} {value:.0f}" if isinstance(value, float) else f"{value}")
    return ", ".join(parts)


def _rejects(page: Page, subjects: pd.DataFrame) -> None:
    bad = subjects[subjects["status"] != "ok"]
    if bad.empty:
        page.text("None.")
        return
    page.table(["sample", "status", "reason"], bad[["sample_id", "status", "reason"]].head(200).to_numpy().tolist())


def _few_ventricles(page: Page, asked: npt.NDArray[Any], measured: npt.NDArray[Any]) -> dict[str, Any]:
    """Too few volumes, or volumes too alike, for an agreement: only the means are told."""
    page.text(
        f"Ventricular volume of {len(asked)} volumes: {asked.mean():.1f} ml asked and {measured.mean():.1f} ml measured, on "
        "average. An agreement needs 4 volumes or more that differ in it."
    )
    return {"n": len(asked), "asked_mean_ml": float(asked.mean()), "measured_mean_ml": float(measured.mean())}
