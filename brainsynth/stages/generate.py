"""Bundle + covariates → dataset and its report."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from brainsynth.bundle.files import bundle_folder, read_bundle
from brainsynth.config.schema import GenerateConfig
from brainsynth.executors.dataset import dry_run, make_dataset
from brainsynth.manifest import MODEL_KEY, ModelRecord
from brainsynth.planning import plan_generation
from brainsynth.records import seal
from brainsynth.storage.work import Work


def run(config: GenerateConfig, rows: pd.DataFrame | None = None) -> Path | None:
    """Bundle + covariates → dataset and its report: what `brainsynth generate` does. The same call again resumes.

    With `runtime.workers: 0` it runs in this process, else on Ray: in the session that is there, on the cluster that
    RAY_ADDRESS names, or in a private session.

    Args:
        rows: rows to generate in place of those that `config.covariates` names, validated by the bundle's schema.

    Returns:
        The path of report.html (None on an object store); the dataset is at `config.output`.

    Raises:
        UserError: a mistake in the config or its inputs, another plan at `config.output`, or a layout that cannot run.
    """
    work = plan_generation(config, rows)
    make_dataset(work, config.runtime)
    bundle = read_bundle(bundle_folder(config.bundle))
    model = ModelRecord(
        bundle=bundle.digest, name=bundle.name, licence=bundle.licence, training_data=bundle.training_data
    )
    work.store.write(MODEL_KEY, seal(model))
    from brainsynth.evaluation.dataset_report import report_dataset  # figures: nothing before needs them

    return report_dataset(work.root, config.bundle)


def describe(config: GenerateConfig, rows: pd.DataFrame | None = None) -> str:
    """What generate would make, and about how long it takes."""
    work = plan_generation(config, rows)
    return f"{dry_run(work, config.runtime)}\n{_duration(work, config.runtime.workers)}"


def _duration(work: Work, workers: int) -> str:
    try:
        from brainsynth.generate import seconds_per_volume
    except ModuleNotFoundError as error:
        return f"no estimate of the time: it is measured on one micro-batch, and {error.name} is not installed"
    seconds = seconds_per_volume(work.plan, work.samples, work.arguments["settings"])
    minutes = seconds * work.plan.num_samples / max(1, workers) / 60
    return f"about {minutes:.1f} min of generation, by one micro-batch timed here"
