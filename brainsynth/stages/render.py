"""`brainsynth render`: an image of a label map, by a bundle's renderer (docs/labels.md)."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from brainsynth.bundle.files import bundle_folder, read_bundle
from brainsynth.bundle.labeller import LABELLER
from brainsynth.bundle.renderer import RENDERER, RendererSpec, measured_structures
from brainsynth.cohort.label_table import read_label_table
from brainsynth.cohort.scan import ScanRejected, load_label_map
from brainsynth.covariates.schema import CovariateSchema
from brainsynth.covariates.words import Value, categories, number, split
from brainsynth.errors import UserError
from brainsynth.export.nifti import packed_nifti
from brainsynth.labels import LabelTable
from brainsynth.metrics.overlap import dice
from brainsynth.models.device import choose_device
from brainsynth.models.loading import load_labeller, load_renderer
from brainsynth.places import is_generator, user_path
from brainsynth.storage.whole_file import whole

log = logging.getLogger(__name__)
INSIDE = 0.95
"""At least this share of what a map labels must lie on the renderer's grid."""
BEYOND = 2.0
"""A structure may be this many times larger than in any label map of the training, or smaller."""
ELSEWHERE_MM = 10.0
"""Its centre may lie this far outside of where it was in training, along any axis."""
Labels = npt.NDArray[np.uint8]


def command(arguments: argparse.Namespace) -> int:
    """Writes the image, and prints how well the bundle's labeller finds the map in it."""
    if is_generator(arguments.bundle):
        raise UserError(f"--bundle: {arguments.bundle} is a generator: only a bundle can have a renderer")
    folder, output = bundle_folder(arguments.bundle), _new_file(arguments.output)
    read_bundle(folder)
    spec, extrapolate = RENDERER.read(folder), arguments.allow_extrapolation
    row = _covariates(spec.covariates, arguments.covariates, extrapolate)
    labels = _label_map(arguments.labels, arguments.label_table, spec, extrapolate)
    device = choose_device(False)
    render = load_renderer(folder, device)
    label = load_labeller(folder, device) if LABELLER.is_in(folder) else None
    image = render(labels, spec.covariates.encode(row)[0], arguments.seed)
    stored = spec.volume.as_stored(image)
    with whole(output) as temporary:
        temporary.write_bytes(packed_nifti(stored, spec.volume, "from a label map"))
    print(f"{output}: its anatomy is that of the label map, and so a person's where the map is a person's")
    if label is not None:
        _print_overlap(labels, spec.labels, label(stored[None])[0], LABELLER.read(folder).labels)
    return 0


def _new_file(name: str) -> Path:
    """Where the image goes. Raises UserError where something is."""
    path = user_path(name, "--output")
    if not path.name.endswith(".nii.gz"):
        raise UserError(f"--output {path}: give a name that ends in .nii.gz")
    if path.exists():
        raise UserError(f"--output {path} is there already: give a new name")
    return path


def _covariates(schema: CovariateSchema, text: str, allow_extrapolation: bool) -> pd.DataFrame:
    """The row that `age=63,sex=F` asks for; a covariate that is left out is unknown to the renderer. Raises UserError."""
    values: dict[str, Value | float] = dict.fromkeys(schema.names, np.nan)
    given: set[str] = set()
    for part in text.split(","):
        if not part.strip():
            continue
        covariate, written = split(part, schema)
        if covariate.name in given:
            raise UserError(f"--covariates: {covariate.name} is given twice")
        given.add(covariate.name)
        known = (number(written, part),) if covariate.kind == "continuous" else categories(written, covariate)
        values[covariate.name] = known[0]
    return schema.validate(pd.DataFrame([values]), "--covariates", allow_extrapolation)


