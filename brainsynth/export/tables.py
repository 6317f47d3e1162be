"""The tables next to exported volumes: participants, dataset description, read-me. Every format gets what BIDS wants."""

from __future__ import annotations

from typing import Any

import pandas as pd

from brainsynth.export.file_format import FileFormat
from brainsynth.export.formats import FORMATS
from brainsynth.export.plan import ExportPlan, Subject
from brainsynth.storage.finalise import participants_sidecar, pretty_json
from brainsynth.storage.tsv import tsv_text
from brainsynth.version import __version__

BIDS_VERSION = "1.10.0"


def tables(export: ExportPlan, subjects: list[Subject]) -> dict[str, bytes]:
    """File name → content, for the subjects that were exported."""
    image = {"Description": _description(export)["Name"], "Units": "arbitrary, 0 to 1"}
    kind = FORMATS[export.record.format]
    return {
        **({"T1w.json": pretty_json(image)} if kind.bids_sidecar else {}),
        **_label_tables(export, kind),
        "participants.tsv": _participants(export, subjects),
        "participants.json": pretty_json(_sidecar(export)),
        "README.md": _readme(export, subjects).encode(),
        "dataset_description.json": pretty_json(_description(export)),
    }


def _label_tables(export: ExportPlan, kind: FileFormat) -> dict[str, bytes]:
    """dseg.tsv and, where the label maps are a derivative of their own, what BIDS wants of one."""
    if export.plan.labels is None or not kind.holds_labels:
        return {}
    description = _description(export)
    name = f"Label maps: {description['Name']}"
    made = [{**one, "Description": f"label maps by {export.plan.labels.source}"} for one in description["GeneratedBy"]]
    derived = {**description, "Name": name, "DatasetType": "derivative", "GeneratedBy": made}
    return {
        f"{kind.label_folder}dseg.tsv": export.plan.labels.tsv(),
        **({f"{kind.label_folder}dataset_description.json": pretty_json(derived)} if kind.label_folder else {}),
    }


def about(export: ExportPlan, subject: Subject) -> dict[str, Any]:
    """What a file says of its own volume, in formats that have a place for it."""
    units = {c.name: c.unit for c in export.plan.covariates.covariates if c.unit}
    return {
        "sample_id": subject.sample_id,
        "split": subject.split,
        "synthetic": export.plan.kind == "generated",
        **({"whose": export.plan.whose} if export.plan.derived_from_person else {}),
        "covariates": subject.covariates,
        "units": units,
        **({} if subject.extrapolated is None else {"extrapolated": subject.extrapolated}),
    }


def _participants(export: ExportPlan, subjects: list[Subject]) -> bytes:
    names = [*export.plan.covariates.names, "split"]
    names += [label.column for label in export.plan.structures]
    lines: list[dict[str, Any]] = [
        {"participant_id": f"sub-{s.sample_id}", **s.covariates, "split": s.split, **s.label_volumes} for s in subjects
    ]
    if _marks_extrapolated(export):
        names.append("extrapolated")
        for line, subject in zip(lines, subjects, strict=True):
            line["extrapolated"] = "true" if subject.extrapolated else "false"
    table = pd.DataFrame(lines, columns=["participant_id", *names])
    return tsv_text(table).encode()


def _sidecar(export: ExportPlan) -> dict[str, Any]:
    columns = participants_sidecar(export.plan)
    del columns["row"], columns["status"]
    columns["split"] = {"Description": "Fixed part of the dataset, by subject", "Levels": {}}
    columns["split"]["Levels"] = {name: name for name in sorted({subject.split for subject in export.subjects})}
    if _marks_extrapolated(export):
        columns["extrapolated"] = {
            "Description": "Whether the covariates lie outside the support of the model's training cohort",
            "Levels": {"true": "a value, or a combination of values, that nobody there had", "false": "within it"},
        }
    return columns


def _marks_extrapolated(export: ExportPlan) -> bool:
    return any(subject.extrapolated is not None for subject in export.subjects)


def _description(export: ExportPlan) -> dict[str, Any]:
    synthetic = export.plan.kind == "generated"
    what = f"plan {export.plan.fingerprint}"
    if synthetic:
        kind = "a latent diffusion model" if "sampler" in export.plan.identity else "a generator"
        what = f"AI-generated images {export.plan.whose}, made by {kind} ({_model(export)}); {what}"
    made = {"Name": "brainsynth", "Version": __version__, "Description": what}
    licence = {"License": export.model.licence} if export.model else {}
    name = "Synthetic T1w brain MRI (AI-generated)" if synthetic else "Prepared T1w brain MRI"
    return {
        "Name": name,
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "raw",  # a derivative must say whether it is skull-stripped, and a model does not know
        **licence,
        "GeneratedBy": [made],
    }


def _model(export: ExportPlan) -> str:
    name = f"bundle {export.model.name}, " if export.model else ""
    return f"{name}digest {export.plan.identity['bundle']}"


def _readme(export: ExportPlan, subjects: list[Subject]) -> str:
    plan, model = export.plan, export.model
    shape, spacing = "×".join(map(str, plan.volume.shape_xyz)), "×".join(f"{mm:g}" for mm in plan.volume.spacing_mm)
    whose = (
        f"Every image is SYNTHETIC: AI-generated, {plan.whose}. Not for diagnosis."
        if plan.kind == "generated"
        else "These images come from the cohort named in the dataset's plan; its terms apply."
    )
    licence = f"- licence of the model: {model.licence}; trained on: {model.training_data}\n" if model else ""
    chosen = export.record.where or "all subjects"
    labels = ""
    if plan.labels is not None and FORMATS[export.record.format].holds_labels:
        labels = f"- label maps: {len(plan.labels.labels)} structures, by {plan.labels.source}\n"
    split = f", split {export.record.split}" if export.record.split else ""
    return (
        f"# {_description(export)['Name']}\n\n{whose}\n\n"
        f"- {len(subjects)} volumes of {shape} voxels at {spacing} mm, axes RAS+, intensities in [0, 1]\n"
        f"- {FORMATS[export.record.format].about}\n{labels}- chosen: {chosen}{split}\n"
        f"{licence}- exported by brainsynth {__version__}; plan {plan.fingerprint}\n"
    )
