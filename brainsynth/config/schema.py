"""Every knob of every job on one page: strict, frozen, with units in the names.

A config file is complete; nothing is inherited. `runtime` blocks are circumstance (how), everything else is identity
(what): only identity enters a fingerprint.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from brainsynth.config.gate import GateConfig, GateFitConfig
from brainsynth.config.training import DecoderChoice, Precision
from brainsynth.covariates.constraints import Constraint
from brainsynth.covariates.names import folded, refusal, reserved
from brainsynth.covariates.schema import CovariateSchema, did_you_mean
from brainsynth.places import is_generator
from brainsynth.records import left_out_at, record
from brainsynth.volume import StoredCodec, StoredDtype, VolumeSpec

SHIPPED_BUNDLE = "t1w-2mm"
"""Name of the bundled model, in `brainsynth/bundled/`."""

ExportFormat = Literal["nifti", "bids", "ome-zarr", "nifti-zarr", "dicom", "webdataset"]
"""What `brainsynth export --to` writes."""


@record
class RuntimeConfig:
    """How a sharded job runs; recorded, never part of a dataset's identity."""

    workers: int = 2
    """Actors that work side by side; 0 works in this process without Ray."""
    cpus_per_worker: float = 0.5
    """CPUs that Ray reserves for each worker; 0 or a fraction lets several share a core."""
    gpus_per_worker: float = 0.0
    """GPUs of each worker; a fraction lets several share one."""
    micro_batch: int = 4
    """Volumes that go through a network together."""
    threads_per_worker: int = 0
    """CPU threads of each worker; 0: an even share of the CPUs that one machine may use, `cpus_per_worker` on several."""
    exact_rewrites: bool = True
    """Generation runs the networks in a form that is algebraically the same and takes fewer operations; only rounding
    differs, as it does between micro-batches. Recorded with each shard, so that `regenerate` repeats it."""
    progress_every_s: float = 5.0
    """Seconds between two lines that say how far the run is."""
    max_attempts: int = 3
    """A row that fails, or kills its worker, this often is set aside with its reason; the run continues."""
    stall_timeout_s: float = 7200.0
    """When no shard is committed for so long (and for 10 times the longest wait so far) the run shows stacks and resources
    and ends with exit code 75; 0 waits for ever. The first shard may take five minutes longer."""
    wait_for_nodes: bool = False
    """On a cluster that grows: start although not all workers fit yet. Else such a layout is refused."""

    def __post_init__(self) -> None:
        if self.workers < 0 or self.micro_batch < 1 or self.threads_per_worker < 0:
            raise ValueError("workers and threads_per_worker must be at least 0 and micro_batch at least 1")
        if self.max_attempts < 1 or not 0 <= self.stall_timeout_s < float("inf"):
            raise ValueError("max_attempts must be at least 1 and stall_timeout_s at least 0")
        if self.cpus_per_worker < 0 or self.gpus_per_worker < 0:
            raise ValueError("cpus_per_worker and gpus_per_worker cannot be negative")


@record
class PhantomConfig:
    """A procedural cohort whose true volumes are known (`brainsynth make-phantoms`)."""

    output: str
    """The BIDS folder to make."""
    num_subjects: int
    """How many brains, one scan each."""
    seed: int
    """Another number is another cohort."""
    spacing_mm: float
    """Edge of a voxel."""
    shape_xyz: tuple[int, int, int]
    """Voxels along X, Y and Z."""
    labels: bool = False
    """Write each phantom's label map, too: CSF, grey and white matter, ventricles, in `derivatives/phantom`."""
    workers: int = 2
    """Processes that build phantoms side by side; circumstance only, the cohort is the same from any number."""

    def __post_init__(self) -> None:
        if self.workers < 1 or self.num_subjects < 1 or self.seed < 0:
            raise ValueError("workers and num_subjects must be at least 1, and seed at least 0")


