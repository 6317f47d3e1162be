"""What a finished training leaves behind: averaged weights and a sealed `run.json` that names them."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from brainsynth.bundle.files import file_sha256
from brainsynth.bundle.spec import AUTOENCODER_FILE, DECODER_FILE, BundleSpec, DistilledSpec
from brainsynth.config.architectures import AnyAutoencoderArchitecture
from brainsynth.config.training import TrainRuntimeConfig
from brainsynth.covariates.schema import CovariateSchema
from brainsynth.errors import UserError
from brainsynth.models.weights import save_weights
from brainsynth.records import digest, record, seal, to_dict, unseal
from brainsynth.storage.whole_file import replaced
from brainsynth.volume import VolumeSpec

log = logging.getLogger(__name__)
RUN_FILE = "run.json"
T = TypeVar("T")


@record
class AutoencoderRun:
    """A trained autoencoder."""

    config_digest: str
    architecture: AnyAutoencoderArchitecture
    volume: VolumeSpec
    covariates: CovariateSchema
    cohort_fingerprint: str
    weights_sha256: str
    metrics: dict[str, float]
    elapsed_s: float

    @property
    def weights(self) -> dict[str, str]:
        """sha256 by file name."""
        return {AUTOENCODER_FILE: self.weights_sha256}


@record
class DiffusionRun:
    """A trained denoiser: a bundle in all but name, licence and the statement of its training data."""

    config_digest: str
    bundle: BundleSpec
    metrics: dict[str, float]
    elapsed_s: float

    @property
    def weights(self) -> dict[str, str]:
        """sha256 by file name."""
        return self.bundle.weights


@record
class DistillRun:
    """A distilled decoder."""

    config_digest: str
    bundle_digest: str
    """Of the bundle whose decoder it was distilled from."""
    distilled: DistilledSpec
    weights_sha256: str
    metrics: dict[str, float]
    elapsed_s: float

    @property
    def weights(self) -> dict[str, str]:
        """sha256 by file name."""
        return {DECODER_FILE: self.weights_sha256}


HELD_OUT_FILE = "held-out.safetensors"
MEASURED = ("student", "teacher", "teacher_in_as_few")
"""What is measured on the latents in that file against its `reference`, as `FewStepsSpec` names it."""


@record
class StepDistillRun:
    """A denoiser distilled for few evaluations."""

    config_digest: str
    bundle_digest: str
    """Of the bundle whose denoiser it was distilled from."""
    weights: dict[str, str]
    """sha256 by file name: of the denoiser, and of the held-out rows' latents."""
    metrics: dict[str, float]
    elapsed_s: float


Run = AutoencoderRun | DiffusionRun | DistillRun | StepDistillRun


def training_digest(config: Any, data_fingerprint: str) -> str:
    """Identity of a training: its config without circumstance and places, and its data."""
    plain = to_dict(dataclasses.replace(config, runtime=TrainRuntimeConfig(), output=""))
    for place in ("cohort", "latents", "autoencoder", "bundle", "bundle_output", "start_from"):
        plain.pop(place, None)
    return digest({"config": plain, "data": data_fingerprint})


def read_run(folder: Path, cls: type[T], job: str) -> T:
    """A finished run's record. Raises UserError when the run is missing, unfinished or damaged."""
    path = folder / RUN_FILE
    try:
        return unseal(cls, path.read_bytes(), str(path))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} holds no finished training: {RUN_FILE} is missing; run {job} (again)") from None


def finished(folder: Path, cls: type[Run], config_digest: str) -> bool:
    """Whether this very training is already finished, and its weights are whole. Raises UserError if another one is."""
    if not (folder / RUN_FILE).is_file():
        return False
    run = read_run(folder, cls, "the training")
    if run.config_digest != config_digest:
        raise UserError(f"{folder} holds a finished training with another config or cohort; give another output folder")
    for name, sha in run.weights.items():
        if not (folder / name).is_file() or file_sha256(folder / name) != sha:
            log.warning("%s is missing or damaged: made again from the newest checkpoint", folder / name)
            return False
    return True


def write_run(folder: Path, run: Run) -> None:
    """Make a training finished: last write of the run."""
    with replaced(folder / RUN_FILE) as temporary:
        temporary.write_bytes(seal(run))


def write_weights(module: nn.Module, path: Path) -> str:
    """Write a module's weights whole or not at all; returns the file's sha256."""
    with replaced(path) as temporary:
        return save_weights(module, temporary)


def copy_weights(source: Path, target: Path) -> None:
    """Copy a weights file whole or not at all."""
    with replaced(target) as temporary:
        shutil.copyfile(source, temporary)


def autoencoder_weights(folder: Path, run: AutoencoderRun) -> Path:
    """The weights file of a finished autoencoder, checked. Raises UserError when it is not the one of the record."""
    path = folder / AUTOENCODER_FILE
    if not path.is_file() or file_sha256(path) != run.weights_sha256:
        raise UserError(f"{path} is missing or is not the file that {RUN_FILE} names; train again or copy it again")
    return path
