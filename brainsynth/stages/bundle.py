"""Trained runs → bundle: weight files, perhaps a quality gate, and one sealed record; generation needs nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from brainsynth.bundle.files import bundle_folder, check_bundle_files, file_sha256, read_bundle
from brainsynth.bundle.spec import (
    BUNDLE_FILE,
    DECODER_FILE,
    DIFFUSION_FILE,
    GATE_FILE,
    BundleSpec,
    FewStepsSpec,
    StepFidelity,
)
from brainsynth.config.distillation import DistillConfig, StepDistillConfig
from brainsynth.config.gate import GateFitConfig
from brainsynth.config.schema import ExportConfig
from brainsynth.errors import UserError
from brainsynth.models.few_steps import reference_sampler, student_sampler, student_schedule
from brainsynth.records import seal
from brainsynth.storage.filesystem import local_folder
from brainsynth.training.runs import HELD_OUT_FILE, MEASURED, DiffusionRun, DistillRun, StepDistillRun, read_run


def plan_bundle(config: ExportConfig) -> tuple[Path, Path, BundleSpec]:
    """(training folder, bundle folder, record). Raises UserError when the training is not finished or does not match."""
    source = local_folder(config.diffusion, "diffusion")
    spec = dataclasses.replace(
        read_run(source, DiffusionRun, "jobs/train_diffusion.py").bundle,
        name=config.name,
        licence=config.licence,
        training_data=config.training_data,
    )
    check_bundle_files(source, spec)
    if config.weights == "float16":
        rounded = {name: hashlib.sha256(_rounded(source / name)).hexdigest() for name in spec.weights}
        trained = {f"trained_{name.split('.')[0]}_sha256": sha for name, sha in spec.weights.items()}
        spec = dataclasses.replace(spec, weights=rounded, provenance={**spec.provenance, **trained})
    if config.gate is not None:
        gate = {"gate_reference": config.gate.reference, "gate_false_reject_rate": config.gate.false_reject_rate}
        spec = dataclasses.replace(spec, provenance={**spec.provenance, **gate})
    folder = local_folder(config.output, "output")
    if (folder / BUNDLE_FILE).exists():
        if without_gate(read_bundle(folder)).digest != spec.digest:
            raise UserError(f"{folder} holds another bundle; give another output folder")
    else:
        check_empty(folder)
    return source, folder, spec


def without_gate(spec: BundleSpec) -> BundleSpec:
    """A bundle's record before its gate was fitted."""
    return dataclasses.replace(spec, weights={name: sha for name, sha in spec.weights.items() if name != GATE_FILE})


def export_bundle(
    config: ExportConfig, write_gate: Callable[[GateFitConfig, Path, BundleSpec, Path], None]
) -> BundleSpec:
    """Write the bundle, its record last; harmless to repeat.

    Args:
        config: what to export.
        write_gate: fits the quality gate from (its config, training folder, record) and writes it to a path.
    """
    source, folder, spec = plan_bundle(config)
    if (folder / BUNDLE_FILE).exists():
        spec = read_bundle(folder)
        check_bundle_files(folder, spec)
        return spec
    with new_bundle(folder) as temporary:
        for name in spec.weights:
            if config.weights == "float16":
                (temporary / name).write_bytes(_rounded(source / name))
            else:
                shutil.copyfile(source / name, temporary / name)
        if config.gate is not None:
            write_gate(config.gate, source, spec, temporary / GATE_FILE)
            spec = dataclasses.replace(spec, weights={**spec.weights, GATE_FILE: file_sha256(temporary / GATE_FILE)})
        (temporary / BUNDLE_FILE).write_bytes(seal(spec))
    return spec


def _rounded(path: Path) -> bytes:
    """A weights file with its float32 numbers in float16. Raises UserError when one would overflow."""
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float32:
            tensors[name] = tensor.half()
            if not tensors[name].isfinite().all():
                raise UserError(f"weights: {name} of {path} has numbers beyond float16's range; take float32")
    return save(tensors)