@record
class SourceConfig:
    """Where a cohort's scans and covariates come from."""

    path: str
    """A table (.csv, .tsv or .parquet) with one row a scan, or a BIDS folder with participants.tsv."""
    image_column: str = "image"
    """Table only: path of the NIfTI file, relative to the table's folder or absolute."""
    mask_column: str | None = None
    """Table only: label map on the image's grid; voxels where it is 0 become background."""
    label_column: Annotated[str | None, left_out_at(None)] = None
    """Table only: path of the scan's label map, on the scan's grid; the cohort then holds label maps (docs/labels.md)."""
    label_folder: Annotated[str | None, left_out_at(None)] = None
    """BIDS folder only: the derivative with the label maps, `sub-*/[ses-*/]anat/*_dseg.nii[.gz]`; absolute, or relative to
    `path`."""
    label_table: Annotated[str | None, left_out_at(None)] = None
    """The label table: a .tsv with the columns `index` (1 to 254) and `name`, and optionally `abbreviation`, `color` and
    `values` (the integers of the files, where they are others: `3, 1000-1035`); by default `dseg.tsv` of `label_folder`."""
    label_source: Annotated[str, left_out_at("")] = ""
    """What made the label maps, such as `SynthSeg 2.0`; stored with the dataset."""
    subject_column: str = "participant_id"
    """Column that names the person (`sub-01` and `01` are one): scans of one person are never on both sides of the split."""
    session_column: Annotated[str | None, left_out_at(None)] = None
    """Column that tells a person's visits apart, where the table has one row a visit. In a BIDS folder its values are those
    of the ses-* folders; `null`: one row a person, whose visits may be in sub-*_sessions.tsv."""
    assume_orientation: Annotated[str | None, left_out_at(None)] = None
    """Directions of the stored axes of files that do not say how they lie (both form codes 0), such as `RAS` or `LAS`;
    `null`: such a scan is rejected, since left and right would be a guess."""
    columns: dict[str, str] = field(default_factory=dict)
    """Covariate name → column name, where they differ."""
    exclude: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Column name → values, as text; rows that have one of them are rejected with that reason (quality control, for
    instance). `n/a` is an empty cell, too."""

    @property
    def has_labels(self) -> bool:
        """True where scans come with label maps."""
        return self.label_column is not None or self.label_folder is not None

    def __post_init__(self) -> None:
        if self.label_column is not None and self.label_folder is not None:
            raise ValueError("give label_column (a table) or label_folder (a BIDS folder), not both")
        if not self.has_labels and (self.label_table or self.label_source):
            raise ValueError("label_table and label_source need label_column (a table) or label_folder (a BIDS folder)")
        if self.label_column is not None and self.label_table is None:
            raise ValueError("label_column needs label_table: which integer of a label map is which structure")
        axes = self.assume_orientation
        if axes is not None and (
            len(axes) != 3 or any(sum(a in pair for a in axes) != 1 for pair in ("LR", "AP", "IS"))
        ):
            raise ValueError(
                "assume_orientation is three letters, one each of L/R, A/P and I/S: RAS or LAS, for instance"
            )


@record
class PrepareConfig:
    """Real scans → prepared cohort (`brainsynth prepare-cohort`)."""

    source: SourceConfig
    output: str
    """Folder of the prepared cohort."""
    covariates: CovariateSchema
    """Which columns the model learns, with their units and ranges."""
    volume: VolumeSpec
    """The grid that every scan is resampled to."""
    intensity_rule: Literal["robust", "percentiles"] = "robust"
    """`robust`: black is the scan's background, whatever its offset, scale, padding or outliers, and what does not look
    like a T1w scan is rejected (docs/cohort.md). `percentiles`: the rule of cohorts that were made before it had a name."""
    intensity_percentiles: tuple[float, float] = (0.0, 99.8)
    """`robust`: (0, the percentile of the foreground that becomes 1). `percentiles`: [0, 1] is spanned by the low percentile
    of all voxels and the high one of the foreground (voxels above 1 % of the maximum after the low cut)."""
    missing_covariates: Literal["reject", "keep"] = "reject"
    """A scan without some covariate is a reject, or is kept with the value marked as unknown."""
    validation_fraction: float = 0.2
    """Share of subjects (not scans) held out from every training."""
    split_seed: int = 0
    """Another number is another split."""
    samples_per_shard: int = 16
    """Scans in one stored object."""
    center: Literal["world", "foreground"] = "world"
    """`world`: the grid lies where volume.origin_mm says (scans in a common space); `foreground`: each scan is shifted so
    that the centroid of its head, or stripped brain, is the grid's centre (scans in scanner space)."""
    max_file_mib: int = 512
    """A larger image file is rejected unread, and so is one that unpacks to more, at 4 bytes a voxel."""
    reread_changed: bool = False
    """Read scans again that changed on disk since they were prepared; circumstance. Without it they are only named."""
    runtime: RuntimeConfig = RuntimeConfig()

    def __post_init__(self) -> None:
        for name, category in self.covariates.unreadable():
            raise ValueError(
                f"covariate {name!r}: {category!a} cannot be a category: tables read an empty cell and n/a as missing, "
                "and hold no NUL and no half of a surrogate pair; call it 'unknown', for instance"
            )
        low, high = self.intensity_percentiles
        if not 0 <= low < high <= 100:
            raise ValueError("intensity_percentiles must be 0 <= low < high <= 100")
        if low > 0 and self.intensity_rule == "robust":
            raise ValueError(
                "intensity_percentiles: with intensity_rule robust the low one is 0: black is the background"
            )
        if not 0 < self.validation_fraction < 1:
            raise ValueError("validation_fraction must be between 0 and 1")
        if self.samples_per_shard < 1:
            raise ValueError("samples_per_shard must be at least 1")
        taken = reserved(self.covariates.names)
        if taken:
            raise ValueError(refusal(taken))
        strays = [name for name in self.source.columns if name not in self.covariates.names]
        if strays:
            raise ValueError(
                f"source.columns: {strays[0]!a} is not a covariate{did_you_mean(strays[0], self.covariates.names)}; it is "
                "written `covariate: column`"
            )
        look_alikes = folded(self.covariates.names)
        if look_alikes:
            raise ValueError(
                f"covariates: {look_alikes[0]!a} is not written with plain letters (Unicode NFKC): write it so"
            )


