"""Bundle + covariates → dataset and its report."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from brainsynth.bundle.generator import model_spec
from brainsynth.config.schema import SHIPPED_BUNDLE, GenerateConfig, RuntimeConfig, SynthesisConfig
from brainsynth.errors import UserError
from brainsynth.executors.dataset import dry_run, make_dataset
from brainsynth.manifest import MODEL_KEY, ModelRecord
from brainsynth.plan import ROW_COLUMNS, PersonScan
from brainsynth.planning import plan_generation
from brainsynth.records import seal
from brainsynth.storage.work import Work


def run(config: SynthesisConfig, rows: pd.DataFrame | None = None, scan: PersonScan | None = None) -> Path | None:
    """Bundle + covariates → dataset and its report: what `brainsynth generate` does. The same call again resumes.

    With `runtime.workers: 0` it runs in this process, else on Ray: in the session that is there, on the cluster that
    RAY_ADDRESS names, or in a private session.

    Args:
        rows: what to generate in place of the rows that `config.covariates` names, validated by the bundle's schema.
        scan: of the person whom all rows show.

    Returns:
        The path of report.html (None on an object store); the dataset is at `config.output`.

    Raises:
        UserError: a mistake in the config or its inputs, another plan at `config.output`, or a layout that cannot run.
    """
    work = plan_generation(config, rows, scan)
    make_dataset(work, config.runtime)
    bundle = model_spec(config.bundle, config.options)
    model = ModelRecord(
        bundle=bundle.digest, name=bundle.name, licence=bundle.licence, training_data=bundle.training_data
    )
    work.store.write(MODEL_KEY, seal(model))
    from brainsynth.evaluation.dataset_report import report_dataset  # figures: nothing before needs them

    return report_dataset(work.root, config.bundle)


def generate_dataset(
    config: GenerateConfig | None = None,
    *,
    count: int | None = None,
    rows: pd.DataFrame | str | None = None,
    output: str | None = None,
    bundle: str = SHIPPED_BUNDLE,
    seed: int = 0,
    workers: int | None = None,
    gpus: int = 0,
) -> Path | None:
    """Generate a dataset: `generate_dataset(count=4, output="brains")`. The same call again resumes.

    Without a config, sampler and quality gate are those that the bundle recommends.

    Args:
        config: all of it, as `brainsynth generate --config` reads it; then no other argument but `rows`, a DataFrame.
        count: how many people to draw from the bundle's covariate distribution.
        rows: these people instead: a DataFrame, or the path of a .csv, .tsv or .parquet file; one column a covariate, in
            the bundle's units, and optionally `sample_id` and `noise_seed`.
        output: folder or URI of the dataset.
        bundle: folder of a bundle, or the name of the bundled model.
        seed: another number is other people and other brains.
        workers: processes; 0 works in this one, without Ray; by default two, or one a GPU.
        gpus: GPUs, one a worker.

    Returns:
        The path of report.html (None on an object store); read the dataset by `open_dataset(output)`.

    Raises:
        UserError: a mistake in the arguments or their inputs, another plan at `output`, or a layout that cannot run.
    """
    from brainsynth.bundle.recommended import recommended_generation

    made: SynthesisConfig
    if config is not None:
        if count is not None or output is not None or isinstance(rows, str):
            raise UserError("generate_dataset: with a config, count, output and a table's path are keys of the config")
        made = config
    elif output is None or (count is None) == (rows is None):
        raise UserError("generate_dataset: give a config, or output with either count or rows")
    else:
        covariates = None if isinstance(rows, pd.DataFrame) else {"draw": count} if rows is None else {"table": rows}
        made = recommended_generation(output, bundle, covariates, seed=seed, workers=workers, gpus=gpus)
    if not isinstance(rows, pd.DataFrame):
        return run(made)
    extrapolates = config is not None and config.covariates.allow_extrapolation
    schema = model_spec(made.bundle, made.options).covariates
    return run(made, schema.validate(rows, "rows", allow_out_of_range=extrapolates, keep=ROW_COLUMNS))


def describe(config: SynthesisConfig, rows: pd.DataFrame | None = None, scan: PersonScan | None = None) -> str:
    """What generate would make, and about how long it takes."""
    work = plan_generation(config, rows, scan)
    return f"{dry_run(work, config.runtime)}\n{_duration(work, config.runtime)}"


def _duration(work: Work, runtime: RuntimeConfig) -> str:
    from brainsynth.models.driver import nvidia_driver

    if runtime.gpus_per_worker and nvidia_driver() is None:
        return (
            "no estimate of the time: it is measured on one micro-batch, and this machine has no GPU as the plan wants"
        )
    try:
        from brainsynth.generate import seconds_per_volume
    except ModuleNotFoundError as error:
        return f"no estimate of the time: it is measured on one micro-batch, and {error.name} is not installed"
    seconds = seconds_per_volume(work.plan, work.samples, work.arguments["settings"], work.arguments.get("scan"))
    minutes = seconds * work.plan.num_samples / max(1, runtime.workers) / 60
    return f"about {minutes:.1f} min of generation, by one micro-batch timed here"
