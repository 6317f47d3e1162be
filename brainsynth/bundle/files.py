"""A bundle on disk: where it is, what it says, and whether its files are the ones that it names. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from brainsynth.bundle.spec import BUNDLE_FILE, BundleSpec
from brainsynth.config.schema import SHIPPED_BUNDLE
from brainsynth.config.training import DecoderChoice
from brainsynth.errors import UserError
from brainsynth.records import unseal
from brainsynth.storage.filesystem import local_folder
from brainsynth.storage.whole_file import file_sha256


def bundle_folder(bundle: str, what: str = "bundle") -> Path:
    """The folder of a bundle: the bundled model by its name, any other by its path.

    Raises UserError as `local_folder` does. A folder of your own that has the shipped bundle's name is `./t1w-2mm`.
    """
    if bundle == SHIPPED_BUNDLE:
        return Path(__file__).parents[1] / "bundled" / bundle
    return local_folder(bundle, what)


def read_bundle(folder: Path) -> BundleSpec:
    """The bundle's record: architectures, covariates, their distribution, grid, terms; of its weights the digests alone.

    Raises UserError when it is missing or damaged.
    """
    try:
        return unseal(BundleSpec, _inside(folder, BUNDLE_FILE).read_bytes(), str(folder / BUNDLE_FILE))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise UserError(
            f"{folder} is not a bundle: {BUNDLE_FILE} is missing; create one with brainsynth export-bundle, "
            f"or name the bundled model, {SHIPPED_BUNDLE}"
        ) from None


def _inside(folder: Path, name: str) -> Path:
    """A file of a bundle. Raises UserError when it is a link that leaves the bundle: a bundle may come from anyone."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path} leads out of the bundle {folder}: copy the file itself into it")
    return path


class HasWeights(Protocol):
    """What names files by their digests."""

    @property
    def weights(self) -> dict[str, str]:
        """File name → sha256."""


def check_bundle_files(folder: Path, spec: HasWeights) -> None:
    """Raises UserError when a weight file is missing or is not the one that the bundle names."""
    for name, sha in spec.weights.items():
        path = _inside(folder, name)
        if not path.is_file():
            raise UserError(f"the bundle {folder} is incomplete: {name} is missing")
        found = file_sha256(path)
        if found != sha:
            raise UserError(
                f"{path} is not the file that the bundle names: its sha256 is {found[:12]}…, bundle.json says {sha[:12]}…; "
                "copy the bundle again"
            )


def check_decoder(folder: Path, spec: BundleSpec, decoder: DecoderChoice) -> None:
    """Raises UserError when the distilled decoder is asked for and the bundle has none."""
    if decoder == "distilled" and spec.distilled is None:
        raise UserError(
            f"decoder: the bundle {folder} has no distilled decoder; make a bundle that has one with "
            "brainsynth distill-decoder, or leave decoder out"
        )
