"""Knobs of the networks; the same rules as in schema.py."""

from __future__ import annotations

from typing import Annotated, Literal

from brainsynth.records import left_out_at, of_kind, record, told_apart_by_kind


def _check_size(channels: tuple[int, ...], *counts: int) -> None:
    """A bundle comes from others: what it asks for must be a network, not a way to take all memory."""
    if not 1 <= len(channels) <= 8 or not all(1 <= c <= 4096 for c in channels):
        raise ValueError("channels must be 1 to 8 levels of 1 to 4096 channels")
    if not all(1 <= count <= 64 for count in counts):
        raise ValueError("num_res_blocks, blocks, latent_channels and transformer_layers must be between 1 and 64")


@record
class AutoencoderArchitecture:
    """MONAI `AutoencoderKL`, one channel in and out, no attention (as in the paper)."""

    kind: Annotated[Literal["kl"], left_out_at("kl")] = "kl"
    channels: tuple[int, ...]
    """Per level; each further level halves the grid."""
    latent_channels: int
    num_res_blocks: int = 2
    norm_groups: int = 32

    def __post_init__(self) -> None:
        _check_size(self.channels, self.num_res_blocks, self.latent_channels)
        if any(c % self.norm_groups for c in self.channels):
            raise ValueError(f"channels must be multiples of norm_groups ({self.norm_groups})")

    @property
    def factor(self) -> int:
        """Voxels per latent cell along each axis."""
        return 1 << (len(self.channels) - 1)


@record
class PatchAutoencoderArchitecture:
    """A linear autoencoder of patches with a residual network in its decoder (models/patch_autoencoder.py)."""

    kind: Literal["patch"]
    patch: int
    """Voxels of a patch along each axis; a patch becomes a latent cell."""
    latent_channels: int
    """Principal components that are kept of a patch."""
    width: int
    """Channels of the decoder's residual network."""
    blocks: int
    """Its residual blocks, of two convolutions each."""
    norm_groups: int = 8

    def __post_init__(self) -> None:
        if self.patch not in (2, 4, 8):
            raise ValueError("patch must be 2, 4 or 8")
        if not 1 <= self.latent_channels <= self.patch**3:
            raise ValueError(f"latent_channels must be between 1 and the {self.patch**3} voxels of a patch")
        _check_size((self.width,), self.blocks)
        if self.norm_groups < 1 or self.width % self.norm_groups:
            raise ValueError(f"width must be a multiple of norm_groups ({self.norm_groups})")

    @property
    def factor(self) -> int:
        """Voxels per latent cell along each axis."""
        return self.patch


@record
class UpsamplerArchitecture:
    """One stage of a pyramid's decoder: a local generator that doubles the grid in one step."""

    width: int
    """Channels, all at the coarser of its two grids."""
    blocks: int = 5
    """Each of a 3×3×3 convolution and two 1×1×1, so each lets a cell see one cell further."""
    noise: int = 4
    """Numbers of noise that each coarse cell gets."""

    def __post_init__(self) -> None:
        _check_size((self.width,), self.blocks, self.noise)


@record
class PyramidArchitecture:
    """Latents are the volume, averaged; local generators double its grid stage by stage (models/pyramid.py)."""

    kind: Literal["pyramid"]
    stages: tuple[UpsamplerArchitecture, ...]
    """From the coarsest on; each doubles the grid, so two make 4 voxels of a latent cell along each axis."""
    intensity_scale: float = 1.0
    """Intensities are multiplied by this for the networks, and divided by it again afterwards."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.stages) <= 3:
            raise ValueError("stages must be 1 to 3")
        if not 0.01 <= self.intensity_scale <= 100:
            raise ValueError("intensity_scale must be between 0.01 and 100")

    @property
    def latent_channels(self) -> int:
        """The mean intensity of a cell."""
        return 1

    @property
    def factor(self) -> int:
        """Voxels per latent cell along each axis."""
        return 1 << len(self.stages)


AnyAutoencoderArchitecture = Annotated[
    Annotated[AutoencoderArchitecture, of_kind("kl")]
    | Annotated[PatchAutoencoderArchitecture, of_kind("patch")]
    | Annotated[PyramidArchitecture, of_kind("pyramid")],
    told_apart_by_kind("kl", ("kl", "patch", "pyramid")),
]
"""Chosen by the key `kind`; without it the paper's."""


