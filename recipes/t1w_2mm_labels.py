"""Label maps for the cohort of configs/t1w-2mm, by the segmentation network, and how well networks that learnt them do.

    python -m recipes.t1w_2mm_labels maps [--data FOLDER] [--cohort runs/t1w-2mm/cohort] [--most N]
    python -m recipes.t1w_2mm_labels figures --labeller runs/t1w-2mm/bundle-labels [--generated FOLDER] [--most N]
    python -m recipes.t1w_2mm_labels rendered --renderer runs/t1w-2mm/bundle-renderer [--most N]

`maps` reads the prepared cohort (the intensities that a labeller will see), and writes a map of every scan to
runs/t1w-2mm/labels, dseg.tsv, and the cohort's table with the column `dseg`, for configs/t1w-2mm/1-cohort-labels.yaml.
The network works at 1 mm; a voxel of 2 mm gets the class with the largest mean probability of its eight. It takes 15 CPU
seconds a scan, resumes, and takes the cohorts in turn, so that it may be stopped: scans without a map stay out of the table.

`figures` measures on the validation split against those maps, per structure and cohort: Dice, and volumes; against the label
maps of IXI (DLMUSE) where FOLDER has them; and on generated volumes against the network on the same volumes.

`rendered` makes an image of the map of every scan of the validation split, segments it by the same network, and compares
with the map; of the scan itself that network made the map, so its Dice is 1. Also the images' distance to the scans.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch

from brainsynth.bundle.files import bundle_folder
from brainsynth.bundle.labeller import LABELLER
from brainsynth.bundle.renderer import RENDERER
from brainsynth.config.evaluation import SegmentationConfig
from brainsynth.instruments.segmentation import SegmentationRuler
from brainsynth.labels import Label, LabelTable
from brainsynth.metrics.agreement import agreement
from brainsynth.metrics.intervals import bootstrap_interval
from brainsynth.metrics.overlap import dice
from brainsynth.models.device import choose_device
from brainsynth.models.loading import load_labeller, load_renderer
from brainsynth.models.segmenter import STRUCTURES
from brainsynth.reading.dataset import SyntheticDataset, open_dataset
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.whole_file import write_whole

TABLE = LabelTable(
    labels=tuple(Label(index=index, name=name) for index, name in enumerate(STRUCTURES) if index), source="MeshNet"
)
FOLDER, PARTICIPANTS = Path("runs/t1w-2mm/labels"), Path("runs/t1w-2mm/participants.tsv")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
LABELLED = "runs/t1w-2mm/cohort-labels"
VENTRICLES = {"all ventricles": (3, 4, 11, 12), "lateral and inferior lateral": (3, 4), "3rd and 4th": (11, 12)}
DLMUSE = {"lateral and inferior lateral": (4,), "3rd and 4th": (5,), "all ventricles": (4, 5)}
"""In the label maps of the IXI scans."""


def teacher(data: Path) -> SegmentationRuler:
    """The segmentation network in float32."""
    weights = str(data / "instruments" / "meshnet18" / "model.safetensors")
    return SegmentationRuler.load(SegmentationConfig(segmenter=weights, precision="float32"), choose_device(False))


def in_turn(cohort: SyntheticDataset) -> list[int]:
    """All scans in a fixed random order, four of training and one of validation from each cohort in turn."""
    table, rng = cohort.table, np.random.default_rng(0)
    groups = table.assign(split=cohort.splits).groupby(["split", "cohort"], sort=True).indices
    queues: list[tuple[int, list[int]]] = [
        (1 if "validation" in str(key) else 4, [int(row) for row in rng.permutation(rows)])
        for key, rows in groups.items()
    ]
    order: list[int] = []
    while any(queue for _, queue in queues):
        for count, queue in queues:
            for _ in range(count):
                if queue:
                    order.append(queue.pop())
    return order


def write_maps(data: Path, uri: str, most: int | None) -> None:
    """The maps, dseg.tsv, and the table of scans that have one."""
    cohort, ruler = open_dataset(uri), teacher(data)
    grid = read_plan(open_store(uri)).volume
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "dseg.tsv").write_bytes(TABLE.tsv())
    for index in in_turn(cohort)[:most]:
        path = FOLDER / f"{cohort.sample_ids[index]}_dseg.nii.gz"
        if not path.is_file():
            write_whole(path, nib.Nifti1Image(ruler.label_map(cohort.volume(index), grid), grid.affine).to_bytes())
    table = pd.read_csv(PARTICIPANTS, sep="\t", dtype=str, keep_default_na=False)
    names = (table["participant_id"] + table["session"].replace("n/a", "")).str.replace("[^A-Za-z0-9]", "", regex=True)
    table["dseg"] = [str((FOLDER / f"{name}_dseg.nii.gz").resolve()) for name in names]
    table = table[[Path(path).is_file() for path in table["dseg"]]]
    table.to_csv(FOLDER / "participants.tsv", sep="\t", index=False)
    print(f"{len(table)} scans with a label map: {FOLDER / 'participants.tsv'}")


def figures(data: Path, labeller: str, generated: str | None, most: int | None) -> dict[str, Any]:
    """Everything that `figures` measures, as plain numbers."""
    cohort, folder = open_dataset(LABELLED, split="validation"), bundle_folder(labeller)
    spec, label = LABELLER.read(folder), load_labeller(folder, choose_device(False))
    pairs = [(cohort.label_map(i), label(cohort.volume(i)[None])[0]) for i in range(len(cohort))]
    groups = cohort.table["cohort"].to_numpy()
    voxel_ml = spec.volume.voxel_ml
    found: dict[str, Any] = {"labeller": spec.digest, "held-out scans": {}}
    for group in (*sorted(set(groups)), "both"):
        chosen = [pair for pair, name in zip(pairs, groups, strict=True) if group in (name, "both")]
        found["held-out scans"][group] = compared(chosen, voxel_ml)
    found["IXI, DLMUSE"] = against_dlmuse(data, cohort, pairs, voxel_ml)
    if generated is not None:
        made, ruler = open_dataset(generated), teacher(data)
        volumes = [made.volume(i) for i in range(min(len(made), most or len(made)))]
        truth = [ruler.label_map(volume, spec.volume) for volume in volumes]
        names = made.table["cohort"].to_numpy()[: len(volumes)]
        maps = list(zip(truth, label(np.stack(volumes)), strict=True))
        found["generated volumes"] = {
            group: compared([pair for pair, name in zip(maps, names, strict=True) if group in (name, "both")], voxel_ml)
            for group in (*sorted(set(names)), "both")
        }
    return found


def rendered(data: Path, renderer: str, cohort: SyntheticDataset, most: int | None) -> dict[str, Any]:
    """Everything that `rendered` measures."""
    folder, ruler = bundle_folder(renderer), teacher(data)
    spec, render = RENDERER.read(folder), load_renderer(folder, choose_device(False))
    contexts, groups = spec.covariates.encode(cohort.table), cohort.table["cohort"].to_numpy()[:most]
    maps = [cohort.label_map(i) for i in range(len(groups))]
    began = time.process_time()
    images = [render(labels, contexts[i], 0) for i, labels in enumerate(maps)]
    found: dict[str, Any] = {"renderer": spec.digest, "CPU seconds an image": (time.process_time() - began) / len(maps)}
    pairs = [(labels, ruler.label_map(image, spec.volume)) for labels, image in zip(maps, images, strict=True)]
    l1 = np.array([np.abs(image - cohort.volume(i)).mean() for i, image in enumerate(images)])
    for group in (*sorted(set(groups)), "both"):
        chosen = np.flatnonzero((groups == group) | (group == "both"))
        of_group = compared([pairs[i] for i in chosen], spec.volume.voxel_ml, "rendered_ml")
        found[group] = {"l1": interval(l1[chosen]), **of_group}
    return found


Pairs = list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]


def compared(pairs: Pairs, voxel_ml: float, what: str = "labeller_ml") -> dict[str, Any]:
    """Of pairs (reference, `what`): Dice and volumes of each structure, of the ventricles, and the mean of all."""
    scores = np.stack([dice(made, truth, TABLE.indices) for truth, made in pairs])
    means = np.nanmean(scores, axis=1)
    found: dict[str, Any] = {"n": len(pairs), "mean of structures": interval(means), "structures": {}}
    for column, one in enumerate(TABLE.labels):
        found["structures"][one.name] = {
            "dice": interval(scores[:, column]),
            **volumes([(truth == one.index, made == one.index) for truth, made in pairs], voxel_ml, what),
        }
    for name, indices in VENTRICLES.items():
        both = [(np.isin(truth, indices), np.isin(made, indices)) for truth, made in pairs]
        found[name] = merged(both, voxel_ml, what)
    return found


def merged(pairs: Pairs, voxel_ml: float, what: str = "labeller_ml") -> dict[str, Any]:
    """Of pairs of masks."""
    scores = np.array([dice(made.astype(np.uint8), truth.astype(np.uint8), (1,))[0] for truth, made in pairs])
    return {"dice": interval(scores), **volumes(pairs, voxel_ml, what)}


def volumes(pairs: Pairs, voxel_ml: float, what: str) -> dict[str, Any]:
    """r of the volumes with its interval, and both means in ml."""
    truth, made = (np.array([pair[which].sum() * voxel_ml for pair in pairs]) for which in (0, 1))
    means = {"reference_ml": round(float(truth.mean()), 3), what: round(float(made.mean()), 3)}
    if len(pairs) < 4 or np.ptp(truth) == 0 or np.ptp(made) == 0:
        return means
    one = agreement(made, truth)
    return {"r": [round(value, 4) for value in (one.r, one.r_low, one.r_high)], **means}


def interval(values: np.ndarray[Any, Any]) -> list[float]:
    """Mean and 95 % interval over people."""
    known = values[np.isfinite(values)]
    if len(known) < 2:
        return [round(float(value), 4) for value in known]
    figure = bootstrap_interval(lambda v: float(v.mean()), [known], method="percentile").figure
    return [round(value, 4) for value in figure]


def against_dlmuse(data: Path, cohort: SyntheticDataset, pairs: Pairs, voxel_ml: float) -> dict[str, Any]:
    """Ventricles of the held-out IXI scans against DLMUSE's: of the labeller, and of the network that taught it."""
    table = pd.read_csv(data / "ixi_2mm" / "participants.tsv", sep="\t")
    files = {str(row.participant_id).replace("-", ""): data / "ixi_2mm" / str(row.dseg) for row in table.itertuples()}
    rows = [(files[name], pair) for name, pair in zip(cohort.sample_ids, pairs, strict=True) if name in files]
    images: list[Any] = [nib.load(path) for path, _ in rows]
    truths = [np.asarray(image.dataobj).astype(np.uint8) for image in images]
    found: dict[str, Any] = {"n": len(rows)}
    for which, who in ((1, "labeller"), (0, "teacher")):
        found[who] = {
            name: merged(
                [
                    (np.isin(truth, DLMUSE[name]), np.isin(pair[which], indices))
                    for truth, (_, pair) in zip(truths, rows, strict=True)
                ],
                voxel_ml,
            )
            for name, indices in VENTRICLES.items()
        }
    return found


def main() -> None:
    """One of the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("part", choices=("maps", "figures", "rendered"))
    parser.add_argument("--data", type=Path, default=os.environ.get("BRAINSYNTH_DATA", here.parent / "shared" / "data"))
    parser.add_argument("--cohort", default="runs/t1w-2mm/cohort")
    parser.add_argument("--labeller", default="t1w-2mm", help="bundle that has it")
    parser.add_argument("--renderer", default="t1w-2mm", help="bundle that has it")
    parser.add_argument("--generated", help="dataset to measure on, too")
    parser.add_argument("--most", type=int, help="scans, label maps or generated volumes, at most")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    data = Path(args.data).resolve()
    if args.part == "maps":
        write_maps(data, args.cohort, args.most)
        return
    if args.part == "figures":
        found, name = figures(data, args.labeller, args.generated, args.most), "labeller.json"
    else:
        cohort = open_dataset(LABELLED, split="validation")
        found, name = rendered(data, args.renderer, cohort, args.most), "renderer.json"
    (RESULTS / name).write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