def _label_map(file: str, table_file: str | None, spec: RendererSpec, allow_extrapolation: bool) -> Labels:
    """The map on the renderer's grid, in its integers. Raises UserError for one that is not a brain as it knows them."""
    table = spec.labels if table_file is None else _table(table_file, spec.labels)
    path = user_path(file, "--labels")
    try:
        labels, inside = load_label_map(str(path), table, spec.volume)
    except ScanRejected as error:
        known = ", ".join(f"{value} {label.name}" for label in table.labels for value in label.values or (label.index,))
        hint = f"; it has 0 background, {known}; another segmentation's integers need --label-table"
        reason = str(error).replace("see source.assume_orientation", "write one into the file (its sform)")
        raise UserError(f"--labels: {path}: {reason}{hint if 'label table lacks' in reason else ''}") from None
    if inside < INSIDE or not labels.any():
        raise UserError(
            f"--labels: {path}: {1 - inside:.0%} of what it labels lies outside of the renderer's grid "
            f"({spec.volume.shape_xyz} voxels of {spec.volume.spacing_mm} mm from {spec.volume.origin_mm} mm); register it "
            "as the cohort of the bundle was"
        )
    if not allow_extrapolation:
        _check_structures(labels, spec, str(path))
    return labels


def _table(file: str, known: LabelTable) -> LabelTable:
    """A user's table with the renderer's integers: structures are the same where their names are. Raises UserError."""
    path = str(user_path(file, "--label-table"))
    given = read_label_table(path, known.source, "--label-table")
    index = {label.key: label.index for label in known.labels}
    strange = [label.name for label in given.labels if label.key not in index]
    if strange:
        raise UserError(
            f"--label-table: {path}: {', '.join(strange)}: not a structure of the renderer, which knows "
            f"{', '.join(label.name for label in known.labels)}; others go into the values of a row with index 0, background"
        )
    labels = {label.key: label.values or (label.index,) for label in given.labels}
    return LabelTable(
        labels=tuple(
            type(label)(index=label.index, name=label.name, values=labels[label.key])
            for label in known.labels
            if label.key in labels
        ),
        source=known.source,
        background=given.background,
    )


def _check_structures(labels: Labels, spec: RendererSpec, path: str) -> None:
    """Raises UserError where a structure is missing, or far smaller, larger or elsewhere than in any map of the training."""
    measured = measured_structures(labels, spec.labels, spec.volume)
    wrong = []
    for label in spec.labels.labels:
        one, known = measured[label.key], spec.structures[label.key]
        low, high = known.volume_ml
        if not low / BEYOND <= one.volume_ml <= high * BEYOND:
            wrong.append(f"  {label.name}: {one.volume_ml:.3g} ml, in training {low:.3g} to {high:.3g} ml")
        elif known.lowest_mm is not None and known.highest_mm is not None:
            below, above = known.lowest_mm - one.centre_mm, one.centre_mm - known.highest_mm
            if (away := float(np.maximum(below, above).max())) > ELSEWHERE_MM:
                wrong.append(f"  {label.name}: its centre is {away:.0f} mm away from where it was in training")
    if wrong:
        raise UserError(
            f"--labels: {path}: {len(wrong)} of {len(spec.labels.labels)} structures are far from any label map that the "
            "renderer learnt from:\n"
            + "\n".join(wrong)
            + "\nIs the map whole, registered as the cohort of the bundle was, "
            "and in the renderer's integers? --allow-extrapolation renders it all the same"
        )


def _print_overlap(given: Labels, table: LabelTable, found: Labels, labeller: LabelTable) -> None:
    """Dice of each structure that both know."""
    index = {label.key: label.index for label in table.labels}
    both = [label for label in labeller.labels if label.key in index]
    if not both:
        print("the bundle's labeller knows none of these structures, so the image was not labelled again")
        return
    ours = np.zeros(256, np.uint8)
    ours[[label.index for label in both]] = [index[label.key] for label in both]
    scores = dice(ours[found], given, [index[label.key] for label in both])
    print("label map of the image, by the bundle's labeller (not an independent judge), Dice with the given one:")
    for label, score in zip(both, scores, strict=True):
        print(f"  {label.name}: {'in neither' if np.isnan(score) else f'{score:.3f}'}")
    if np.isfinite(scores).any():
        print(f"  mean: {np.nanmean(scores):.3f}")