@record
class DiffusionArchitecture:
    """MONAI `DiffusionModelUNet`, covariates by concatenation and by cross-attention (as in the paper)."""

    kind: Annotated[Literal["unet"], left_out_at("unet")] = "unet"
    channels: tuple[int, ...]
    attention: tuple[bool, ...]
    """Per level: transformer blocks with self-attention and cross-attention to the covariates."""
    head_channels: int
    """Channels of each attention head; 0: one head a level, as wide as the level (the paper's layout)."""
    num_res_blocks: int = 2
    norm_groups: int = 32
    resblock_updown: bool = False
    transformer_layers: int = 1
    upcast_attention: bool = False

    def __post_init__(self) -> None:
        _check_size(self.channels, self.num_res_blocks, self.transformer_layers)
        if self.head_channels < 0:
            raise ValueError("head_channels must be at least 1, or 0 for one head a level")
        if len(self.attention) != len(self.channels) or not any(self.attention):
            raise ValueError("attention needs one flag per level, and at least one true")
        if any(c % self.norm_groups for c in self.channels):
            raise ValueError(f"channels must be multiples of norm_groups ({self.norm_groups})")
        if any(c % (self.head_channels or c) for c, a in zip(self.channels, self.attention, strict=True) if a):
            raise ValueError("channels of a level with attention must be multiples of head_channels")

    @property
    def cells_xyz(self) -> tuple[int, int, int]:
        """Along each axis the latent grid must be a multiple of these."""
        return (1 << (len(self.channels) - 1),) * 3


@record
class TransformerArchitecture:
    """Diffusion transformer (2212.09748) on patches of latent cells, covariates and time by adaLN-zero."""

    kind: Literal["transformer"]
    patch_xyz: tuple[int, int, int]
    """Latent cells of a token along each axis; the latent grid must be a multiple. Attention costs tokens squared."""
    width: int
    """Numbers of a token; a multiple of `heads`."""
    depth: int
    """Blocks of self-attention and MLP."""
    heads: int
    mlp_ratio: int = 4
    """Width of the MLP inside a block, in widths of a token."""

    def __post_init__(self) -> None:
        counts = (self.depth, self.heads, self.mlp_ratio, *self.patch_xyz)
        if not 1 <= self.width <= 4096 or not all(1 <= count <= 64 for count in counts):
            raise ValueError("width must be 1 to 4096, depth, heads, mlp_ratio and patch_xyz 1 to 64")
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")

    @property
    def cells_xyz(self) -> tuple[int, int, int]:
        """Along each axis the latent cells must be a multiple of these."""
        return self.patch_xyz


@record
class GaussianArchitecture:
    """A Gaussian model of the latents, fitted in closed form, and a UNet for what it misses (models/gaussian_denoiser.py).

    For `schedule.prediction: flow` with 1000 timesteps.
    """

    kind: Literal["gaussian"]
    rank: int
    """Components that persons share, of the latents' covariance."""
    rank_channels: int
    """The first latent channels, which these components span; the others vary cell by cell."""
    channels: tuple[int, ...]
    """Of the UNet, per level; each further level halves the grid."""
    embedding: int = 128
    """Numbers that time and covariates become."""
    norm_groups: int = 8
    finest_blocks: Annotated[int, left_out_at(1)] = 1
    """Residual blocks at the first level, on the way down and again on the way up; every other level has one each way."""
    crossed: Annotated[str, left_out_at("")] = ""
    """A binary covariate, for instance `cohort`: in the first `rank_channels` channels the mean has other slopes along the
    other covariates in each of its categories."""
    network_until: Annotated[float, left_out_at(1.0)] = 1.0
    """Share of noise, 0 to 1, above which the Gaussian model predicts alone: there a network that learnt from few people may
    do worse than none, and it is not computed."""
    autoguidance: Annotated[float, left_out_at(1.0)] = 1.0
    """Factor, in sampling alone, of what the network adds to the Gaussian's prediction: guidance away from a weaker model
    (2406.02507) that costs nothing here. More than 1 makes folds more coherent, and people more alike."""

    def __post_init__(self) -> None:
        _check_size(self.channels)
        if not 1 <= self.autoguidance <= 4:
            raise ValueError("autoguidance must be 1 to 4")
        if not 1 <= self.finest_blocks <= 16:
            raise ValueError("finest_blocks must be 1 to 16")
        if not 0 < self.network_until <= 1:
            raise ValueError("network_until must be above 0, and at most 1")
        if not 1 <= self.rank <= 512 or not 1 <= self.rank_channels <= 64 or not 1 <= self.embedding <= 4096:
            raise ValueError("rank must be 1 to 512, rank_channels 1 to 64, and embedding 1 to 4096")
        if self.norm_groups < 1 or any(c % self.norm_groups for c in self.channels):
            raise ValueError(f"channels must be multiples of norm_groups ({self.norm_groups})")

    @property
    def cells_xyz(self) -> tuple[int, int, int]:
        """Along each axis the latent grid must be a multiple of these."""
        return (1 << (len(self.channels) - 1),) * 3


