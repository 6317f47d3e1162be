"""The sections of an evaluation's page that show fidelity: distributions, galleries and trajectories."""

from __future__ import annotations

import numpy as np
import pandas as pd

from brainsynth.evaluation.dataset_report import caption
from brainsynth.evaluation.fidelity import Fidelity
from brainsynth.evaluation.trajectories import Trajectory
from brainsynth.reading.dataset import SyntheticDataset
from brainsynth.report import evaluation_figures, figures
from brainsynth.report.html import Page

GALLERY, EXTREMES = 12, 4


def distributions_section(page: Page, looks: Fidelity) -> None:
    """Intensities, sharpness and volumes of the dataset over those of real scans: sums and counts, nobody's own value."""
    sets = {"training scans": looks.train, "validation scans": looks.held, "generated": looks.made}
    page.heading("Distributions, generated and real")
    counts = {name: sample.arrays["histogram"].sum(axis=0, dtype=np.float64) for name, sample in sets.items()}
    shares = {name: c / c.sum() for name, c in counts.items()}
    page.figure(evaluation_figures.intensities(shares), "voxel intensities")
    background = ", ".join(f"{name} {s[0]:.1%}" for name, s in shares.items())
    page.text(f"Voxels in the darkest bin, the background, are not drawn: {background}.", "note")
    volumes = {name: sample.volumes for name, sample in sets.items()}
    drawn = {
        quantity: {name: volumes[name][quantity] for name in sets}
        for quantity in volumes["training scans"]
        if all(quantity in v and np.isfinite(v[quantity]).any() for v in volumes.values())
    }
    page.figure(evaluation_figures.histograms(drawn, "ml"), "volumes of tissues and structures")
    sharp = {name: sample.table["gradient"].to_numpy(np.float64) for name, sample in sets.items()}
    page.figure(evaluation_figures.histograms({"sharpness (mean gradient)": sharp}, ""), "sharpness")


def galleries_section(page: Page, looks: Fidelity, dataset: SyntheticDataset) -> None:
    """Slices of generated volumes: some drawn at random, and both ends of sharpness, where faults show first."""
    table = dataset.table
    kept = looks.made.table
    page.heading("Slices")
    page.text("Sagittal, coronal and axial, left is left. Drawn at random, nothing picked:", "note")
    _gallery(page, dataset, table, kept["row"].to_numpy()[:GALLERY], "random volumes")
    order = kept["row"].to_numpy()[np.argsort(kept["gradient"].to_numpy(), kind="stable")]
    some = min(EXTREMES, len(order))
    among = f"of {len(order)}" if len(order) == len(dataset) else f"of {len(order)} drawn at random"
    page.text(f"The {some} smoothest {among}:", "note")
    _gallery(page, dataset, table, order[:some], "smoothest volumes")
    page.text(f"The {some} sharpest {among}:", "note")
    _gallery(page, dataset, table, order[::-1][:some], "sharpest volumes")


def trajectories_section(page: Page, trajectories: list[Trajectory], volumes: SyntheticDataset) -> None:
    """Pictures and readings of volumes in which one covariate moves."""
    page.heading("One covariate moves, the noise stays")
    page.text(
        "Each row starts from one noise. All other covariates stay at their median in training (categories at the first "
        "one), so an end of the scale may be an unusual combination.",
        "note",
    )
    index = {name: i for i, name in enumerate(volumes.sample_ids)}
    for line in trajectories:
        shown = [[volumes.volume(index[name]) for name in row] for row in line.sample_ids]
        title = line.covariate.replace("_", " ")
        page.figure(evaluation_figures.trajectory(shown, line.asked, title, line.unit), f"slices as {title} moves")
        if line.measured is not None:
            figure = evaluation_figures.trajectory_lines(line.asked, line.measured, title, line.unit)
            page.figure(figure, f"{title} measured as it moves")


def _gallery(page: Page, dataset: SyntheticDataset, table: pd.DataFrame, rows: np.ndarray, name: str) -> None:
    captions = [f"{table['sample_id'].iloc[i]}\n{caption(table.iloc[i], dataset)}" for i in rows]
    page.figure(figures.gallery([dataset.volume(int(i)) for i in rows], captions), name)
