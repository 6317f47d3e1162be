"""What a generation will make: bundle, rows and gate are checked, then rows, seeds and shards planned. Needs no torch."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from brainsynth.bundle.files import bundle_folder, check_bundle_files, check_decoder, read_bundle
from brainsynth.bundle.generator import (
    GeneratorSpec,
    ModelSpec,
    check_generator_files,
    described,
    generator_folder,
    open_generator,
)
from brainsynth.bundle.spec import GATE_FILE
from brainsynth.config.gate import GateConfig
from brainsynth.config.schema import SHIPPED_BUNDLE, CovariateSource, GenerateConfig, SynthesisConfig
from brainsynth.errors import UserError
from brainsynth.labels import LabelTable
from brainsynth.models.sampler_rules import check_bundle_sampler
from brainsynth.places import is_generator
from brainsynth.plan import (
    ROW_COLUMNS,
    GateRules,
    GenerationIdentity,
    GeneratorSettings,
    PersonScan,
    Plan,
    generation_plan,
    generation_samples,
)
from brainsynth.storage.cells import read_cells
from brainsynth.storage.filesystem import resolve_uri
from brainsynth.storage.work import Work

if TYPE_CHECKING:
    from brainsynth.generate import VolumeGenerator

log = logging.getLogger(__name__)


def plan_generation(config: SynthesisConfig, rows: pd.DataFrame | None = None, scan: PersonScan | None = None) -> Work:
    """Check everything, and plan. Writes nothing.

    Args:
        rows: what to generate, validated by the bundle's schema; without them `config` is a GenerateConfig, which names
            their source.
        scan: of the person whom all rows show; without it, everybody's noise comes from the row.

    Raises:
        UserError: bad bundle, table, covariates or sampler.
    """
    folder, bundle = planned_model(config)
    if rows is None:
        assert isinstance(config, GenerateConfig), "a config without covariates needs rows"
        rows = covariate_rows(config.covariates, bundle)
    try:
        samples = generation_samples(rows, bundle.covariates, config.base_seed, np.zeros(len(rows), dtype=bool))
    except UserError as error:
        table = config.covariates.table if isinstance(config, GenerateConfig) else None
        raise UserError(f"{table}: {error}" if table else str(error)) from None
    samples = _completed(samples, bundle)
    samples["extrapolated"] = _looked_over(samples, bundle)
    labeller, labels = planned_labels(config, folder, bundle)
    renderer = None
    if config.decoder == "rendered" and labels is not None:
        renderer = planned_renderer(folder, bundle, labels)
        labels = labels if config.labels else None  # made, but not stored
    gate = None if config.gate is None else planned_rules(config.gate, folder, bundle, labels)
    identity = GenerationIdentity(
        bundle=bundle.digest,
        sampler=config.sampler,
        precision=config.precision,
        base_seed=config.base_seed,
        gate=gate,
        decoder=config.decoder,
        options=config.options,
        labeller=labeller,
        renderer=renderer,
        scan=None if scan is None else scan.identity,
    )
    volume = dataclasses.replace(bundle.volume, dtype=config.stored_dtype)
    plan = generation_plan(
        identity, volume, bundle.covariates, samples, config.samples_per_shard, labels, config.stored_codec
    )
    settings = GeneratorSettings(
        root=resolve_uri(config.output, "output"),
        # Each node has its own copy of the bundled model, and imports a generator by its name.
        bundle=config.bundle if config.bundle == SHIPPED_BUNDLE or is_generator(config.bundle) else str(folder),
        micro_batch=config.runtime.micro_batch,
        threads=config.runtime.threads_per_worker,
        workers=config.runtime.workers,
        use_gpu=config.runtime.gpus_per_worker > 0,
        exact_rewrites=config.runtime.exact_rewrites,
    )
    arguments = {"plan": plan, "settings": settings, "scan": None if scan is None else scan.volume}
    return Work(settings.root, plan, samples, volume_generator, arguments)


def _looked_over(rows: pd.DataFrame, bundle: ModelSpec) -> npt.NDArray[np.bool_]:
    """Which rows lie outside the training support; warns of them."""
    extrapolated = bundle.extrapolated(rows)
    if extrapolated.any():
        log.warning(
            "%d of %d rows lie outside the training support (a value, or an unusual combination of values): they are made, "
            "and flagged `extrapolated` in the manifest",
            extrapolated.sum(),
            len(rows),
        )
    return extrapolated


def _completed(samples: pd.DataFrame, bundle: ModelSpec) -> pd.DataFrame:
    """Planned rows with their empty cells filled from the bundle's covariate distribution, if it has one; warns of them.

    A network is trained with rows that are known, and with rows of which nothing is: a row that is half known is new to it.
    """
    names = list(bundle.covariates.names)
    missing = samples[names].isna().sum()
    if not missing.any():
        return samples
    counts = ", ".join(f"{name} in {count}" for name, count in missing.items() if count)
    how = "the model takes these values as unknown"
    if bundle.distribution is not None:
        how = "drawn from the bundle's covariate distribution, given what the row says"
        samples = samples.assign(**bundle.distribution.completed(samples[names], samples["seed"].tolist()))
    log.warning("empty cells: %s of %d rows; %s", counts, len(samples), how)
    return samples


def planned_model(config: SynthesisConfig) -> tuple[Path, ModelSpec]:
    """The bundle or the generator that a config names, checked, and its folder. Raises UserError."""
    if is_generator(config.bundle):
        other = [
            name
            for name, given in (
                ("sampler", config.sampler is not None),
                ("decoder", config.decoder != "own"),
                ("precision", config.precision != "float32"),
            )
            if given
        ]
        if other:
            raise UserError(
                f"{', '.join(other)}: these are keys for bundles, and {config.bundle} is a generator: leave them out, and "
                "give what its class takes under options"
            )
        generator = open_generator(config.bundle, config.options)
        described_by = described(generator, config.bundle)
        check_generator_files(generator, described_by)
        return generator_folder(generator), described_by
    if config.options:
        raise UserError("options: they are for a generator's class (bundle: module:Class), and bundle names a bundle")
    folder = bundle_folder(config.bundle)
    bundle = read_bundle(folder)
    check_bundle_files(folder, bundle)
    check_decoder(folder, bundle, config.decoder)
    assert config.sampler is not None, "the config of a bundle has a sampler"
    check_bundle_sampler(bundle, config.sampler)
    return folder, bundle


def volume_generator(
    plan: Plan, settings: GeneratorSettings, scan: npt.NDArray[np.float32] | None = None
) -> VolumeGenerator:
    """The maker of a planned generation, which needs torch; each worker builds its own."""
    from brainsynth.generate import VolumeGenerator

    return VolumeGenerator(plan, settings, scan)


def planned_labels(config: SynthesisConfig, folder: Path, bundle: ModelSpec) -> tuple[str | None, LabelTable | None]:
    """(digest of the labeller, table of the label maps): of the bundle's labeller if the config needs it, else the table
    of those that a generator makes itself. Raises UserError when there is no labeller, or one of another grid."""
    if isinstance(bundle, GeneratorSpec):
        if config.labels:
            raise UserError(
                f"labels: a bundle's labeller makes them, and {config.bundle} is a generator, which makes its own or none: "
                "leave labels out"
            )
        return None, bundle.labels
    if not config.labels and config.decoder != "rendered":
        return None, None
    from brainsynth.bundle.labeller import LABELLER  # only where label maps are asked for

    labeller = LABELLER.read(folder)
    LABELLER.check_grid(labeller.volume, bundle.volume)
    return labeller.digest, labeller.labels


def planned_renderer(folder: Path, bundle: ModelSpec, labels: LabelTable) -> str:
    """Digest of the bundle's renderer, which makes images of such label maps. Raises UserError when none could."""
    from brainsynth.bundle.renderer import RENDERER  # only where images are made again

    renderer = RENDERER.read(folder)
    known, drawn = ([(label.index, label.key) for label in table.labels] for table in (labels, renderer.labels))
    RENDERER.check_grid(renderer.volume, bundle.volume)
    wrong = {
        "it knows other structures than the bundle's labeller": drawn != known,
        "it knows other covariates than the bundle": renderer.covariates != bundle.covariates,
        "it was trained with architecture.coarse 0, and would lose the contrast of what it renders": (
            not renderer.architecture.coarse
        ),
    }
    for reason, holds in wrong.items():
        if holds:
            raise UserError(
                f"decoder: the renderer of {folder} cannot be used: {reason}; train another, or leave decoder out"
            )
    return renderer.digest