DenoiserArchitecture = Annotated[
    Annotated[DiffusionArchitecture, of_kind("unet")]
    | Annotated[TransformerArchitecture, of_kind("transformer")]
    | Annotated[GaussianArchitecture, of_kind("gaussian")],
    told_apart_by_kind("unet", ("unet", "transformer", "gaussian")),
]
"""Chosen by the key `kind`; without it the UNet."""


@record
class DecoderArchitecture:
    """A distilled decoder: residual blocks at the latent grid, then depth to space; no convolution at full resolution.

    Level 0 is the latent grid, and each further level is twice as fine. The last depth to space makes up the rest.
    """

    channels: tuple[int, ...]
    blocks: tuple[int, ...]
    """Residual blocks of two convolutions, per level."""
    norm_groups: int = 8

    def __post_init__(self) -> None:
        if not 1 <= len(self.channels) <= 4 or not all(1 <= c <= 512 for c in self.channels):
            raise ValueError("channels must be 1 to 4 levels of 1 to 512 channels")
        if len(self.blocks) != len(self.channels) or not all(0 <= b <= 16 for b in self.blocks):
            raise ValueError("blocks needs one number per level, between 0 and 16")
        if self.norm_groups < 1 or any(c % self.norm_groups for c in self.channels):
            raise ValueError(f"channels must be multiples of norm_groups ({self.norm_groups})")

    def last_factor(self, factor: int) -> int:
        """By how much the last depth to space refines, for `factor` voxels per latent cell along each axis.

        Raises:
            ValueError: the levels leave nothing for it to do, or more than a factor of 8.
        """
        last = factor >> (len(self.channels) - 1)
        if not 2 <= last <= 8:
            raise ValueError(
                f"a decoder of {len(self.channels)} levels does not fit {factor} voxels per latent cell: the last depth to "
                f"space would refine by {last}, and may by 2 to 8"
            )
        return last


@record
class LabellerArchitecture:
    """A labeller: a U-Net whose first level is a grid of cells of voxels; each further level is twice as coarse."""

    channels: tuple[int, ...]
    """Per level."""
    blocks: tuple[int, ...]
    """Residual blocks of one 3 × 3 × 3 convolution, per level: on the way down and again on the way up; once at the last."""
    cell: int = 2
    """Voxels of a cell along each axis: 2 for a 2 mm grid, 4 for one of 1 mm."""

    def __post_init__(self) -> None:
        _check_size(self.channels, self.cell)
        if len(self.blocks) != len(self.channels) or not all(1 <= b <= 16 for b in self.blocks):
            raise ValueError("blocks needs one number per level, between 1 and 16")
        if self.cell not in (1, 2, 4):
            raise ValueError("cell must be 1, 2 or 4")


@record
class RendererArchitecture:
    """A renderer: one local generator, from the labels of a cell of 2 × 2 × 2 voxels to their intensities."""

    width: int = 64
    """Channels, all at the grid of cells."""
    blocks: int = 5
    """Each of a 3×3×3 convolution and two 1×1×1, so each lets a cell see one cell further."""
    noise: int = 4
    """Numbers of noise that each cell gets. 0: one image of a map, whatever the seed, and no grain that is only noise."""
    intensity_scale: float = 1.0
    """Intensities are multiplied by this for the network, and divided by it again afterwards."""
    coarse: int = 0
    """Voxels along each axis over which an image is averaged that may be given with the label map, for its contrast and its
    bias field. 0: label maps are all that it takes, and no generation can use it as `decoder: rendered`."""
    kept: Annotated[float, left_out_at(0.0)] = 0.0
    """Share of the decoded volume in what `decoder: rendered` makes; the rest is the image of its label map. The average of
    both has folds that the map does not name, and less speckle than the decoded volume."""
    edge: Annotated[float, left_out_at(0.0)] = 0.0
    """Intensity below which a voxel outside every structure is set to 0, as around stripped scans, and with it what such
    voxels cut off from every structure. 0: none is."""

    def __post_init__(self) -> None:
        _check_size((self.width,), self.blocks)
        if not 0 <= self.noise <= 64:
            raise ValueError("noise must be between 0 and 64")
        if self.coarse not in (0, 2, 4, 8):
            raise ValueError("coarse must be 0, 2, 4 or 8")
        if not 0 <= self.kept < 1 or (self.kept and not self.coarse):
            raise ValueError("kept must be at least 0 and below 1, and needs coarse")
        if not 0 <= self.edge < 1:
            raise ValueError("edge must be at least 0 and below 1")
        if not 0.01 <= self.intensity_scale <= 100:
            raise ValueError("intensity_scale must be between 0.01 and 100")
