"""Pictures of a generated dataset: volumes evenly spaced through it, none picked; requested against measured covariates.

    python -m recipes.gallery --dataset runs/t1w-2mm/generated --count 6 --columns 2 --dpi 230 \
        --figure docs/images/t1w-2mm-generated.png --scatter docs/images/t1w-2mm-adherence.png

The scatter plots need what an evaluation with `publish: true` measured.
"""

from __future__ import annotations

import argparse

import numpy as np
from matplotlib.figure import Figure

from brainsynth.evaluation.dataset_report import caption
from brainsynth.reading.dataset import SyntheticDataset, open_dataset
from brainsynth.report import figures


def scatter(dataset: SyntheticDataset, figure: str) -> None:
    """One panel for each covariate that is a number; the dataset was opened with `measured`."""
    table = dataset.table
    names = [n for n in dataset.covariates if dataset.units[n] and f"measured_{n}" in table]
    picture = Figure(figsize=(4.2 * len(names), 4.0), layout="constrained")
    for name, axis in zip(names, np.atleast_1d(picture.subplots(1, len(names))), strict=True):
        asked, measured = table[name].to_numpy(float), table[f"measured_{name}"].to_numpy(float)
        title = f"{name.replace('_', ' ')}: r = {np.corrcoef(asked, measured)[0, 1]:.3f}, n = {len(table)}"
        figures.agreement_panel(axis, asked, measured, title, dataset.units[name])
    picture.savefig(figure, dpi=70)


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("--dpi", type=int, default=70)
    parser.add_argument("--figure", required=True)
    parser.add_argument("--scatter")
    arguments = parser.parse_args()
    dataset = open_dataset(arguments.dataset, measured=bool(arguments.scatter))
    chosen = np.linspace(0, len(dataset) - 1, arguments.count).astype(int)
    captions = [caption(dataset.table.iloc[i], dataset) for i in chosen]
    picture = figures.gallery([dataset.volume(int(i)) for i in chosen], captions, arguments.columns)
    picture.savefig(arguments.figure, dpi=arguments.dpi, bbox_inches="tight")
    if arguments.scatter:
        scatter(dataset, arguments.scatter)


if __name__ == "__main__":
    main()