def planned_rules(config: GateConfig, folder: Path, bundle: ModelSpec, labels: LabelTable | None) -> GateRules:
    """What the bundle's gate may refuse. Raises UserError when it has none, or the config does not suit it."""
    from brainsynth.gate.file import load_bundle_gate  # and with it SciPy's image filters: only a dataset with a gate
    from brainsynth.gate.rules import gate_rules

    if GATE_FILE not in bundle.weights:
        raise UserError(
            f"gate: the bundle {folder} has no quality gate; export it again with gate in the config of "
            "brainsynth export-bundle, or leave gate out here"
        )
    continuous = {one.name for one in bundle.covariates.covariates if one.kind == "continuous"}
    other = sorted(set(config.counted) - continuous)
    if other:
        raise UserError(
            f"gate.counted: {', '.join(other)}: not a continuous covariate of the bundle, which has "
            f"{', '.join(sorted(continuous))}"
        )
    return gate_rules(config, load_bundle_gate(folder, bundle), bundle.weights[GATE_FILE], labels)


def covariate_rows(source: CovariateSource, bundle: ModelSpec) -> pd.DataFrame:
    """The validated rows to generate, from a table or drawn from the bundle's distribution."""
    if source.draw is not None:
        if bundle.distribution is None:
            raise UserError(
                f"covariates.draw: the bundle {bundle.name} has no covariate distribution to draw from, because that of its "
                f"training cohort is not known; give covariates.table with the columns {', '.join(bundle.covariates.names)}"
            )
        return bundle.distribution.draw(source.draw, source.draw_seed, source.constraints)
    path = str(source.table)
    table = read_cells(path, "covariates.table")
    if table.empty:
        raise UserError(f"covariates.table: {path} has no rows")
    known = {*bundle.covariates.names, *ROW_COLUMNS, "extrapolated"}
    ignored = [str(name) for name in table.columns if name not in known]
    if ignored:
        log.warning(
            "%s: ignored, as the model does not know them: %s", path, ", ".join(name or "(no name)" for name in ignored)
        )
    return bundle.covariates.validate(table, path, source.allow_extrapolation, keep=ROW_COLUMNS)