@record
class EncodeConfig:
    """Cohort → latents, once (`brainsynth encode-latents`)."""

    cohort: str
    """The prepared cohort."""
    autoencoder: str
    """Output folder of the autoencoder's training, or a bundle (its folder, or `t1w-2mm`): then latents get the bundle's
    shift and scale, so that its denoiser can be trained further on them."""
    output: str
    """Folder of the latents."""
    whitening: Annotated[float, left_out_at(1.0)] = 1.0
    """1: every latent channel gets unit variance; 0: channels keep their proportions; between: their standard deviations
    become s^(1 - whitening). Their mean square is 1 in any case. Below 1, noise hides fine channels before coarse ones."""
    mirror: Annotated[bool, left_out_at(False)] = False
    """Augmentation: every training scan is encoded a second time, mirrored about the plane x = 0 mm."""
    samples_per_shard: int = 64
    """Scans in one stored object."""
    runtime: RuntimeConfig = RuntimeConfig()

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ValueError("samples_per_shard must be at least 1")
        if not 0 <= self.whitening <= 1:
            raise ValueError("whitening must be between 0 and 1")


SAMPLER_OPTIONS: dict[str, tuple[object, tuple[str, ...]]] = {
    "eta": (0.0, ("ddim",)),
    "time_shift": (1.0, ("euler", "heun", "ab2")),
    "last_log_snr": (None, ("dpmpp_2m", "unipc")),
    "first_timestep": (None, ("dpmpp_2m", "unipc")),
}
"""Option of a sampler → the value that stands for none, and the methods that take it."""


