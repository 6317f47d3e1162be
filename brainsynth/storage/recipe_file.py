"""A recipe: plan, manifest and bundle of a dataset in one file, from which its volumes are made again.

A zip archive, nothing compressed, without times: equal datasets give equal bytes. `recipe.json` is its last member and names
every other by its sha256; all of them are checked whenever a recipe is opened, before anything in it is read.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from pathlib import Path
from typing import Literal

from brainsynth.errors import UserError
from brainsynth.records import record, seal, unseal
from brainsynth.storage.whole_file import whole

RECIPE_KEY = "recipe.json"
BUNDLE_FOLDER = "bundle"
DATASET_FILES = (
    "plan.json", "samples.parquet", "dataset.json", "participants.tsv", "manifest/subjects.parquet",
    "manifest/shards.parquet", "model.json",
)  # fmt: skip
_BUNDLE_FILE = re.compile(rf"{BUNDLE_FOLDER}/[A-Za-z0-9_][\w.-]*")
MAX_BYTES = 16 << 30
_EPOCH = (1980, 1, 1, 0, 0, 0)


@record
class Recipe:
    """What a recipe holds."""

    schema_version: Literal[1] = 1
    plan_fingerprint: str
    shards_digest: str
    """Of the dataset that it was written from: its objects and voxels."""
    bundle: str
    """The bundle's digest."""
    files: dict[str, str]
    """Member → sha256."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.shards_digest):  # a folder is named after it
            raise ValueError("shards_digest must be a sha256")


def write_recipe(path: Path, recipe: Recipe, members: dict[str, bytes]) -> None:
    """Write the file whole, or nothing. Raises UserError when it cannot be written."""
    with whole(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), members[name])
        archive.writestr(zipfile.ZipInfo(RECIPE_KEY, _EPOCH), seal(recipe))


def read_recipe(path: Path) -> tuple[Recipe, dict[str, bytes]]:
    """The record and the members of a recipe, each with the digest that the record names.

    Raises UserError for anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            if sum(info.file_size for info in infos) > MAX_BYTES or any(
                info.compress_type != zipfile.ZIP_STORED for info in infos
            ):
                raise UserError(f"{path} is not a recipe: its members are compressed, or too large")
            members = {info.filename: archive.read(info) for info in infos}
    except FileNotFoundError:
        raise UserError(f"there is no recipe at {path}") from None
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise UserError(f"{path} is not a recipe, or is damaged: {error}; copy it again") from None
    try:
        recipe = unseal(Recipe, members.pop(RECIPE_KEY), f"{path}: {RECIPE_KEY}")
    except KeyError:
        raise UserError(f"{path} is not a recipe: {RECIPE_KEY} is missing in it") from None
    foreign = sorted(n for n in members if n not in DATASET_FILES and not _BUNDLE_FILE.fullmatch(n))
    if foreign or len(infos) != len(members) + 1:
        raise UserError(
            f"{path} is refused: it holds {', '.join(foreign[:3]) or 'a member twice'}, which no recipe does"
        )
    found = {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}
    wrong = sorted(name for name in {*found, *recipe.files} if found.get(name) != recipe.files.get(name))
    if wrong:
        raise UserError(f"{path} is damaged, or was changed: {', '.join(wrong[:3])} is not what {RECIPE_KEY} names")
    return recipe, members
