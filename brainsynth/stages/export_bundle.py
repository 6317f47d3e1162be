"""Trained runs → bundle: weight files, perhaps a quality gate, and one sealed record; generation needs nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from brainsynth.bundle.files import bundle_folder, check_bundle_files, read_bundle
from brainsynth.bundle.recommended import RECOMMENDED_FILE, write_recommended
from brainsynth.bundle.renderer import COMPANIONS
from brainsynth.bundle.spec import AUTOENCODER_FILE, BUNDLE_FILE, DECODER_FILE, GATE_FILE, BundleSpec
from brainsynth.config.distillation import DistillConfig, StepDistillConfig
from brainsynth.config.schema import ExportConfig
from brainsynth.errors import UserError
from brainsynth.gate.fit import reference_rows, write_gate
from brainsynth.models.sampler_rules import check_bundle_sampler
from brainsynth.records import seal
from brainsynth.stages.companion import AnyPlanned, plan_labeller, plan_renderer
from brainsynth.stages.new_bundle import check_empty, in_float16, new_bundle
from brainsynth.storage.filesystem import local_folder
from brainsynth.storage.whole_file import file_sha256
from brainsynth.training.runs import (
    AutoencoderRun,
    DenoiserRun,
    DiffusionRun,
    autoencoder_weights,
    read_run,
)

log = logging.getLogger(__name__)


def run(config: ExportConfig) -> None:
    """Trained runs → bundle, its record last; harmless to repeat."""
    files, folder, spec = plan_bundle(config)
    companions = _planned_companions(config, folder, spec)
    if (folder / BUNDLE_FILE).exists():
        spec = read_bundle(folder)
        check_bundle_files(folder, spec)
        if config.recommended is not None:  # not part of the digest: it may be improved later
            write_recommended(folder, config.recommended)
        for companion in companions:
            companion.write(folder)
    else:
        spec = _write(config, files, folder, spec, companions)
    log.info("bundle %s: %s (digest %s)", spec.name, config.output, spec.digest[:12])


def describe(config: ExportConfig) -> str:
    """What export-bundle would write."""
    _, folder, spec = plan_bundle(config)
    companions = _planned_companions(config, folder, spec)
    gate = ""
    if config.gate is not None:
        gate = f" and a quality gate fitted on {len(reference_rows(config.gate, spec)[1])} people's {config.gate.reference}"
    names = "".join(f", a {one.kind.name} of {len(one.spec.labels.labels)} structures" for one in companions)
    return f"bundle {spec.name} (digest {spec.digest[:12]}), {len(spec.weights)} weight files{gate}{names} → {folder}"


def plan_bundle(config: ExportConfig) -> tuple[dict[str, Path], Path, BundleSpec]:
    """(weight files, bundle folder, record but for the gate's file). Raises UserError for all that can be refused."""
    source = local_folder(config.diffusion, "diffusion")
    spec = _trained_bundle(config, source)
    check_bundle_files(source, spec)
    files = {name: source / name for name in spec.weights}
    if config.autoencoder is not None:
        spec, files[AUTOENCODER_FILE] = _with_autoencoder(config.autoencoder, spec)
    if config.weights == "float16":
        rounded = {name: hashlib.sha256(in_float16(path)).hexdigest() for name, path in files.items()}
        trained = {f"trained_{name.split('.')[0]}_sha256": sha for name, sha in spec.weights.items()}
        spec = dataclasses.replace(spec, weights=rounded, provenance={**spec.provenance, **trained})
    if config.gate is not None:
        if config.gate.reference == "rendered" and (config.labeller is None or config.renderer is None):
            raise UserError("gate.reference: rendered needs a labeller and a renderer, which the bundle gets with it")
        gate = {"gate_reference": config.gate.reference, "gate_false_reject_rate": config.gate.false_reject_rate}
        spec = dataclasses.replace(spec, provenance={**spec.provenance, **gate})
        reference_rows(config.gate, spec)
    if config.recommended is not None:
        check_bundle_sampler(spec, config.recommended.sampler)
        if config.recommended.gate is not None and config.gate is None:
            raise UserError("recommended.gate: the bundle has no quality gate; add `gate`, or leave it out there")
    folder = local_folder(config.output, "output")
    if not (folder / BUNDLE_FILE).exists():
        check_empty(folder)
    elif _without_gate(read_bundle(folder)).digest != spec.digest:
        raise UserError(f"{folder} holds another bundle; give another output folder")
    return files, folder, spec


def _trained_bundle(config: ExportConfig, source: Path) -> BundleSpec:
    """The record of the bundle with the weights as they were trained."""
    run = read_run(source, DenoiserRun, "train-diffusion", older=(DiffusionRun,))
    if isinstance(run, DiffusionRun):
        return dataclasses.replace(
            run.bundle, name=config.name, licence=config.licence, training_data=config.training_data
        )
    autoencoder = run.autoencoder
    return BundleSpec(
        name=config.name,
        autoencoder=autoencoder.architecture,
        diffusion=run.architecture,
        schedule=run.schedule,
        latents=run.latents,
        covariates=autoencoder.covariates,
        distribution=run.distribution,
        volume=autoencoder.volume,
        weights=run.weights,
        licence=config.licence,
        training_data=config.training_data,
        provenance={
            "autoencoder_config": autoencoder.config_digest,
            "diffusion_config": run.config_digest,
            "cohort_fingerprint": autoencoder.cohort_fingerprint,
            "subjects": run.subjects,
            "steps": run.steps,
            **{f"autoencoder_{name}": value for name, value in autoencoder.metrics.items()},
            **{f"diffusion_{name}": value for name, value in run.metrics.items()},
        },
    )


def _with_autoencoder(autoencoder: str, spec: BundleSpec) -> tuple[BundleSpec, Path]:
    """The record with another training's autoencoder, and its weights. Raises UserError where its latents are others."""
    folder = local_folder(autoencoder, "autoencoder")
    run = read_run(folder, AutoencoderRun, "train-autoencoder")
    path = autoencoder_weights(folder, run)
    kinds, factors = zip(*((a.kind, a.factor) for a in (run.architecture, spec.autoencoder)), strict=True)
    if kinds != ("pyramid", "pyramid") or factors[0] != factors[1]:
        raise UserError(
            f"autoencoder: the latents that the denoiser was trained on are not those of {folder}; only a pyramid may take "
            "the place of another one with as many stages"
        )
    if (run.volume, run.covariates) != (spec.volume, spec.covariates):
        raise UserError(f"autoencoder: {folder} was trained on another grid or other covariates than the denoiser")
    kept = {name: value for name, value in spec.provenance.items() if not name.startswith("autoencoder_")}
    measured = {f"autoencoder_{name}": value for name, value in run.metrics.items()}
    return dataclasses.replace(
        spec,
        autoencoder=run.architecture,
        weights={**spec.weights, AUTOENCODER_FILE: run.weights_sha256},
        provenance={**kept, "autoencoder_config": run.config_digest, **measured},
    ), path


def _without_gate(spec: BundleSpec) -> BundleSpec:
    """A bundle's record before its gate was fitted."""
    return dataclasses.replace(spec, weights={name: sha for name, sha in spec.weights.items() if name != GATE_FILE})


def _write(
    config: ExportConfig,
    files: dict[str, Path],
    folder: Path,
    spec: BundleSpec,
    companions: list[AnyPlanned],
) -> BundleSpec:
    with new_bundle(folder) as temporary:
        for name, path in files.items():
            if config.weights == "float16":
                (temporary / name).write_bytes(in_float16(path))
            else:
                shutil.copyfile(path, temporary / name)
        for companion in companions:
            companion.write(temporary)
        if config.gate is not None:
            write_gate(config.gate, files[AUTOENCODER_FILE], spec, temporary)
            spec = dataclasses.replace(spec, weights={**spec.weights, GATE_FILE: file_sha256(temporary / GATE_FILE)})
        if config.recommended is not None:
            write_recommended(temporary, config.recommended)
        (temporary / BUNDLE_FILE).write_bytes(seal(spec))
    return spec


def _planned_companions(config: ExportConfig, folder: Path, spec: BundleSpec) -> list[AnyPlanned]:
    """Of each network that the config names, what the bundle gets."""
    half, planned = config.weights == "float16", list[AnyPlanned]()
    if config.labeller is not None:
        planned.append(plan_labeller(local_folder(config.labeller, "labeller"), folder, spec.volume, half=half))
    if config.renderer is not None:
        planned.append(plan_renderer(local_folder(config.renderer, "renderer"), folder, spec.volume, half=half))
    return planned


def bundle_output(config: DistillConfig | StepDistillConfig, is_same: Callable[[BundleSpec], bool]) -> Path:
    """Where a distilled bundle goes. Raises UserError when anything else than that bundle is there already."""
    folder = local_folder(config.bundle_output, "bundle_output")
    if folder in (bundle_folder(config.bundle), local_folder(config.output, "output")):
        raise UserError(f"bundle_output: {folder} is also bundle or output; give another folder")
    if not (folder / BUNDLE_FILE).exists():
        check_empty(folder)
    elif not is_same(read_bundle(folder)):
        raise UserError(f"bundle_output: {folder} holds another bundle; give another folder")
    return folder


def write_distilled(folder: Path, spec: BundleSpec, source: Path, trained: Path, name: str) -> BundleSpec:
    """The new bundle: the file `name` from the training, the others from the bundle `source`; its record last.

    Returns the record in the folder. What an earlier version measured and wrote there stays.
    """
    if (folder / BUNDLE_FILE).exists():
        there = read_bundle(folder)
        if (there.weights, there.provenance) != (spec.weights, spec.provenance):
            what = "decoder" if name == DECODER_FILE else "denoiser"
            raise UserError(f"bundle_output: {folder} holds another distilled {what}; give another folder")
        check_bundle_files(folder, there)
        return there
    with new_bundle(folder) as temporary:
        for file in spec.weights:
            shutil.copyfile((trained if file == name else source) / file, temporary / file)
        if spec.few_steps is None and (source / RECOMMENDED_FILE).is_file():
            shutil.copyfile(source / RECOMMENDED_FILE, temporary / RECOMMENDED_FILE)
        for companion in COMPANIONS:
            companion.copy(source, temporary)
        (temporary / BUNDLE_FILE).write_bytes(seal(spec))
    return spec