@record
class SamplerConfig:
    """How latents are sampled; part of a dataset's identity.

    Good choices (docs/samplers.md): v `unipc` with 8 steps, flow `ab2` with 8, epsilon `unipc` with 8 and
    `first_timestep` 980; `ddpm` with 50 or more where an epsilon network is poor.
    """

    method: Literal["ddpm", "ddim", "dpmpp_2m", "unipc", "euler", "heun", "ab2"]
    """`ddpm`, `ddim`, `dpmpp_2m` and `unipc` for epsilon and v; `euler`, `heun` and `ab2` for flow."""
    steps: int
    """Each costs one evaluation of the network; with `heun` two, but for the last."""
    guidance_scale: float = 1.0
    """1: no guidance; any other costs a second evaluation per guided step."""
    guidance_interval: Annotated[tuple[float, float] | None, left_out_at(None)] = None
    """Guide only while the noise level s/a of x_t = a x_0 + s e lies within (low, high): cheaper, and closer to the data
    (2404.07724). Sampling starts at about 100 and ends near 0; latents have unit variance."""
    eta: Annotated[float, left_out_at(0.0)] = 0.0
    """`ddim` only: 0 is deterministic, 1 adds as much noise per step as `ddpm`."""
    time_shift: Annotated[float, left_out_at(1.0)] = 1.0
    """Flow only: above 1 spends more of the steps near noise, below 1 near the image. Above 1 where few steps leave volumes
    less various than real ones; docs/samplers.md."""
    last_log_snr: Annotated[float | None, left_out_at(None)] = None
    """`dpmpp_2m` and `unipc` only: log(a/s) of the last evaluation, which yields the image; null: 2 and 2.5."""
    first_timestep: Annotated[int | None, left_out_at(None)] = None
    """`dpmpp_2m` and `unipc` only: where sampling begins; null: at the last trained one, 999 of 1000. The zoo's loop of
    50 steps begins at 980: what an epsilon network gets wrong beyond is amplified a hundredfold (docs/samplers.md)."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.guidance_scale < 0:
            raise ValueError("steps must be at least 1 and guidance_scale at least 0")
        if not 0 <= self.eta <= 1:
            raise ValueError("eta must be between 0 and 1")
        if not 0.05 <= self.time_shift <= 20:
            raise ValueError("time_shift must be between 0.05 and 20")
        for name, (unset, methods) in SAMPLER_OPTIONS.items():
            if getattr(self, name) != unset and self.method not in methods:
                raise ValueError(f"{name} is for {', '.join(methods)}")
        if self.last_log_snr is not None and not -2 <= self.last_log_snr <= 10:
            raise ValueError("last_log_snr must be between -2 and 10")
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if not 0 <= low < high:
                raise ValueError("guidance_interval must be (low, high) noise levels with 0 <= low < high")
            if self.guidance_scale == 1:
                raise ValueError("guidance_interval needs a guidance_scale other than 1")


@record
class PreparationConfig:
    """How the scans of a bundle's cohort were prepared (`PrepareConfig`): one more scan is prepared in the same way."""

    intensity_rule: Literal["robust", "percentiles"]
    intensity_percentiles: tuple[float, float]
    center: Literal["world", "foreground"] = "world"


@record
class RecommendedConfig:
    """How a bundle should be sampled, as its model card says; `recommended.json` in the bundle, no part of its digest.

    It is what a user gets who names no sampler; a dataset's identity has the values themselves.
    """

    sampler: SamplerConfig
    gate: GateConfig | None = None
    """Needs the bundle to carry a gate."""
    samples_per_shard: int = 8
    """Volumes in one stored object."""
    micro_batch: int = 2
    """Volumes that go through the network together on a CPU."""
    decoder: Annotated[DecoderChoice, left_out_at("own")] = "own"
    """`rendered` needs the bundle to carry a labeller and a renderer."""
    preparation: Annotated[PreparationConfig | None, left_out_at(None)] = None
    """For `brainsynth vary --scan`."""


