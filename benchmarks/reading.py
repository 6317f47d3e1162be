"""Cost of reading: whole volumes and 64-voxel patches from shards, NIfTI, HDF5 and plain zarr, in one run.

    python -m benchmarks.reading                  # prints, and writes results/reading.json
    python -m benchmarks.reading --volumes 2 --rounds 3 --json ''

The same voxels in every format: procedural heads of 160×224×160 at 1 mm, as a model makes them (air is not exactly zero)
and with the background set to zero. CPU time of one thread that does what a DataLoader worker does for an item: read,
decode, float32 tensor. Sources alternate round by round, so that load on the machine affects all alike; only ratios count.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import nibabel
import numpy as np
import torch
import zarr
from monai.transforms import LoadImage, RandSpatialCrop
from scipy import ndimage

from brainsynth import open_dataset
from brainsynth.cohort.phantom import make_phantom, phantom_covariates, phantom_grid
from brainsynth.config.schema import SamplerConfig
from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.manifest import describe_sample
from brainsynth.plan import GenerationIdentity, Plan, generation_plan, generation_samples
from brainsynth.storage.commit import commit_shard, write_plan
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.finalise import finalise

GRID = phantom_grid(1.0, (160, 224, 160))
PATCH = (64, 64, 64)
SCHEMA = CovariateSchema(covariates=(Covariate(name="age", kind="continuous", unit="years", low=5.0, high=110.0),))
SHARDS, PLAIN = "brainsynth shards", "the same shards, plain zarr"
COARSE, COARSE_PLAIN = "shards, chunks of half an axis", "those, plain zarr"
NIFTI, HDF5 = "NIfTI.gz, MONAI LoadImage", "HDF5, gzip 4 + shuffle"
PLACES = ("shards", "halves")


def heads(count: int) -> tuple[Any, np.ndarray[Any, Any]]:
    """Covariates, and stored voxels (n, X, Y, Z) float16."""
    people = phantom_covariates(count, 0)
    images = [
        make_phantom(p.age, p.sex, p.ventricular_volume, p.brain_volume, GRID, i).image
        for i, p in enumerate(people.itertuples())
    ]
    return people, np.stack([GRID.quantise(image) for image in images])


def masked(stored: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same with the air set to zero."""
    inside = ndimage.gaussian_filter(stored.astype(np.float32), (0, 2, 2, 2)) > 0.15
    return np.where(inside, stored, np.float16(0))


def write_shards(root: Path, plan: Plan, samples: Any, stored: np.ndarray[Any, Any]) -> None:
    store = open_store(str(root))
    write_plan(store, plan, samples)
    for index in range(plan.num_shards):
        shard = plan.shard(index)
        part = stored[shard.start : shard.stop]
        ids = samples["sample_id"][shard.start : shard.stop]
        records = [
            describe_sample(name, row, [v]) for row, (name, v) in enumerate(zip(ids, part, strict=True), shard.start)
        ]
        commit_shard(store, plan, shard, [part], records, {})
    finalise(store, plan)


