"""Make single rows of a generated dataset again, from its plan and its bundle alone, and compare them voxel by voxel."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator

import numpy as np

from brainsynth.bundle.files import bundle_folder
from brainsynth.bundle.generator import model_spec
from brainsynth.config.job import DAMAGED
from brainsynth.errors import UserError
from brainsynth.generate import VolumeGenerator
from brainsynth.manifest import ShardManifest, stored_sha256
from brainsynth.places import is_generator
from brainsynth.plan import GeneratorSettings, Plan, ShardSpec, made_together, recorded_settings
from brainsynth.records import record
from brainsynth.storage.arrays import decode_rows
from brainsynth.storage.commit import read_commit, read_plan, read_samples
from brainsynth.storage.filesystem import Store, open_store, resolve_uri


@record
class Comparison:
    """A row as it is stored and as it was made again."""

    row: int
    sample_id: str
    same_voxels: bool
    """The digests, over image and label map, are equal; both are empty for a row that is rejected again."""
    largest_difference: float
    """Of intensities in [0, 1]; NaN when the stored volume cannot be read."""
    as_recorded: bool
    """The stored volume still has the digest that its record names."""


def rows_named(store: Store, names: list[str]) -> list[int]:
    """Rows by sample id or by number. Raises UserError for a name that is neither."""
    ids = list(read_samples(store, read_plan(store))["sample_id"])
    places = {name: row for row, name in enumerate(ids)}
    rows = []
    for name in names:
        plain = name.removeprefix("sub-")
        if plain in places:
            rows.append(places[plain])
        elif plain.isdigit() and int(plain) < len(ids):
            rows.append(int(plain))
        else:
            raise UserError(
                f"--row {name!r}: the dataset has neither this sample_id nor this row (0 to {len(ids) - 1})"
            )
    return rows


def regenerate(uri: str, bundle: str, rows: list[int], use_gpu: bool = False) -> Iterator[Comparison]:
    """Each of the rows, made again and compared with what is stored.

    A row is made in the micro-batch, with the number of threads and in the form of the networks that its commit record
    names: on the same kind of machine the voxels are then equal to the last bit.

    Raises:
        UserError: no generated dataset, another bundle, or rows that are not committed.
    """
    store = open_store(uri)
    plan = read_plan(store)
    if plan.kind != "generated":
        raise UserError(f"{uri} was not generated (it is {plan.kind}): run the job that made it again")
    spec = model_spec(bundle, plan.identity.get("options"), "--bundle")
    if spec.digest != plan.identity["bundle"]:
        raise UserError(
            f"{uri} was made with another bundle: its plan names {str(plan.identity['bundle'])[:12]}…, "
            f"{bundle} is {spec.digest[:12]}…"
        )
    found = bundle if is_generator(bundle) else str(bundle_folder(bundle, "--bundle"))
    makers: dict[GeneratorSettings, VolumeGenerator] = {}
    for row in rows:
        shard = plan.shard(row // plan.samples_per_shard)
        try:
            commit = read_commit(store, plan, shard.index)
        except FileNotFoundError:
            raise UserError(f"row {row} is not made yet: shard {shard.index} has no commit record") from None
        settings = recorded_settings(uri, found, commit.runtime, use_gpu)
        if settings not in makers:
            makers[settings] = VolumeGenerator(plan, settings)
        yield _compare(store, plan, shard, commit, makers[settings], row)


def _compare(
    store: Store, plan: Plan, shard: ShardSpec, commit: ShardManifest, maker: VolumeGenerator, row: int
) -> Comparison:
    part = made_together(shard, row, commit.runtime)
    again = maker.finish(maker.make(part))
    made = again.arrays[0][row - part.start]
    sample = commit.samples[row - shard.start]
    arrays = zip(plan.arrays, commit.objects, strict=True)
    stored = [decode_rows(plan, spec, shard, store.read(one.key))[row - shard.start] for spec, one in arrays]
    whole, image = [array for array in stored if array is not None], stored[0]
    difference = float("nan")
    if image is not None:  # a row that was set aside differs by NaN
        difference = float(np.abs(plan.volume.dequantise(image) - plan.volume.dequantise(made)).max())
    return Comparison(
        row=row,
        sample_id=sample.sample_id,
        same_voxels=again.samples[row - part.start].voxel_sha256 == sample.voxel_sha256,
        largest_difference=difference,
        as_recorded=len(whole) == len(stored)
        and (sample.status != "ok" or stored_sha256(whole) == sample.voxel_sha256),
    )


def command(arguments: argparse.Namespace) -> int:
    """See `brainsynth regenerate --help`."""
    uri = resolve_uri(arguments.uri, "uri")
    rows = rows_named(open_store(uri), arguments.row)
    if arguments.random:
        total = read_plan(open_store(uri)).num_samples
        rows += random.Random(0).sample(range(total), min(arguments.random, total))
    rows = list(dict.fromkeys(rows))
    if not rows:
        raise UserError("name at least one row: --row ID, or --random N")
    different = 0
    for one in regenerate(uri, arguments.bundle, rows, arguments.gpu):
        different += not one.same_voxels
        verdict = "same voxels" if one.same_voxels else "DIFFERENT"
        stored = "" if one.as_recorded else "; what is STORED is not what its record says"
        print(f"{one.sample_id} (row {one.row}): {verdict}, largest difference {one.largest_difference:.2g}{stored}")
    print(f"{len(rows) - different} of {len(rows)} rows have the voxels that their records name")
    return DAMAGED if different else 0
