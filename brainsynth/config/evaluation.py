"""Knobs of the jobs that judge datasets; the same rules as in schema.py."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated, Literal

from brainsynth.config.schema import RuntimeConfig, SamplerConfig
from brainsynth.config.training import Precision
from brainsynth.records import left_out_at, record


@record
class SegmentationConfig:
    """Which pretrained weights measure the volumes. They are not part of this package."""

    segmenter: str
    """Safetensors file of the 18-structure network."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the network's hidden layers."""


@record
class TableRuler:
    """What another tool measured of every volume: tables of SynthSeg or FreeSurfer, say, one row a volume."""

    dataset: str
    """Table (.csv, .tsv or .parquet) of the dataset's volumes."""
    reference: str
    """Table of the reference's scans, measured by the same tool."""
    columns: tuple[str, ...]
    """Columns that are added up."""
    id_column: str = "sample_id"
    """Names the volume, as the dataset's participants.tsv does; `sub-`, dashes and other signs do not count."""
    unit: str | None = None
    """Unit of the columns: that of the covariate if none; mm3, ml and l are turned into each other."""

    def __post_init__(self) -> None:
        if not self.columns:
            raise ValueError("columns: name at least one")


@record
class UsefulnessConfig:
    """Train on synthetic and test on real, against train on real and test on real: one budget for every training."""

    tasks: tuple[str, ...] = ()
    """Covariates to predict (numbers and two-category ones), `ventricles` to segment, and `structures`: all of the label
    maps that dataset and reference hold. All covariates if none are named, and `ventricles` too where `segmentation` is
    given."""
    steps: int = 300
    batch_size: int = 8
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    seeds: tuple[int, ...] = (0, 1, 2)
    few_fraction: float = 0.25
    """Share of the real training people that the arms with few real data get."""
    volumes: int = 512
    """Largest number of volumes of the dataset, of the training and of the validation split, drawn at random."""
    box_xyz: Annotated[tuple[int, int, int] | None, left_out_at(None)] = None
    """Voxels of a random box of each volume, of which a step that learns to segment sees no more; the whole volume by
    default. Whole volumes are tested."""

    def __post_init__(self) -> None:
        if self.box_xyz is not None and min(self.box_xyz) < 8:
            raise ValueError("box_xyz must be at least 8 voxels along each axis")
        if self.steps < 10 or self.batch_size < 4 or not 0 < self.learning_rate < 1 or not 0 <= self.weight_decay < 1:
            raise ValueError("steps >= 10, batch_size >= 4, 0 < learning_rate < 1 and 0 <= weight_decay < 1 are needed")
        if len(set(self.seeds)) < 2 or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError("seeds must be at least two different numbers >= 0: one alone gives no interval")
        if not 0 < self.few_fraction < 1:
            raise ValueError("few_fraction must be in (0, 1)")
        if self.volumes < self.batch_size or len(set(self.tasks)) != len(self.tasks):
            raise ValueError("volumes must be at least batch_size, and each of tasks named once")


@record
class TwoSampleConfig:
    """Can a small network tell generated volumes from scans? Cross-validated by person; minutes at 4 mm."""

    folds: int = 4
    steps: int = 200
    """Of each of the `2 * folds` trainings."""
    batch_size: int = 8
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    volumes: int = 256
    """Largest number of generated volumes, and of scans, drawn at random."""

    def __post_init__(self) -> None:
        if not 2 <= self.folds <= 20 or self.steps < 10 or self.batch_size < 4 or self.volumes < 2 * self.folds:
            raise ValueError("needed are 2 to 20 folds, steps >= 10, batch_size >= 4 and volumes >= 2 * folds")
        if not 0 < self.learning_rate < 1 or not 0 <= self.weight_decay < 1:
            raise ValueError("needed are 0 < learning_rate < 1 and 0 <= weight_decay < 1")