@record
class ExportConfig:
    """Trained runs → bundle (`brainsynth export-bundle`)."""

    diffusion: str
    """Output folder of the diffusion training."""
    output: str
    """Folder of the bundle, new."""
    name: str
    """What the model is called, in cards and reports."""
    licence: str
    """SPDX name or text: the terms under which weights and samples may be used; depends on the training data."""
    training_data: str
    """What the weights were trained on, in a sentence, with attribution."""
    autoencoder: Annotated[str | None, left_out_at(None)] = None
    """Output folder of another training of the autoencoder, in place of the one that made the latents. For a pyramid, whose
    latents need no training: its decoder may be trained further while the denoiser is trained."""
    gate: GateFitConfig | None = None
    """Fit a quality gate, which is stored in the bundle; without it no dataset can ask for one."""
    weights: Annotated[Literal["float32", "float16"], left_out_at("float32")] = "float32"
    """How the bundle stores weights: `float16` halves it, with errors of 0.05 % of each weight; the precision of the
    computation does not change."""
    recommended: RecommendedConfig | None = None
    """What `brainsynth generate --count N` uses with this bundle."""
    labeller: Annotated[str | None, left_out_at(None)] = None
    """Output folder of `brainsynth train-labeller`: the bundle gets this labeller, also one that was exported before.
    Datasets may then ask for `labels`. No part of the bundle's digest, as images do not depend on it."""
    renderer: Annotated[str | None, left_out_at(None)] = None
    """Output folder of `brainsynth train-renderer`, likewise: `brainsynth render` then makes images of label maps."""


@record
class CovariateSource:
    """The rows to generate: a table, or a draw from the bundle's covariate distribution."""

    table: str | None = None
    """A table (.csv, .tsv or .parquet) with the model's covariates, and optionally `sample_id` and `noise_seed` (whole
    numbers; rows of one number start from one noise, so that only their covariates differ)."""
    draw: int | None = None
    """How many rows to draw instead."""
    draw_seed: int = 0
    """Another number draws other people."""
    constraints: tuple[Constraint, ...] = ()
    """Only rows that satisfy all of them are drawn."""
    allow_extrapolation: bool = False
    """Take rows outside the training support; they are flagged in the manifest."""

    def __post_init__(self) -> None:
        if (self.table is None) == (self.draw is None):
            raise ValueError("give either table or draw")
        if self.draw is not None and self.draw < 1:
            raise ValueError("draw asks for no rows: it must be at least 1")
        if self.draw_seed < 0:
            raise ValueError("draw_seed must be at least 0")


@record
class SynthesisConfig:
    """How rows become volumes, wherever the rows come from."""

    bundle: str = SHIPPED_BUNDLE
    """Folder of a bundle, or `t1w-2mm`: the bundled one; or a generator, `module:Class` or `generator:NAME`
    (docs/tutorials/other-generators.md)."""
    options: dict[str, str | int | float | bool] = field(default_factory=dict)
    """Keyword arguments of a generator's class; part of a dataset's identity."""
    output: str
    """Folder or URI of the dataset."""
    sampler: SamplerConfig | None = None
    """How a bundle is sampled; a generator of another package has none."""
    base_seed: int = 0
    """With each row's id it makes the row's seed: another number is other brains."""
    precision: Precision = "float32"
    """Of the networks; part of a dataset's identity."""
    samples_per_shard: int = 16
    """Volumes in one stored object, which is the unit of work and of resuming."""
    stored_dtype: StoredDtype = "float16"
    """Of the voxels: `float16` on steps of 2^-11; unsigned integers span [0, 1]."""
    stored_codec: Annotated[StoredCodec, left_out_at("zstd-3")] = "zstd-3"
    """How the voxels are compressed, by Blosc: `lz4` takes a fifth of the CPU time of `zstd-3`, and half as much space
    again; `zstd-1` lies between. The voxels are the same (docs/gpu.md)."""
    decoder: DecoderChoice = "own"
    """The bundle's own; the distilled one where the bundle has it: cheaper and not quite the same images; or `rendered`:
    each decoded volume is labelled, and the bundle's renderer makes it again from its label map (docs/labels.md)."""
    gate: GateConfig | None = None
    """Refuse volumes that fail the bundle's quality gate, and draw them again."""
    labels: Annotated[bool, left_out_at(False)] = False
    """Store each volume's label map, too, by the bundle's labeller (docs/labels.md)."""
    runtime: RuntimeConfig = RuntimeConfig()

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ValueError("samples_per_shard must be at least 1")
        if self.sampler is None and not is_generator(self.bundle):
            raise ValueError("the key sampler is missing: a bundle needs one")


@record
class GenerateConfig(SynthesisConfig):
    """Bundle + covariates → dataset (`brainsynth generate`)."""

    covariates: CovariateSource
