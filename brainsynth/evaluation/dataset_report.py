"""The report of a generated dataset: report.html, report.json."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainsynth.bundle.generator import model_spec
from brainsynth.covariates.distribution import CovariateDistribution
from brainsynth.errors import UserError
from brainsynth.gate.report import gate_section
from brainsynth.labels import LabelTable
from brainsynth.plan import Plan
from brainsynth.reading.dataset import SyntheticDataset, open_dataset, open_input
from brainsynth.report import figures
from brainsynth.report.html import Page
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import LocalStore, open_store
from brainsynth.storage.finalise import SHARDS_KEY, SUBJECTS_KEY

log = logging.getLogger(__name__)
GALLERY, OVERLAYS = 24, 8


def report_dataset(root: str, bundle: str | None) -> Path | None:
    """Write the report of a finished generated dataset into its folder. Returns its path (None on an object store).

    Without the bundle, the covariates are not shown over the distribution of the training cohort.

    Raises:
        UserError: the dataset is not finished, was not generated, or not with this bundle.
    """
    store = open_store(root)
    plan = read_plan(store)
    if plan.kind != "generated":
        raise UserError(f"{root} holds {plan.kind} data; a generation report is of a generated dataset")
    dataset = open_input(root, "dataset")
    spec = None if bundle is None else model_spec(bundle, plan.identity.get("options"))
    if spec is not None and spec.digest != plan.identity["bundle"]:
        raise UserError(f"{bundle} is not the bundle that {root} was made with")
    page = Page("brainsynth generation report", f"{root} · plan {plan.fingerprint[:16]}")
    page.text(
        f"Every volume here is synthetic: made by a generative model, {plan.whose}. Not for diagnosis.", "warning"
    )
    subjects = pd.read_parquet(io.BytesIO(store.read(SUBJECTS_KEY)))
    facts = _facts(store.read(SHARDS_KEY), dataset, plan)
    facts["rows outside the training support"] = int(subjects["extrapolated"].sum())
    page.heading("Run")
    digest, name = plan.identity["bundle"], "" if spec is None else spec.name
    page.table(["", ""], [["bundle", f"{name} ({digest[:12]})"], *facts.items()])
    result: dict[str, Any] = {"run": facts, "bundle": name, "bundle_digest": digest}
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
    if plan.labels is not None:
        _labels(page, dataset, plan.labels, chosen[:: max(1, len(chosen) // OVERLAYS)][:OVERLAYS].tolist())
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
    page.heading("Covariates: this dataset and the training cohort")
    page.figure(
        figures.covariate_histograms(dataset.table, reference, {n: dataset.units[n] for n in dataset.covariates}),
        "covariate histograms",
    )
    filled = "Filled: the distribution that was fitted on the training cohort. " if reference is not None else ""
    page.text(f"{filled}Line: what was asked of the volumes of this dataset.", "note")


def _labels(page: Page, dataset: SyntheticDataset, table: LabelTable, chosen: list[int]) -> None:
    """The label maps of some volumes of the gallery, and the volume of every structure."""
    page.heading("Label maps")
    page.text(f"By {table.source}; a structure's volume is its voxels in the label map, counted.", "note")
    if chosen:
        people = dataset.table
        colors = {label.index: (label.name, label.rgb) for label in table.labels}
        volumes, maps = [dataset.volume(i) for i in chosen], [dataset.label_map(i) for i in chosen]
        captions = [caption(people.iloc[i], dataset) for i in chosen]
        page.figure(figures.label_maps(volumes, maps, captions, colors), "label maps over generated volumes")
    counted = dataset.label_volumes
    lines = [
        [name, f"{v.mean():.2f}", f"{v.std():.2f}", f"{v.min():.2f}", f"{v.max():.2f}"] for name, v in counted.items()
    ]
    page.table(["structure", "mean [ml]", "SD", "least", "most"], lines)


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
            asked, measured = both.to_numpy(np.float64).T
            figure = figures.agreement(asked, measured, name, dataset.units[name])
            page.figure(figure, f"{name}: asked against measured")


def _facts(shards_parquet: bytes, dataset: SyntheticDataset, plan: Plan) -> dict[str, Any]:
    shards = pd.read_parquet(io.BytesIO(shards_parquet))
    made = shards.drop_duplicates("shard")  # with label maps a shard has two lines, and both tell of the same run
    runtime = [json.loads(text) for text in made["runtime"]]
    busy_s = sum(entry["make_s"] for entry in runtime)
    manifest = dataset.manifest
    sampler = plan.identity.get("sampler")
    extras = "".join(f", {k} {v}" for k, v in (sampler or {}).items() if k not in ("method", "steps", "guidance_scale"))
    return {
        "planned = ok + rejected + failed": f"{manifest['num_samples']} = {manifest['num_ok']} + "
        f"{manifest['num_rejected']} + {manifest['num_failed']}",
        "volume": f"{'×'.join(map(str, plan.volume.shape_xyz))} at {plan.volume.spacing_mm[0]:g} mm, {plan.volume.dtype}",
        "sampler": "the generator's own"
        if sampler is None
        else f"{sampler['method']}, {sampler['steps']} steps, guidance {sampler['guidance_scale']:g}{extras}, "
        f"{plan.identity['precision']}",
        "base seed": plan.identity["base_seed"],
        "shards": f"{len(made)}, {shards['size_bytes'].sum() / 1e6:.1f} MB",
        "device": ", ".join(sorted({entry["device"] for entry in runtime})),
        "worker time": f"{busy_s:.1f} s, of which sampling {sum(e['sample_s'] for e in runtime):.1f} s and decoding "
        f"{sum(e['decode_s'] for e in runtime):.1f} s",
        **_gate_time(runtime, busy_s),
        "volumes per worker-second": f"{manifest['num_samples'] / max(busy_s, 1e-9):.2f}",
    }


def _gate_time(runtime: list[dict[str, Any]], busy_s: float) -> dict[str, str]:
    gate_s = sum(entry.get("gate_s", 0.0) for entry in runtime)
    return {"of which the quality gate": f"{gate_s:.1f} s ({gate_s / max(busy_s, 1e-9):.1%})"} if gate_s else {}


def caption(row: pd.Series, dataset: SyntheticDataset) -> str:
    """The covariates of one line of a dataset's table, short enough for the caption of a picture."""
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