def write_all(folder: Path, people: Any, stored: np.ndarray[Any, Any]) -> dict[str, float]:
    """The same volumes in every format; MB a volume."""
    rows = people[["age"]]
    samples = generation_samples(rows, SCHEMA, 0, SCHEMA.out_of_range(rows))
    sampler = SamplerConfig(method="ddim", steps=5)
    identity = GenerationIdentity(bundle="0" * 64, sampler=sampler, precision="float32", base_seed=0)
    plan = generation_plan(identity, GRID, SCHEMA, samples, 16)
    write_shards(folder / "shards", plan, samples, stored)
    halves = replace(plan.arrays[0], chunk_shape=tuple(size // 2 for size in GRID.shape_xyz))
    write_shards(folder / "halves", replace(plan, arrays=(halves,)), samples, stored)
    for index, volume in enumerate(stored):
        nibabel.save(nibabel.Nifti1Image(volume.astype(np.float32), GRID.affine), folder / f"{index}.nii.gz")
    ours, coarse = (
        sum(f.stat().st_size for f in (folder / name / "dataset.zarr/t1w/c").rglob("*") if f.is_file())
        for name in PLACES
    )
    sizes = {SHARDS: ours, PLAIN: ours, COARSE: coarse, COARSE_PLAIN: coarse}
    sizes[NIFTI] = sum(f.stat().st_size for f in folder.glob("*.nii.gz"))
    if importlib.util.find_spec("h5py"):
        import h5py

        with h5py.File(folder / "volumes.h5", "w") as file:
            chunk = (1, *plan.arrays[0].chunk_shape)
            file.create_dataset("t1w", data=stored, chunks=chunk, compression="gzip", compression_opts=4, shuffle=True)
        sizes[HDF5] = (folder / "volumes.h5").stat().st_size
    return {name: size / len(stored) / 1e6 for name, size in sizes.items()}


Reader = Callable[[int], Any]


def sources(folder: Path) -> dict[str, tuple[Reader, Reader]]:
    """Name → (volume, patch) of an index, as a float32 tensor (1, …)."""
    rng = np.random.default_rng(0)
    opened, coarse = (open_dataset(str(folder / name)) for name in PLACES)
    volumes, patches = opened.torch(), opened.torch(patch=PATCH)
    coarse_volumes, coarse_patches = coarse.torch(), coarse.torch(patch=PATCH)
    halves: Any = zarr.open_array(str(folder / "halves/dataset.zarr/t1w"), mode="r")
    array: Any = zarr.open_array(str(folder / "shards/dataset.zarr/t1w"), mode="r")
    load = LoadImage(image_only=True, ensure_channel_first=True)
    crop = RandSpatialCrop(PATCH, random_size=False)

    def tensor(values: Any) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values)).float()[None]

    def box(index: int) -> tuple[Any, ...]:
        starts = [int(rng.integers(0, n - p + 1)) for n, p in zip(GRID.shape_xyz, PATCH, strict=True)]
        return (index, *(slice(a, a + p) for a, p in zip(starts, PATCH, strict=True)))

    found: dict[str, tuple[Reader, Reader]] = {
        SHARDS: (lambda i: volumes[i]["image"], lambda i: patches[i]["image"]),
        PLAIN: (lambda i: tensor(array[i]), lambda i: tensor(array[box(i)])),
        COARSE: (lambda i: coarse_volumes[i]["image"], lambda i: coarse_patches[i]["image"]),
        COARSE_PLAIN: (lambda i: tensor(halves[i]), lambda i: tensor(halves[box(i)])),
        NIFTI: (
            lambda i: load(folder / f"{i}.nii.gz"),
            lambda i: crop(load(folder / f"{i}.nii.gz")),
        ),
    }
    if importlib.util.find_spec("h5py"):
        import h5py

        data = h5py.File(folder / "volumes.h5", "r")["t1w"]
        found[HDF5] = (lambda i: tensor(data[i]), lambda i: tensor(data[box(i)]))
    return found


def check(readers: dict[str, tuple[Reader, Reader]], stored: np.ndarray[Any, Any]) -> None:
    """Every source gives the same voxels: else the comparison is worth nothing."""
    for name, (volume, patch) in readers.items():
        np.testing.assert_array_equal(np.asarray(volume(0))[0], stored[0].astype(np.float32), err_msg=name)
        assert tuple(patch(0).shape) == (1, *PATCH), name


def measure(readers: dict[str, tuple[Reader, Reader]], count: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """CPU milliseconds an item, one number a round."""
    spent: dict[str, dict[str, list[float]]] = {name: {"volume": [], "patch": []} for name in readers}
    for _ in range(rounds):
        for name, pair in readers.items():
            for kind, read in zip(("volume", "patch"), pair, strict=True):
                began = time.process_time()
                for index in range(count):
                    read(index)
                spent[name][kind].append(1000 * (time.process_time() - began) / count)
    return spent


def report(title: str, sizes: dict[str, float], spent: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    print(f"\n{title}\n{'':32} {'MB':>6} {'volume ms':>18} {'×':>6} {'patch ms':>18} {'×':>6}")
    base = {kind: statistics.median(spent[NIFTI][kind]) for kind in ("volume", "patch")}
    result: dict[str, Any] = {}
    for name, kinds in spent.items():
        line: dict[str, Any] = {"mb_per_volume": sizes[name]}
        text = f"{name:32} {line['mb_per_volume']:6.2f}"
        for kind, values in kinds.items():
            middle = statistics.median(values)
            line[kind] = {"cpu_ms": middle, "low": min(values), "high": max(values), "times_nifti": base[kind] / middle}
            text += f" {middle:7.1f} [{min(values):.1f}, {max(values):.1f}]".rjust(19) + f" {base[kind] / middle:6.1f}"
        print(text)
        result[name] = line
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", default="benchmarks/results/reading.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    people, stored = heads(arguments.volumes)
    results: dict[str, Any] = {}
    for title, voxels in (("as generated", stored), ("background zero", masked(stored))):
        with tempfile.TemporaryDirectory() as folder:
            sizes = write_all(Path(folder), people, voxels)
            readers = sources(Path(folder))
            check(readers, voxels)
            zero = f"{title}: {100 * float((voxels == 0).mean()):.0f} % of voxels are 0"
            results[title] = report(zero, sizes, measure(readers, arguments.volumes, arguments.rounds))
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    versions = {"torch": torch.__version__, "zarr": zarr.__version__, "nibabel": nibabel.__version__}
    if arguments.json:
        about = {"volumes": arguments.volumes, "rounds": arguments.rounds, **machine, **versions}
        Path(arguments.json).write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
