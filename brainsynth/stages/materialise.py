"""`brainsynth materialise`: all volumes of a recipe as a dataset, by any number of workers; resumes."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from brainsynth.config.job import DAMAGED
from brainsynth.config.schema import RuntimeConfig
from brainsynth.executors.dataset import make_dataset
from brainsynth.manifest import MODEL_KEY
from brainsynth.plan import recorded_settings
from brainsynth.planning import volume_generator
from brainsynth.reading.manifest import finished
from brainsynth.stages.recipe import compared, recorded, unpacked
from brainsynth.storage.commit import read_plan, read_samples
from brainsynth.storage.filesystem import LocalStore, resolve_uri
from brainsynth.storage.recipe_file import BUNDLE_FOLDER
from brainsynth.storage.work import Work


def command(arguments: argparse.Namespace) -> int:
    """Make what is missing, finalise, and say how many rows have the voxels that the recipe names."""
    folder = unpacked(Path(arguments.recipe), arguments.cache)
    store, output = LocalStore(folder), resolve_uri(arguments.output, "--output")
    plan = read_plan(store)
    # As the first shard was made: on the same kind of machine the voxels are then equal to the last bit.
    recorded_as = recorded_settings(output, str(folder / BUNDLE_FOLDER), recorded(store)[0])
    settings = dataclasses.replace(recorded_as, workers=arguments.workers)
    runtime = RuntimeConfig(
        workers=settings.workers,
        micro_batch=settings.micro_batch,
        threads_per_worker=settings.threads,
        exact_rewrites=settings.exact_rewrites,
    )
    work = Work(output, plan, read_samples(store, plan), volume_generator, {"plan": plan, "settings": settings})
    manifest = make_dataset(work, runtime)
    work.store.write(MODEL_KEY, store.read(MODEL_KEY))
    recipe, _ = finished(str(folder))
    if manifest.shards_digest == recipe["shards_digest"]:
        print(f"{output}: every object is the one that the recipe was written from")
        return 0
    same, close, other = compared(plan, store, work.store)
    print(f"{output}: {same} rows have the recipe's voxels, {close} the same figures to a storage step, {other} others")
    return DAMAGED if other else 0
