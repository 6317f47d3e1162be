"""What a finished training leaves behind: averaged weights and a sealed `run.json` that names them."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import nn

from brainsynth.bundle.files import bundle_folder, check_bundle_files, read_bundle
from brainsynth.bundle.labeller import LABELLER
from brainsynth.bundle.renderer import RENDERER, StructureRange
from brainsynth.bundle.spec import (
    AUTOENCODER_FILE,
    BUNDLE_FILE,
    DECODER_FILE,
    DIFFUSION_FILE,
    BundleSpec,
    DistilledSpec,
    LatentSpec,
)
from brainsynth.config.architectures import (
    AnyAutoencoderArchitecture,
    DenoiserArchitecture,
    LabellerArchitecture,
    RendererArchitecture,
)
from brainsynth.config.training import AutoencoderTrainConfig, ScheduleConfig, TrainRuntimeConfig
from brainsynth.covariates.distribution import CovariateDistribution
from brainsynth.covariates.schema import CovariateSchema
from brainsynth.errors import UserError
from brainsynth.labels import LabelTable
from brainsynth.models.weights import save_weights
from brainsynth.plan import Plan
from brainsynth.records import digest, record, seal, to_dict, unseal
from brainsynth.storage.commit import PLAN_KEY
from brainsynth.storage.filesystem import local_folder
from brainsynth.storage.whole_file import file_sha256, replaced
from brainsynth.volume import VolumeSpec

log = logging.getLogger(__name__)
RUN_FILE = "run.json"
T = TypeVar("T")
U = TypeVar("U")


class Finished(NamedTuple):
    """What the record of every training has in common."""

    config_digest: str
    metrics: dict[str, float]
    elapsed_s: float


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
class DenoiserRun:
    """A trained denoiser, and the autoencoder whose latents it was trained on."""

    config_digest: str
    autoencoder: AutoencoderRun
    architecture: DenoiserArchitecture
    schedule: ScheduleConfig
    latents: LatentSpec
    distribution: CovariateDistribution
    """Of the covariates of the training subjects."""
    subjects: int
    steps: int
    weights_sha256: str
    metrics: dict[str, float]
    elapsed_s: float

    @property
    def weights(self) -> dict[str, str]:
        """sha256 by file name."""
        return {**self.autoencoder.weights, DIFFUSION_FILE: self.weights_sha256}


@record
class DiffusionRun:
    """What earlier versions left in place of a DenoiserRun: the bundle but for its name, licence and training data."""

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


@record
class LabellerRun:
    """A trained labeller."""

    config_digest: str
    architecture: LabellerArchitecture
    volume: VolumeSpec
    labels: LabelTable
    cohort_fingerprint: str
    scans: int
    """Of the training split."""
    validation_scans: int
    """On which its metrics were measured."""
    steps: int
    weights_sha256: str
    metrics: dict[str, float]
    elapsed_s: float

    @property
    def weights(self) -> dict[str, str]:
        """sha256 by file name."""
        return {LABELLER.file: self.weights_sha256}


@record
class RendererRun:
    """A trained renderer."""

    config_digest: str
    architecture: RendererArchitecture
    volume: VolumeSpec
    labels: LabelTable
    structures: dict[str, StructureRange]
    """How large each is and where, in the label maps of the training split; by the label's key."""
    covariates: CovariateSchema
    cohort_fingerprint: str
    scans: int
    """Of the training split."""
    steps: int
    weights_sha256: str
    metrics: dict[str, float]
    elapsed_s: float

    @property
    def weights(self) -> dict[str, str]:
        """sha256 by file name."""
        return {RENDERER.file: self.weights_sha256}


Run = AutoencoderRun | DenoiserRun | DiffusionRun | DistillRun | StepDistillRun | LabellerRun | RendererRun


def training_digest(config: Any, data_fingerprint: str) -> str:
    """Identity of a training: its config without circumstance and places, and its data."""
    plain = to_dict(dataclasses.replace(config, runtime=TrainRuntimeConfig(), output=""))
    for place in ("cohort", "latents", "autoencoder", "bundle", "bundle_output", "start_from", "denoiser_follows"):
        plain.pop(place, None)
    return digest({"config": plain, "data": data_fingerprint})