SEGMENTED = ("ventricles_ml", "lateral_ventricles_ml", "brain_ml")
"""Sums that a segmentation measures."""
VENTRICLES, ALL_STRUCTURES = "ventricles", "structures"
"""The tasks of segmenting those that the segmentation finds, and those of the stored label maps."""


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
    """Is a dataset faithful, and does it obey its labels (`brainsynth evaluate`)."""

    dataset: str
    """A generated dataset, or a prepared cohort that stands in for one."""
    reference: str
    """Prepared cohort of real scans on the same grid: its training split fits and calibrates the rulers, its validation
    split gives their own errors and the real-against-real floor."""
    output: str
    """Folder of the measurements (a dataset each for `dataset` and `reference`) and of report.html and report.json."""
    segmentation: SegmentationConfig | None = None
    """Measures `structures`; without it only what the other rulers see is judged."""
    labeller: str | None = None
    """Folder of a bundle with a labeller, or `t1w-2mm`: it labels the volumes of both sets, and structures are counted."""
    structures: dict[str, str] = field(default_factory=dict)
    """Covariate → ventricles_ml, lateral_ventricles_ml or brain_ml, as the segmentation measures them; or structures that
    the labeller counts, such as `hippocampus` or `3rd ventricle + 4th ventricle`."""
    tables: dict[str, TableRuler] = field(default_factory=dict)
    """Covariate → volumes that another tool measured."""
    functions: dict[str, str] = field(default_factory=dict)
    """Covariate → `package.module:function` of your own: (X, Y, Z) float32 volume in [0, 1] and its (4, 4) affine in, one
    finite number out (of a two-category covariate the probability of the second). It runs your code: SECURITY.md."""
    by: str | None = None
    """A covariate with categories, such as the cohort: adherence, structures and the Fréchet distance are then judged
    within each of them, as a figure of all together can hide one that the model gets wrong."""
    publish: bool = False
    """Store the measurements in the dataset, for `open_dataset(…, measured=True)`; adds one file to it."""
    usefulness: UsefulnessConfig | None = None
    """Also train small networks on the dataset and on real scans, and test both on real scans; minutes at 4 mm."""
    two_sample: TwoSampleConfig | None = None
    """Also train small networks to distinguish the dataset from scans, and scans from scans."""
    pairs: int = 100
    """Random pairs scored by MS-SSIM and 4-G-R-SSIM, in the dataset and in the reference."""
    features: FeatureConfig | None = FeatureConfig()
    """null leaves out what needs a feature network."""
    trajectories: TrajectoryConfig | None = None
    """Needs generation, so only where a bundle is named."""
    runtime: RuntimeConfig = RuntimeConfig()

    def __post_init__(self) -> None:
        wrong = sorted(set(self.structures.values()) - set(SEGMENTED))
        if wrong and self.labeller is None:
            raise ValueError(
                f"structures: {', '.join(wrong)} is none of {', '.join(SEGMENTED)}; others need labeller: name a bundle"
            )
        twice = [n for n in {**self.structures, **self.tables, **self.functions} if self._rulers(n) > 1]
        if twice:
            raise ValueError(f"{', '.join(twice)}: one ruler per covariate, in structures, tables or functions")
        for name, path in self.functions.items():
            if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", path):
                raise ValueError(f"functions: {name}: {path!r} is not of the form package.module:function")
        if self.usefulness is not None and VENTRICLES in self.usefulness.tasks and self.segmentation is None:
            raise ValueError("usefulness.tasks: ventricles need segmentation: name the file of its weights")
        if set(self.structures.values()) & set(SEGMENTED) and self.segmentation is None:
            raise ValueError("structures need segmentation: name the file of its weights")
        if self.pairs < 2:
            raise ValueError("pairs must be at least 2")

    def _rulers(self, covariate: str) -> int:
        return sum(covariate in named for named in (self.structures, self.tables, self.functions))

    @property
    def labels_ventricles(self) -> bool:
        """True when the segmentation's ventricles must be kept, as labels of the usefulness test."""
        tasks = self.usefulness.tasks if self.usefulness is not None else None
        return self.segmentation is not None and tasks is not None and (not tasks or VENTRICLES in tasks)