@contextlib.contextmanager
def new_bundle(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill, which becomes the bundle when it is whole; after an error nothing is left of it.

    Raises:
        UserError: `folder` is not empty, or a file in the temporary folder is not what its record names.
    """
    check_empty(folder)
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        check_bundle_files(temporary, read_bundle(temporary))
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_empty(folder: Path) -> None:
    """Raises UserError when there is something in the folder."""
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no bundle; give a new output folder")


def without_decoder(spec: BundleSpec) -> BundleSpec:
    """A bundle's record as it was before a distilled decoder joined."""
    weights = {name: sha for name, sha in spec.weights.items() if name != DECODER_FILE}
    provenance = {key: value for key, value in spec.provenance.items() if key not in _DISTILLED}
    return dataclasses.replace(spec, distilled=None, weights=weights, provenance=provenance)


_DISTILLED = ("distilled_from", "distilled_config")


def check_bundle_output(config: DistillConfig | StepDistillConfig, spec: BundleSpec) -> Path:
    """Where the new bundle goes. Raises UserError when something else than it is there already.

    Args:
        config: what is distilled.
        spec: the bundle whose decoder or denoiser it is.
    """
    folder = local_folder(config.bundle_output, "bundle_output")
    if folder in (bundle_folder(config.bundle), local_folder(config.output, "output")):
        raise UserError(f"bundle_output: {folder} is also bundle or output; give another folder")
    if not (folder / BUNDLE_FILE).exists():
        check_empty(folder)
        return folder
    found = read_bundle(folder)
    if isinstance(config, DistillConfig):
        same = without_decoder(found) == without_decoder(spec)
    else:
        same = found.few_steps is not None and found.few_steps.distilled_from == spec.digest
    if not same:
        raise UserError(f"bundle_output: {folder} holds another bundle; give another folder")
    return folder


def _write_distilled(folder: Path, spec: BundleSpec, source: Path, trained: Path, name: str) -> BundleSpec:
    """The new bundle: the file `name` from the training, the others from the bundle `source`; its record last."""
    if (folder / BUNDLE_FILE).exists():
        if read_bundle(folder).digest != spec.digest:
            what = "decoder" if name == DECODER_FILE else "denoiser"
            raise UserError(f"bundle_output: {folder} holds another distilled {what}; give another folder")
        check_bundle_files(folder, spec)
        return spec
    with new_bundle(folder) as temporary:
        for file in spec.weights:
            shutil.copyfile((trained if file == name else source) / file, temporary / file)
        (temporary / BUNDLE_FILE).write_bytes(seal(spec))
    return spec


def export_distilled(config: DistillConfig) -> BundleSpec:
    """The bundle with the finished training's decoder in it, its record last; harmless to repeat."""
    source, trained = bundle_folder(config.bundle), local_folder(config.output, "output")
    old, run = read_bundle(source), read_run(trained, DistillRun, "jobs/distill_decoder.py")
    plain = without_decoder(old)
    spec = dataclasses.replace(
        plain,
        distilled=run.distilled,
        weights={**plain.weights, **run.weights},
        provenance={**plain.provenance, "distilled_from": run.bundle_digest, "distilled_config": run.config_digest},
    )
    return _write_distilled(check_bundle_output(config, old), spec, source, trained, DECODER_FILE)


def export_steps(config: StepDistillConfig, measure: Callable[[Tensor, Tensor], StepFidelity]) -> BundleSpec:
    """The bundle with the finished training's denoiser in place of its own, its record last; harmless to repeat.

    Args:
        config: what was distilled.
        measure: how near latents come to the reference's.
    """
    source, trained = bundle_folder(config.bundle), local_folder(config.output, "output")
    old, run = read_bundle(source), read_run(trained, StepDistillRun, "jobs/distill_steps.py")
    wanted, held_out = config.trajectories, load_file(trained / HELD_OUT_FILE)
    few_steps = FewStepsSpec(
        distilled_from=run.bundle_digest,
        sampler=student_sampler(wanted.sampler, config.evaluations),
        teacher_sampler=wanted.sampler,
        reference_sampler=reference_sampler(wanted.sampler, wanted.reference_steps),
        count=len(held_out["reference"]),
        **{name: measure(held_out[name], held_out["reference"]) for name in MEASURED},
    )
    spec = dataclasses.replace(
        old,
        schedule=student_schedule(old.schedule),
        few_steps=few_steps,
        weights={**old.weights, DIFFUSION_FILE: run.weights[DIFFUSION_FILE]},
        provenance={
            **old.provenance,
            "steps_distilled_from": run.bundle_digest,
            "steps_distilled_config": run.config_digest,
        },
    )
    return _write_distilled(check_bundle_output(config, old), spec, source, trained, DIFFUSION_FILE)
