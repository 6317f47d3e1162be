"""Trained runs → bundle: two weight files and one sealed record; generation needs nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

from brainsynth.bundle import BUNDLE_FILE, BundleSpec
from brainsynth.config.schema import ExportConfig
from brainsynth.errors import UserError
from brainsynth.models.weights import check_bundle_files, read_bundle
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
    folder = local_folder(config.output, "output")
    if (folder / BUNDLE_FILE).exists():
        if read_bundle(folder).digest != spec.digest:
            raise UserError(f"{folder} holds another bundle; give another output folder")
    else:
        check_empty(folder)
    return source, folder, spec


def export_bundle(config: ExportConfig) -> BundleSpec:
    """Write the bundle, its record last; harmless to repeat."""
    source, folder, spec = plan_bundle(config)
    if (folder / BUNDLE_FILE).exists():
        check_bundle_files(folder, spec)
        return spec
    with new_bundle(folder) as temporary:
        for name in spec.weights:
            shutil.copyfile(source / name, temporary / name)
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
