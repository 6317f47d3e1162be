"""A cohort of phantoms as a BIDS-like folder of NIfTI files, the same from any number of processes."""

from __future__ import annotations

import contextlib
import gzip
import json
import multiprocessing
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from brainsynth.cohort.phantom import LABELS, VERSION, make_phantom, phantom_covariates, subject_seed
from brainsynth.cohort.phantom_anatomy import F32
from brainsynth.errors import UserError
from brainsynth.records import digest, to_dict
from brainsynth.storage.whole_file import write_whole
from brainsynth.volume import VolumeSpec

DERIVATIVE = "derivatives/phantom"
"""Where the label maps lie."""
Task = tuple[Path, Path | None, float, str, float, float, VolumeSpec, int]
"""What one phantom needs: its file, its label map's, age (years), sex, ventricular and brain volume (ml), grid, seed."""


def write_phantom_cohort(
    folder: Path,
    n: int,
    seed: int,
    volume: VolumeSpec,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 1,
    labels: bool = False,
) -> Path:
    """Write `n` phantoms as a BIDS-like folder of NIfTI files (uint8, white matter near 205) and return the folder.

    It also holds participants.tsv/.json, dataset_description.json and ventricle_prior.nii.gz, the cohort's
    mean ventricle share (float32); with `labels`, label maps in DERIVATIVE. Run again, it returns at once if the cohort
    is complete, else it starts over.
    `workers` processes share the phantoms; the files do not depend on their number. With more than one, a script calls
    this below `if __name__ == "__main__":`, because each process imports the script that started it.

    Raises:
        UserError: the folder holds something else.
    """
    folder = Path(folder)
    if workers < 1:
        raise UserError(f"a phantom cohort needs at least one worker, not {workers}")
    table = phantom_covariates(n, seed)
    identity = digest({"n": n, "seed": seed, "volume": to_dict(volume), "phantom": VERSION})
    table["participant_id"] = [f"sub-{name.replace('-', '')}" for name in table["participant_id"]]
    scans = [folder / name / "anat" / f"{name}_T1w.nii.gz" for name in table["participant_id"]]
    derivative, prior_path = folder / DERIVATIVE, folder / "ventricle_prior.nii.gz"
    maps = [derivative / name / "anat" / f"{name}_dseg.nii.gz" for name in table["participant_id"]] if labels else []
    if _is_ours(folder, identity) and all(path.exists() for path in (prior_path, *scans, *maps)):
        return folder
    description = {"Name": "Procedural T1w head phantoms", "BIDSVersion": "1.9.0", "DatasetType": "raw",
                   "GeneratedBy": [{"Name": "brainsynth.cohort.phantom", "Version": str(VERSION)}],
                   "PhantomCohort": {"n": n, "seed": seed, "identity": identity}}  # fmt: skip
    columns = {"age": ("age", "years"), "sex": ("sex, F or M", "n/a"),
               "ventricular_volume": ("volume of all ventricles, exact by construction", "ml"),
               "brain_volume": ("grey and white matter, no CSF, exact by construction", "ml")}  # fmt: skip
    units = {name: {"Description": text, "Units": unit} for name, (text, unit) in columns.items()}
    write_whole(folder / "dataset_description.json", json.dumps(description, indent=2).encode() + b"\n")
    write_whole(folder / "participants.json", json.dumps(units, indent=2).encode() + b"\n")
    write_whole(folder / "participants.tsv", table.to_csv(sep="\t", index=False, lineterminator="\n").encode())
    write_whole(folder / ".bidsignore", b"ventricle_prior.nii.gz\n")
    if labels:
        derived = {**description, "Name": "Label maps of phantoms", "DatasetType": "derivative"}
        del derived["PhantomCohort"]
        write_whole(derivative / "dataset_description.json", json.dumps(derived, indent=2).encode() + b"\n")
        write_whole(derivative / "dseg.tsv", LABELS.tsv())
    tasks: list[Task] = [
        (scans[i], maps[i] if labels else None, age, sex, vent, brain, volume, subject_seed(seed, i))
        for i, (_, age, sex, vent, brain) in enumerate(table.itertuples(index=False))
    ]
    prior = np.zeros(volume.shape_xyz, np.float64)
    with contextlib.closing(_build_all(tasks, min(workers, n))) as built:
        for done, ventricle in enumerate(built, start=1):
            prior += ventricle  # in the order of the subjects: another order would round differently
            if progress is not None:
                progress(done, n)
    write_whole(prior_path, _nifti((prior / n).astype(np.float32), volume))
    return folder


def _build_all(tasks: list[Task], workers: int) -> Generator[F32]:
    """Each phantom's ventricle share, in order."""
    if workers == 1:
        yield from map(_build, tasks)
        return
    # Not forked from this process, which may hold threads (Ray, an object store) that do not survive a fork, but from a
    # fresh one that has imported this module once for all of them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, mp_context=context)
    try:
        waiting: deque[Future[F32]] = deque()
        for task in tasks:
            waiting.append(pool.submit(_build, task))
            if len(waiting) > 2 * workers:  # a slow one in front must not let finished maps pile up in memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _build(task: Task) -> F32:
    """Write one scan; (X, Y, Z) ventricle share. Runs in the worker processes."""
    path, label_path, age, sex, vent, brain, volume, seed = task
    phantom = make_phantom(age, sex, vent, brain, volume, seed=seed)
    write_whole(path, _nifti(np.rint(phantom.image * 255).astype(np.uint8), volume))
    if label_path is not None:
        write_whole(label_path, _nifti(phantom.labels, volume))
    return phantom.fractions["ventricle"]


def _is_ours(folder: Path, identity: str) -> bool:
    """True where this very cohort was begun, False where nothing was. Raises UserError on anything else."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    try:
        there = json.loads((folder / "dataset_description.json").read_bytes())["PhantomCohort"]
        same = there["identity"] == identity
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder} is not empty and holds no phantom cohort; give an empty or new folder") from None
    if not same:
        raise UserError(
            f"{folder} holds another phantom cohort (n = {there.get('n')}, seed = {there.get('seed')}; or another grid"
            " or version); give another folder, or delete this one"
        )
    return True


def _nifti(voxels: npt.NDArray[Any], volume: VolumeSpec) -> bytes:
    """A .nii.gz file in mm, RAS+; equal voxels give equal bytes."""
    image = nib.Nifti1Image(voxels, volume.affine)
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(volume.affine, code="mni")
    image.set_qform(volume.affine, code="mni")
    return gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)
