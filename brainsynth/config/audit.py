"""Knobs of the memorisation audit (`brainsynth audit`); the same rules as in schema.py."""

from __future__ import annotations

from brainsynth.config.schema import RuntimeConfig
from brainsynth.records import record

TRAIN = "train"


@record
class AuditConfig:
    """Does a dataset give away the people that its generator was trained on (`brainsynth audit`)?"""

    dataset: str
    """A generated dataset, or a prepared cohort that stands in for one."""
    reference: str
    """The prepared cohort that the generator was trained on, on the same grid; its validation split calibrates."""
    output: str
    """Folder of the descriptors (a dataset each for `dataset` and `reference`), report.html, audit.json, neighbours.tsv.
    All of it tells of real people: never the dataset's own folder."""
    bundle: str | None = None
    """The bundle that the dataset was generated with: it names its cohort. A generated dataset is not audited without it."""
    false_alarm_rate: float = 0.01
    """Chance that a volume that copies nobody is flagged, at most. 1 % needs 99 scans of different people in `reference`."""
    embedder: str | None = None
    """A second space in addition to the voxels: a safetensors file of the embedder, or `train`: train it on the
    training split."""
    embedder_steps: int = 300
    """Of its training; only with `embedder: train`."""
    same_person: tuple[tuple[str, ...], ...] = ()
    """Groups of subject ids of the reference that are one person (scanned under several ids), or twins."""
    pictures: bool = True
    """Slices of the worst pairs in the page. They show real scans; without them, it holds figures and ids only."""
    runtime: RuntimeConfig = RuntimeConfig()

    def __post_init__(self) -> None:
        if not 0 < self.false_alarm_rate < 1:
            raise ValueError("false_alarm_rate must be between 0 and 1")
        if self.embedder_steps < 1:
            raise ValueError("embedder_steps must be at least 1")
        if any(len(group) < 2 for group in self.same_person):
            raise ValueError("same_person lists groups of at least two ids, such as [[A, B]]")
        named = [name for group in self.same_person for name in group]
        twice = sorted({name for name in named if named.count(name) > 1})
        if twice:
            raise ValueError(f"same_person names {', '.join(twice)} twice; join groups that are one person")
        if self.output.rstrip("/") in (self.dataset.rstrip("/"), self.reference.rstrip("/")):
            raise ValueError("output must be a folder of its own: what an audit writes is not to be published")
