"""What a release says that no dataset knows by itself (`brainsynth release`); the same rules as in schema.py."""

from __future__ import annotations

import datetime
import re
from dataclasses import field
from typing import Annotated, Literal

from brainsynth.records import left_out_at, record


@record
class Creator:
    """A person, by given and family names, or a group, by its name, who answers for the release."""

    given_names: str = ""
    family_names: str = ""
    name: str = ""
    """Of a group."""
    affiliation: str = ""
    """Of a person."""
    orcid: str = ""
    """Such as 0000-0002-1825-0097."""

    def __post_init__(self) -> None:
        if self.orcid and not re.fullmatch(r"\d{4}-\d{4}-\d{4}-\d{3}[\dX]", self.orcid):
            raise ValueError(f"orcid {self.orcid!r} must look like 0000-0002-1825-0097")
        person = bool(self.given_names.strip() and self.family_names.strip())
        if person == bool(self.name.strip()) or (self.name and self.affiliation):
            raise ValueError("a creator is a person with given_names and family_names, or a group with a name alone")

    @property
    def full_name(self) -> str:
        """As it is read."""
        return self.name or f"{self.given_names} {self.family_names}"


@record
class ReleaseConfig:
    """A generated dataset → a folder to publish (docs/publication.md)."""

    dataset: str
    """A finished generated dataset."""
    bundle: str
    """The bundle that it was made with: the model card tells of it. Its weights are not part of the release."""
    audit: str
    """Output folder of `brainsynth audit` on this dataset; only its figures are published."""
    output: str
    """A new folder."""
    title: str
    description: str
    licence: str
    """SPDX identifier of the dataset's licence, such as CC-BY-4.0."""
    source_terms: str
    """What allows you to publish samples of a model that was trained on this data: the terms, in a sentence."""
    creators: tuple[Creator, ...]
    contact: str
    """E-mail or web address for questions, errors and requests to take data down."""
    published: str
    """Date, YYYY-MM-DD."""
    url: str
    """Where the release will be found."""
    version: str = "1.0.0"
    data: Literal["zarr", "bids"] = "zarr"
    """`zarr`: the dataset, few large files; `bids`: NIfTI in the layout of BIDS, two files a volume or more."""
    doi: str = ""
    keywords: tuple[str, ...] = ()
    intended_use: tuple[str, ...] = field(
        default=(
            "pre-training, augmentation and stress tests of methods for T1-weighted brain MRI",
            "tests of software and pipelines that need brains which belong to nobody",
            "teaching",
        )
    )
    limits: tuple[str, ...] = ()
    """Limits of use in addition to those that every release states."""
    evaluation: Annotated[str, left_out_at("")] = ""
    """Output folder of `brainsynth evaluate` on this dataset: its figures fill the scorecard of the card."""
    preview: Annotated[int, left_out_at(8)] = 8
    """Volumes that preview.parquet holds, the first ones, which `datasets.load_dataset` opens; 0: none."""
    signing_key: Annotated[str, left_out_at("")] = ""
    """PEM file of an Ed25519 private key, by which release.json is signed (docs/publication.md)."""

    def __post_init__(self) -> None:
        needed = ("title", "description", "licence", "source_terms", "contact", "url")
        empty = [name for name in needed if not getattr(self, name).strip()]
        if empty or not self.creators:
            raise ValueError(f"{', '.join(empty) or 'creators'} must not be empty")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", self.licence):
            raise ValueError(f"licence {self.licence!r} must be an SPDX identifier, such as CC-BY-4.0 or CC0-1.0")
        try:
            datetime.date.fromisoformat(self.published)
        except ValueError:
            raise ValueError(f"published {self.published!r} must be a date, YYYY-MM-DD") from None
        if not re.fullmatch(r"\d+\.\d+\.\d+", self.version):
            raise ValueError(f"version {self.version!r} must look like 1.0.0")
        if not re.match(r"https?://", self.url):
            raise ValueError(f"url {self.url!r} must begin with https://")
        if not 0 <= self.preview <= 1000:
            raise ValueError(f"preview {self.preview} must be 0 to 1000")
        if self.doi and not re.fullmatch(r"10\.\d{4,9}/\S+", self.doi):
            raise ValueError(f"doi {self.doi!r} must look like 10.5281/zenodo.123")
