"""What is known of a release. Every document is made of this alone, so no two can disagree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from brainsynth.config.release import ReleaseConfig
from brainsynth.manifest import DatasetManifest, ModelRecord
from brainsynth.metrics.finding import Finding
from brainsynth.plan import Plan
from brainsynth.records import record
from brainsynth.version import __version__

if TYPE_CHECKING:
    from brainsynth.bundle.generator import ModelSpec

MARK = "Every image is SYNTHETIC: AI-generated, of no real person. Not for diagnosis."
DIGITAL_SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's term for what a trained model made; schema.org's digitalSourceType takes it."""
PREVIEW_KEY = "preview.parquet"
_LIMITS = (
    "Not for diagnosis, treatment, or any decision about a person.",
    "Not as the only evidence that a method works on people: confirm on real scans.",
    "Labels are what was asked of the model, not what was measured on an image; their error is not zero.",
    "What is rare in the training data is rare or wrong here: findings on small groups do not carry over.",
    "Do not try to infer who was in the training data. The audit passed, which does not prove privacy.",
)


@record
class AuditSummary:
    """Figures of a passed audit; nothing that names a participant."""

    verdict: str
    record_sha256: str
    """Of audit.json, which stays with its owner."""
    volumes: int
    training_people: int
    held_out_people: int
    false_alarm_rate: float
    level: float
    flagged: int
    flagged_expected: float
    outright_copies: int
    membership_auc: float
    membership_control: tuple[float, float]
    membership_p_value: float
    tuples_replayed: int
    training_tuples: int
    brainsynth_version: str


@record
class ReleasedFile:
    """One file of a release."""

    path: str
    size_bytes: int
    sha256: str


@record
class Facts:
    """All of it."""

    config: ReleaseConfig
    plan: Plan
    manifest: DatasetManifest
    model: ModelRecord
    bundle: ModelSpec
    audit: AuditSummary
    verified: str
    """The first line that verify said."""
    extrapolated: int
    began: str
    """UTC, ISO 8601: when the first and the last shard were begun."""
    ended: str
    files: tuple[ReleasedFile, ...]
    """The data and its tables; the documents come later."""
    findings: tuple[Finding, ...] = ()
    """Of an evaluation; empty where there was none."""

    @property
    def limits(self) -> tuple[str, ...]:
        """Of use: those of every release, then its own."""
        return _LIMITS + self.config.limits

    @property
    def licence_url(self) -> str:
        """Page of the licence."""
        return f"https://spdx.org/licenses/{self.config.licence}"

    @property
    def keywords(self) -> tuple[str, ...]:
        """Own ones last."""
        return ("synthetic", "AI-generated", "MRI", "T1w", "brain", "neuroimaging", *self.config.keywords)

    @property
    def citation(self) -> str:
        """One line."""
        names = ", ".join(creator.full_name for creator in self.config.creators)
        where = f"https://doi.org/{self.config.doi}" if self.config.doi else self.config.url
        return f"{names} ({self.config.published[:4]}). {self.config.title}, version {self.config.version}. {where}"

    def file(self, path: str) -> ReleasedFile:
        """By its path."""
        return next(file for file in self.files if file.path == path)

    def people(self) -> list[dict[str, Any]]:
        """Creators, as schema.org has them."""
        out = []
        for creator in self.config.creators:
            person: dict[str, Any] = {"@type": "Organization" if creator.name else "Person", "name": creator.full_name}
            if creator.orcid:
                person["@id"] = f"https://orcid.org/{creator.orcid}"
            if creator.affiliation:
                person["affiliation"] = creator.affiliation
            out.append(person)
        return out


def grid(plan: Plan) -> str:
    """Of the volumes, in words."""
    shape, spacing = "×".join(map(str, plan.volume.shape_xyz)), "×".join(f"{mm:g}" for mm in plan.volume.spacing_mm)
    return f"{shape} voxels at {spacing} mm, axes RAS+"


SOFTWARE = f"brainsynth {__version__}"
