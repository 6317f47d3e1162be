"""Knobs of the jobs that judge datasets; the same rules as in schema.py."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from brainsynth.config.schema import RuntimeConfig, SamplerConfig
from brainsynth.config.training import Precision
from brainsynth.records import record


@record
class SegmentationConfig:
    """Which pretrained weights measure the volumes. They are not part of this package."""

    segmenter: str
    """Safetensors file of the 18-structure network."""
    stripper: str | None = None
    """Safetensors file of the skull stripper, for volumes that show the whole head; none for stripped brains."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the networks' hidden layers."""


@record
class FeatureConfig:
    """Which network turns a volume into the features of Fréchet and kernel distance, precision and recall."""

    medicalnet: str | None = None
    """Weights file of MedicalNet's ResNet-50 (resnet_50_23dataset.pth), the network of published figures."""
    embedder: str | None = None
    """Safetensors file of an embedder. Without either, one is trained on the reference's training split, in the output."""
    steps: int = 300
    """Of that training; minutes on two cores at 4 mm."""

    def __post_init__(self) -> None:
        if self.medicalnet is not None and self.embedder is not None:
            raise ValueError("features: give medicalnet or embedder, not both")
        if self.steps < 1:
            raise ValueError("features.steps must be at least 1")


@record
class TrajectoryConfig:
    """Volumes made for the report: one covariate moves, all others and the noise stay."""

    bundle: str
    """The bundle that made `dataset`."""
    sampler: SamplerConfig
    covariates: tuple[str, ...] = ("age", "ventricular_volume")
    """Continuous covariates to move, one after the other, from their 5 % to their 95 % quantile in training."""
    seeds: int = 3
    """Noises; a row of pictures each."""
    points: int = 5
    """Values of the moving covariate."""
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.points < 2 or not self.covariates:
            raise ValueError("trajectories need covariates, seeds >= 1 and points >= 2")


@record
class EvaluateConfig:
    """Is a dataset faithful, and does it obey its labels (`jobs/evaluate.py`)."""

    dataset: str
    """A generated dataset, or a prepared cohort that stands in for one."""
    reference: str
    """Prepared cohort of real scans on the same grid: its training split fits and calibrates the rulers, its validation
    split gives their own errors and the real-against-real floor."""
    output: str
    """Folder of the measurements (a dataset each for `dataset` and `reference`) and of report.html and report.json."""
    segmentation: SegmentationConfig | None = None
    """Measures `structures`; without it only what the other rulers see is judged."""
    structures: dict[str, str] = field(default_factory=dict)
    """Covariate → ventricles_ml, lateral_ventricles_ml or brain_ml, as the segmentation measures them."""
    pairs: int = 100
    """Random pairs scored by MS-SSIM and 4-G-R-SSIM, in the dataset and in the reference."""
    features: FeatureConfig | None = FeatureConfig()
    """null leaves out what needs a feature network."""
    trajectories: TrajectoryConfig | None = None
    """Needs generation, so only where a bundle is named."""
    runtime: RuntimeConfig = RuntimeConfig()

    def __post_init__(self) -> None:
        known = ("ventricles_ml", "lateral_ventricles_ml", "brain_ml")
        wrong = sorted(set(self.structures.values()) - set(known))
        if wrong:
            raise ValueError(f"structures: {', '.join(wrong)} is none of {', '.join(known)}")
        if self.structures and self.segmentation is None:
            raise ValueError("structures need segmentation: name the file of its weights")
        if self.pairs < 2:
            raise ValueError("pairs must be at least 2")
