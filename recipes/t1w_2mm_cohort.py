"""The table of configs/t1w-2mm: both cohorts in one, missing volumes filled in by a ruler whose error is measured.

    python -m recipes.t1w_2mm_cohort [--data FOLDER] [--output runs/t1w-2mm/participants.tsv]

FOLDER (default: $BRAINSYNTH_DATA, or ../shared/data next to the repository) holds ixi_2mm and oasis1_2mm. Volumes keep the
instrument of their cohort, which the covariate `cohort` names: IXI native ml by DLMUSE, OASIS-1 ml in MNI space (head size
removed) by the segmentation network. Where OASIS-1 has none, a ridge regression on tissue maps, fitted on the rest of
OASIS-1, estimates them; its error from 10-fold cross-validation by subject is written next to the table as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd

from benchmarks.age_sex_ruler import GRIDS
from brainsynth.instruments.covariate_ruler import CovariateRuler, cross_predict
from brainsynth.instruments.tissue_features import tissue_features
from brainsynth.metrics.agreement import agreement
from brainsynth.records import to_dict
from brainsynth.volume import resample

VOLUMES = {"ventricular_volume": "vent_mni_ml", "brain_volume": "brain_mni_ml"}


def ixi(folder: Path) -> pd.DataFrame:
    """Scans with label maps, stripped by them."""
    table = pd.read_csv(folder / "participants.tsv", sep="\t")
    return pd.DataFrame(
        {
            "participant_id": table["participant_id"],
            "image": [str(folder / name) for name in table["t1w"]],
            "mask": [str(folder / name) for name in table["dseg"]],
            "cohort": "ixi",
            "age": table["age"],
            "sex": table["sex"],
            "ventricular_volume": table["vent_ml"],
            "brain_volume": table["brain_ml"],
            "volumes_from": "labels",
            "qc": "ok",
        }
    )


def oasis(folder: Path) -> pd.DataFrame:
    """Brains as they are; the image is its own mask. A volume may be missing."""
    table = pd.read_csv(folder / "participants.tsv", sep="\t")
    images = [str(folder / name) for name in table["t1w"]]
    return pd.DataFrame(
        {
            "participant_id": table["participant_id"],
            "session": table["session"],
            "image": images,
            "mask": images,
            "cohort": "oasis1",
            "age": table["age"],
            "sex": table["sex"],
            **{name: table[column] for name, column in VOLUMES.items()},
            "volumes_from": np.where(table["vent_mni_ml"].notna(), "segmentation", "ruler"),
            "qc": table["qc"],
        }
    )


def fill(table: pd.DataFrame) -> dict[str, Any]:
    """Fill missing volumes in place; returns the ruler's error on subjects it had not seen, for each volume."""
    usable = table[table["qc"] != "fail"]
    features = np.stack([_features(path) for path in usable["image"]])
    errors = {}
    for name in VOLUMES:
        known = usable[name].notna().to_numpy()
        values, people = np.log(usable.loc[known, name].to_numpy(float)), usable.loc[known, "participant_id"].to_numpy()
        unseen = np.exp(cross_predict(features[known], values, groups=people)[0])
        errors[name] = to_dict(agreement(unseen, np.exp(values), groups=people))
        ruler = CovariateRuler.fit(features[known], values, groups=people, kind="continuous", own_error=False)
        rows = usable.index[~known]
        table.loc[rows, name] = np.exp(ruler.predict(features[~known])).round(2)
    return {"missing": int((~known).sum()), "fitted_on": int(known.sum()), "errors": errors}


def _features(path: str) -> np.ndarray:
    image: Any = nib.load(path)
    return tissue_features(resample(image.get_fdata(dtype=np.float32), image.affine, GRIDS["2 mm"]), GRIDS["2 mm"])


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("--data", type=Path, default=os.environ.get("BRAINSYNTH_DATA", here.parent / "shared" / "data"))
    parser.add_argument("--output", type=Path, default=Path("runs/t1w-2mm/participants.tsv"))
    args = parser.parse_args()
    data = Path(args.data).resolve()
    second = oasis(data / "oasis1_2mm")
    errors = fill(second)
    table = pd.concat([ixi(data / "ixi_2mm"), second], ignore_index=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.output, sep="\t", index=False, na_rep="n/a")
    args.output.with_suffix(".json").write_text(json.dumps(errors, indent=1) + "\n")
    print(table.groupby(["cohort", "volumes_from"]).size(), json.dumps(errors, indent=1), sep="\n")


if __name__ == "__main__":
    main()
