"""What a finished training leaves behind: averaged weights and a sealed `run.json` that names them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from brainsynth.bundle import AUTOENCODER_FILE, BundleSpec
from brainsynth.config.training import AutoencoderArchitecture, TrainRuntimeConfig
from brainsynth.covariates import CovariateSchema
from brainsynth.errors import UserError
from brainsynth.models.weights import file_sha256
from brainsynth.records import digest, record, seal, to_dict, unseal
from brainsynth.volume import VolumeSpec

RUN_FILE = "run.json"
T = TypeVar("T")


@record
class AutoencoderRun:
    """A trained autoencoder."""

    config_digest: str
    architecture: AutoencoderArchitecture
    volume: VolumeSpec
    covariates: CovariateSchema
    cohort_fingerprint: str
    weights_sha256: str
    metrics: dict[str, float]
    elapsed_s: float


@record
class DiffusionRun:
    """A trained denoiser: a bundle in all but name, licence and the statement of its training data."""

    config_digest: str
    bundle: BundleSpec
    metrics: dict[str, float]
    elapsed_s: float


def training_digest(config: Any, data_fingerprint: str) -> str:
    """Identity of a training: its config without circumstance and places, and its data."""
    plain = to_dict(dataclasses.replace(config, runtime=TrainRuntimeConfig(), output=""))
    for place in ("cohort", "latents", "autoencoder"):
        plain.pop(place, None)
    return digest({"config": plain, "data": data_fingerprint})


def read_run(folder: Path, cls: type[T], job: str) -> T:
    """A finished run's record. Raises UserError when the run is missing, unfinished or damaged."""
    path = folder / RUN_FILE
    try:
        return unseal(cls, path.read_bytes(), str(path))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} holds no finished training: {RUN_FILE} is missing; run {job} (again)") from None


def finished(folder: Path, cls: type[T], config_digest: str) -> T | None:
    """The run's record if this very training is already finished. Raises UserError if another one is."""
    if not (folder / RUN_FILE).is_file():
        return None
    run = read_run(folder, cls, "the training")
    if getattr(run, "config_digest", None) != config_digest:
        raise UserError(f"{folder} holds a finished training with another config or cohort; give another output folder")
    return run


def write_run(folder: Path, run: AutoencoderRun | DiffusionRun) -> None:
    """Make a training finished: last write of the run."""
    temporary = folder / f".tmp-{RUN_FILE}"
    temporary.write_bytes(seal(run))
    temporary.rename(folder / RUN_FILE)


def autoencoder_weights(folder: Path, run: AutoencoderRun) -> Path:
    """The weights file of a finished autoencoder, checked. Raises UserError when it is not the one of the record."""
    path = folder / AUTOENCODER_FILE
    if not path.is_file() or file_sha256(path) != run.weights_sha256:
        raise UserError(f"{path} is missing or is not the file that {RUN_FILE} names; train again or copy it again")
    return path
