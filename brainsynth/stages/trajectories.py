"""Makes the volumes of an evaluation's trajectories by the ordinary line, as a small dataset in the evaluation's output."""

from __future__ import annotations

from brainsynth.bundle.files import bundle_folder, read_bundle
from brainsynth.config.evaluation import EvaluateConfig, TrajectoryConfig
from brainsynth.config.schema import SynthesisConfig
from brainsynth.errors import UserError
from brainsynth.evaluation.trajectories import trajectory_rows
from brainsynth.plan import ROW_COLUMNS
from brainsynth.planning import plan_generation
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.work import Work

FOLDER = "trajectories"


def plan_trajectories(config: EvaluateConfig, options: TrajectoryConfig) -> Work:
    """The generation of the trajectories' volumes. Raises UserError on a bundle of another grid, or as `plan_generation`."""
    bundle = read_bundle(bundle_folder(options.bundle, "trajectories.bundle"))
    reference = read_plan(open_store(config.reference)).volume
    if bundle.volume.shape_xyz != reference.shape_xyz or (bundle.volume.affine != reference.affine).any():
        raise UserError(f"trajectories.bundle: {options.bundle} makes volumes on another grid than {config.reference}")
    rows = trajectory_rows(options, bundle)
    how = SynthesisConfig(
        bundle=options.bundle,
        output=f"{config.output.rstrip('/')}/{FOLDER}",
        sampler=options.sampler,
        precision=options.precision,
        samples_per_shard=options.seeds,
        runtime=config.runtime,
    )
    return plan_generation(
        how, bundle.covariates.validate(rows, "trajectories", allow_out_of_range=True, keep=ROW_COLUMNS)
    )
