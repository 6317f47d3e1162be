"""Generators: whatever turns rows and seeds into volumes. A bundle is one; a class outside of this package is another.

A class is named `module:Class`, or `generator:NAME` where an installed package has an entry point NAME in the group
`brainsynth.generators`. Naming one runs its code, as importing it does: a name comes from a config or a command, never
from what was read.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from dataclasses import field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import pandas as pd

from brainsynth.bundle.files import bundle_folder, check_bundle_files, read_bundle
from brainsynth.bundle.spec import GATE_FILE, BundleSpec
from brainsynth.covariates.distribution import CovariateDistribution
from brainsynth.covariates.schema import CovariateSchema
from brainsynth.errors import UserError
from brainsynth.labels import LabelTable
from brainsynth.places import is_generator
from brainsynth.records import digest, from_dict, record, to_dict
from brainsynth.volume import VolumeSpec

GROUP = "brainsynth.generators"
_INSTALLED = "generator"
Option = str | int | float | bool
Images = npt.NDArray[np.floating[Any]]
LabelMaps = npt.NDArray[np.uint8]


@record
class GeneratorSpec:
    """What a generator is: its grid and covariates, the terms of its samples, and the digest of all that makes voxels."""

    name: str
    volume: VolumeSpec
    """The grid of its volumes; intensities are in [0, 1]."""
    covariates: CovariateSchema
    licence: str
    """SPDX name or text: the terms under which samples may be used."""
    training_data: str
    """What it was trained on, in a sentence."""
    content: str
    """A digest of weights and code: another one makes another dataset."""
    distribution: CovariateDistribution | None = None
    """From which `covariates.draw` takes rows; without one, rows come from a table."""
    labels: LabelTable | None = None
    """Of a generator that makes label maps, too."""
    weights: dict[str, str] = field(default_factory=dict)
    """`gate.safetensors` and its sha256, where there is a quality gate in the class's `folder`."""
    provenance: dict[str, str | int | float] = field(default_factory=dict)
    """`cohort_fingerprint`: the plan of the prepared cohort that it was trained on, which an audit asks for."""

    def __post_init__(self) -> None:
        if not self.content or not self.name:
            raise ValueError("name and content must not be empty")
        if set(self.weights) - {GATE_FILE}:
            raise ValueError(f"weights may name {GATE_FILE} and nothing else; digests of your own go into content")

    @property
    def digest(self) -> str:
        """sha256 of the record: in a dataset's identity, what a bundle's digest is."""
        return digest(self)

    def extrapolated(self, rows: pd.DataFrame) -> npt.NDArray[np.bool_]:
        """(B,) True for validated rows outside the training support."""
        outside = self.covariates.out_of_range(rows)
        return outside if self.distribution is None else outside | ~self.distribution.in_support(rows)


ModelSpec = BundleSpec | GeneratorSpec


class Generator(Protocol):
    """Three methods. The class is built with the config's `options` as keyword arguments, once in every process."""

    def describe(self) -> ModelSpec:
        """What it is. Cheap: it is called before anything is loaded."""

    def load(self, device: str) -> None:
        """Make ready to sample on a device, by the name that torch gives it: `cpu`, …"""

    def sample(self, rows: pd.DataFrame, seeds: list[int]) -> Images | tuple[Images, LabelMaps]:
        """(B, X, Y, Z) intensities in [0, 1], and label maps if the spec has `labels`; a row's depend on it and its seed."""


def open_generator(name: str, options: dict[str, Option]) -> Generator:
    """Import and build a generator. Raises UserError that says what is missing."""
    module, _, attribute = name.partition(":")
    where = f"bundle: {name}"
    try:
        made = _class(module, attribute, where)(**options)
    except TypeError as error:
        raise UserError(f"{where} cannot be built with the options {options}: {error}") from error
    missing = [method for method in ("describe", "load", "sample") if not callable(getattr(made, method, None))]
    if missing:
        raise UserError(f"{where} has no method {', '.join(missing)}: a generator has describe, load and sample")
    return cast(Generator, made)


def _class(module: str, attribute: str, where: str) -> Any:
    if module == _INSTALLED:
        installed = {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}
        if attribute not in installed:
            raise UserError(
                f"{where}: no installed package has this generator; there are {', '.join(installed) or 'none'}"
            )
        return installed[attribute].load()
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0] and error.name != module:
            raise UserError(f"{where} needs {error.name}, which is not installed") from error
        raise UserError(
            f"{where}: there is no module {module}; install it, or add its folder to PYTHONPATH (for a bundle in a folder "
            f"of this name, write ./{module}:{attribute})"
        ) from None
    except AttributeError:
        raise UserError(f"{where}: the module {module} has no {attribute}") from None


def generator_folder(generator: Generator) -> Path:
    """Where the files are that a generator's `weights` name."""
    return Path(getattr(generator, "folder", "."))


def model_spec(name: str, options: dict[str, Option] | None = None, what: str = "bundle") -> ModelSpec:
    """What a config's `bundle` names, a bundle or a generator, says of itself. Raises UserError."""
    if not is_generator(name):
        return read_bundle(bundle_folder(name, what))
    return described(open_generator(name, options or {}), name)


def described(generator: Generator, name: str) -> ModelSpec:
    """What a generator says of itself. Raises UserError for anything but a spec."""
    spec = generator.describe()
    if not isinstance(spec, GeneratorSpec | BundleSpec):
        raise UserError(f"bundle: {name}: describe() gives a {type(spec).__name__}, not a GeneratorSpec")
    if isinstance(spec, BundleSpec):
        return spec
    with warnings.catch_warnings():  # of values that are judged in the next line
        warnings.simplefilter("ignore")
        return from_dict(GeneratorSpec, to_dict(spec), f"bundle: {name}: describe()")


def check_generator_files(generator: Generator, spec: ModelSpec) -> None:
    """Raises UserError when a file that a generator names is missing or another."""
    if isinstance(spec, GeneratorSpec) and spec.weights:
        check_bundle_files(generator_folder(generator), spec)