def read_run(folder: Path, cls: type[T], job: str, older: tuple[type[U], ...] = ()) -> T | U:
    """A finished run's record, or one that an earlier version left.

    Raises UserError when the run is missing, unfinished or damaged; its message names `job`, which makes one.
    """
    path = folder / RUN_FILE
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} holds no finished training: {RUN_FILE} is missing; run `brainsynth {job}` (again)"
        ) from None
    for other in older:
        with contextlib.suppress(UserError):
            return unseal(other, data, str(path))
    return unseal(cls, data, str(path))


def training_folder(output: str) -> Path:
    """The folder of a training's output. Raises UserError where it is that of a dataset or a bundle."""
    folder = local_folder(output, "output")
    for file, what in ((PLAN_KEY, "dataset"), (BUNDLE_FILE, "bundle")):
        if (folder / file).is_file():
            raise UserError(f"output: {folder} is the folder of a {what} ({file}); give another output folder")
    return folder


def finished(folder: Path, config_digest: str, cls: type[Run], older: tuple[type[Run], ...] = ()) -> bool:
    """Whether this very training is finished and its weights are whole. Raises UserError if another one is."""
    if not (folder / RUN_FILE).is_file():
        return False
    run = read_run(folder, cls, "train", older)
    if run.config_digest != config_digest:
        raise UserError(
            f"{folder} holds a finished training with another config or cohort; give another output folder, and to train "
            f"that one further, with more steps for instance, name it in start_from"
        )
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


def write_autoencoder(
    network: nn.Module, folder: Path, config: AutoencoderTrainConfig, cohort: Plan, finished: Finished
) -> AutoencoderRun:
    """Write an autoencoder's weights; returns the record of its training."""
    return AutoencoderRun(
        config_digest=finished.config_digest,
        architecture=config.architecture,
        volume=cohort.volume,
        covariates=cohort.covariates,
        cohort_fingerprint=cohort.fingerprint,
        weights_sha256=write_weights(network, folder / AUTOENCODER_FILE),
        metrics=finished.metrics,
        elapsed_s=finished.elapsed_s,
    )


def copy_weights(source: Path, target: Path) -> None:
    """Copy a weights file whole or not at all."""
    with replaced(target) as temporary:
        shutil.copyfile(source, temporary)


class TrainedAutoencoder(NamedTuple):
    """What latents are made with: a training's autoencoder, or a bundle's."""

    run: AutoencoderRun
    file: Path
    bundle: BundleSpec | None
    """Whose latents keep its shift and scale, so that its denoiser may be trained further on them."""


def trained_autoencoder(autoencoder: str, covariates: CovariateSchema, cohort_fingerprint: str) -> TrainedAutoencoder:
    """The autoencoder in a training's folder, or that of a bundle for this cohort. Raises UserError."""
    folder = bundle_folder(autoencoder, "autoencoder")
    if not (folder / BUNDLE_FILE).is_file():
        run = read_run(folder, AutoencoderRun, "train-autoencoder")
        return TrainedAutoencoder(run, autoencoder_weights(folder, run), None)
    bundle = read_bundle(folder)
    check_bundle_files(folder, bundle)
    if bundle.flipped_axes:
        raise UserError(
            f"autoencoder: {folder} has networks that run against RAS+ (flipped_axes): train one of your own"
        )
    if bundle.covariates != covariates:
        raise UserError(
            f"autoencoder: the bundle {folder} knows other covariates than this cohort; give the cohort those of "
            "bundle.json, with the same order, ranges, scales and descriptions"
        )
    run = AutoencoderRun(
        config_digest=bundle.digest,
        architecture=bundle.autoencoder,
        volume=bundle.volume,
        covariates=covariates,
        cohort_fingerprint=cohort_fingerprint,
        weights_sha256=bundle.weights[AUTOENCODER_FILE],
        metrics={},
        elapsed_s=0.0,
    )
    return TrainedAutoencoder(run, folder / AUTOENCODER_FILE, bundle)


def autoencoder_weights(folder: Path, run: AutoencoderRun) -> Path:
    """The weights file of a finished autoencoder, checked. Raises UserError when it is not the one of the record."""
    path = folder / AUTOENCODER_FILE
    if not path.is_file() or file_sha256(path) != run.weights_sha256:
        raise UserError(f"{path} is missing or is not the file that {RUN_FILE} names; train again or copy it again")
    return path
