"""A picture of a generated dataset: volumes evenly spaced through it, none picked, with their covariates.

python -m benchmarks.gallery --dataset runs/t1w-2mm/generated --count 16 --figure docs/images/t1w-2mm-generated.png
"""

from __future__ import annotations

import argparse

import numpy as np

from brainsynth.evaluation.dataset_report import caption
from brainsynth.report import figures
from brainsynth.storage.reader import open_dataset


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("--dpi", type=int, default=70)
    parser.add_argument("--figure", required=True)
    arguments = parser.parse_args()
    dataset = open_dataset(arguments.dataset)
    chosen = np.linspace(0, len(dataset) - 1, arguments.count).astype(int)
    captions = [caption(dataset.table.iloc[i], dataset) for i in chosen]
    picture = figures.gallery([dataset.volume(int(i)) for i in chosen], captions, arguments.columns)
    picture.savefig(arguments.figure, dpi=arguments.dpi, bbox_inches="tight")


if __name__ == "__main__":
    main()
