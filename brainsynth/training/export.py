"""Trained runs → bundle: weight files, perhaps a quality gate, and one sealed record; generation needs nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from brainsynth.bundle import BUNDLE_FILE, GATE_FILE, BundleSpec
from brainsynth.config.gate import GateFitConfig
from brainsynth.config.schema import ExportConfig
from brainsynth.errors import UserError
from brainsynth.models.weights import check_bundle_files, file_sha256, read_bundle
from brainsynth.records import seal
from brainsynth.storage.filesystem import local_folder
from brainsynth.training.runs import DiffusionRun, read_run


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
            shutil.copyfile(source / name, temporary / name)
        if config.gate is not None:
            write_gate(config.gate, source, spec, temporary / GATE_FILE)
            spec = dataclasses.replace(spec, weights={**spec.weights, GATE_FILE: file_sha256(temporary / GATE_FILE)})
        (temporary / BUNDLE_FILE).write_bytes(seal(spec))
    return spec


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
