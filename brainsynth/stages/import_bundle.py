"""The paper's model as MONAI's model zoo publishes it → a bundle: same weights, our line around them.

The two files are those of `brain_image_synthesis_latent_diffusion_model`. What they do not say (covariates and their
ranges, geometry, noise schedule) is here, from the paper (Pinaya et al. 2022, arXiv 2209.07162) and the zoo's own
`configs/inference.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from brainsynth.bundle.files import check_bundle_files, read_bundle
from brainsynth.bundle.recommended import write_recommended
from brainsynth.bundle.spec import AUTOENCODER_FILE, BUNDLE_FILE, DIFFUSION_FILE, BundleSpec, LatentSpec
from brainsynth.config.architectures import AutoencoderArchitecture, DiffusionArchitecture
from brainsynth.config.schema import RecommendedConfig, SamplerConfig
from brainsynth.config.training import ScheduleConfig
from brainsynth.covariates.distribution import fit_distribution
from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.errors import UserError, problems_error
from brainsynth.models.published_weights import file_digests, read_autoencoder, read_denoiser
from brainsynth.places import user_path
from brainsynth.records import seal
from brainsynth.stages.new_bundle import new_bundle
from brainsynth.storage.cells import read_cells
from brainsynth.storage.filesystem import local_folder
from brainsynth.storage.untrusted import plain_json
from brainsynth.storage.whole_file import file_sha256
from brainsynth.volume import VolumeSpec

MD5 = {AUTOENCODER_FILE: "329e97b3085643ff235f11f049856242", DIFFUSION_FILE: "21c3047556fb671caf0556f1cce6ef22"}
"""Of the published files, as the zoo's large_files.yml lists them; no sha256 is published."""

PAPER = BundleSpec(
    name="brain_image_synthesis_latent_diffusion_model",
    autoencoder=AutoencoderArchitecture(channels=(64, 128, 128, 128), latent_channels=3),
    diffusion=DiffusionArchitecture(
        channels=(256, 512, 768),
        attention=(False, True, True),
        head_channels=0,
        resblock_updown=True,
        upcast_attention=True,
    ),
    schedule=ScheduleConfig(prediction="epsilon", beta_start=0.0015, beta_end=0.0205),
    latents=LatentSpec(shape_cxyz=(3, 20, 28, 20), shift=(0.0,) * 3, scale=(1.0,) * 3),
    covariates=CovariateSchema(
        covariates=(
            Covariate(name="sex", kind="binary", categories=("F", "M"), description="UK Biobank field 31"),
            Covariate(
                name="age", kind="continuous", unit="years", low=44.0, high=82.0, description="UK Biobank field 21003"
            ),
            Covariate(
                name="ventricular_volume",
                kind="continuous",
                unit="ml",
                low=6.99568,
                high=171.375,
                description="ventricular CSF by FSL SIENAX, not normalised for head size: UK Biobank field 25004, in ml",
            ),
            Covariate(
                name="brain_volume",
                kind="continuous",
                unit="ml",
                low=1144.24,
                high=1793.91,
                description="grey and white matter by FSL SIENAX, normalised for head size: UK Biobank field 25009, in ml",
            ),
        ),
        missing="refuse",
    ),
    distribution=None,
    # The network makes LAS volumes. The zoo's first saver cut them to [5:-5, 5:-5, :-15] and gave the rest the affine
    # diag(-1, 1, 1) with translation (96.48149872, -141.47715759, -156.55375671). Here the same voxels keep the same
    # places, uncut and in RAS+: x starts at 96.48149872 + 5 - 159, y at -141.47715759 - 5.
    volume=VolumeSpec(
        shape_xyz=(160, 224, 160), spacing_mm=(1.0, 1.0, 1.0), origin_mm=(-57.51850128, -146.47715759, -156.55375671)
    ),
    flipped_axes=(0,),
    weights=dict.fromkeys(MD5, ""),
    licence="Apache-2.0",
    training_data="T1w head scans of 31,740 UK Biobank participants aged 44 to 82 (application 58292)",
    provenance={
        "citation": "Pinaya et al. 2022, Brain Imaging Generation with Latent Diffusion Models, arXiv 2209.07162",
        "source": "Project-MONAI/model-zoo, brain_image_synthesis_latent_diffusion_model",
    },
)
"""The bundle's record, but for the digests of its weights."""
RECOMMENDED = RecommendedConfig(
    sampler=SamplerConfig(method="unipc", steps=8, first_timestep=980), samples_per_shard=4, micro_batch=1
)
"""As good as the zoo's own loop of 50 steps (docs/samplers.md)."""


def import_bundle(
    autoencoder: str,
    diffusion: str,
    output: str,
    *,
    inference: str | None = None,
    covariates: str | None = None,
    own: tuple[str, str] | None = None,
    origin_mm: tuple[float, float, float] | None = None,
    model: BundleSpec = PAPER,
) -> BundleSpec:
    """Read both weight files and write the bundle, its record last; harmless to repeat.

    Args:
        autoencoder: local path of the autoencoder's file.
        diffusion: local path of the denoiser's file.
        output: the bundle's folder, new.
        inference: the zoo's `configs/inference.json`; refused when it describes another model than `model`.
        covariates: table of people from whose joint distribution rows are drawn; without it rows need a table.
        own: licence and training data of weights that are not the published files; these must have the published md5.
        origin_mm: world coordinates of the first voxel, in place of the published ones.
        model: what the weights are of.

    Raises:
        UserError: a file is missing, damaged, not the published one, or does not fit the model; nothing is written.
    """
    files = {
        AUTOENCODER_FILE: user_path(str(autoencoder), "--autoencoder"),
        DIFFUSION_FILE: user_path(str(diffusion), "--diffusion"),
    }
    for name, path in files.items():
        if not path.is_file():
            raise UserError(f"--{Path(name).stem}: there is no file {path}")
    folder = local_folder(output, "--output")
    if inference is not None:
        _check_inference(user_path(str(inference), "--inference"), model)
    spec = _described(files, model, covariates, own, origin_mm)
    if (folder / BUNDLE_FILE).exists():
        found = read_bundle(folder)
        if dataclasses.replace(spec, weights=found.weights) != found:
            raise UserError(f"{folder} holds another bundle; give another --output")
        check_bundle_files(folder, found)
        return found
    with new_bundle(folder) as temporary:
        save_file(read_autoencoder(files[AUTOENCODER_FILE], spec), temporary / AUTOENCODER_FILE)
        save_file(read_denoiser(files[DIFFUSION_FILE], spec), temporary / DIFFUSION_FILE)
        spec = dataclasses.replace(spec, weights={name: file_sha256(temporary / name) for name in files})
        write_recommended(temporary, RECOMMENDED)
        (temporary / BUNDLE_FILE).write_bytes(seal(spec))
    return spec


def _described(
    files: Mapping[str, Path],
    model: BundleSpec,
    covariates: str | None,
    own: tuple[str, str] | None,
    origin_mm: tuple[float, float, float] | None,
) -> BundleSpec:
    """The record of the bundle, weights' digests aside. Raises UserError when a file is not the published one."""
    digests = {name: file_digests(path) for name, path in files.items()}
    if own is None:
        _check_published(files, {name: found["md5"] for name, found in digests.items()})
    provenance = {
        **model.provenance,
        **{f"{Path(name).stem}_file_{kind}": value for name, found in digests.items() for kind, value in found.items()},
    }
    if own is not None:
        model = dataclasses.replace(model, licence=own[0], training_data=own[1])
        provenance["source"] = "own weights in the architecture of the model zoo's bundle"
    if covariates is not None:
        distribution = fit_distribution(read_cells(covariates, "--covariates"), model.covariates, covariates)
        model = dataclasses.replace(model, distribution=distribution)
    if origin_mm is not None:
        model = dataclasses.replace(model, volume=dataclasses.replace(model.volume, origin_mm=origin_mm))
    return dataclasses.replace(model, provenance=provenance)


def _check_published(files: Mapping[str, Path], found: Mapping[str, str]) -> None:
    problems = []
    for name, path in files.items():
        if found[name] != MD5[name]:
            other = next((Path(n).stem for n, md5 in MD5.items() if md5 == found[name]), None)
            what = f"it is the published file of the {other}" if other else f"its md5 is {found[name]}"
            problems.append(f"--{Path(name).stem} {path}: {what}, want md5 {MD5[name]}")
    if problems:
        problems.append(
            "fetch it again; for weights of your own in this architecture give --licence and --training-data"
        )
        raise problems_error("not the published weights", problems)


def _check_inference(path: Path, model: BundleSpec) -> None:
    """Raises UserError where the zoo's own description, read as plain data, is not that of `model`."""
    try:
        told = plain_json(path.read_bytes(), str(path))
        parts = {part: dict(told[part]) for part in ("autoencoder_def", "diffusion_def", "scheduler")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--inference {path} is not the bundle's configs/inference.json: {error!r}") from None
    problems = [
        f"{part}.{'/'.join(keys)}: the file says {found!r}, these weights need {wanted!r}"
        for part, keys, default, wanted in _expected(model)
        if (found := _plain(next((parts[part][key] for key in keys if key in parts[part]), default))) != wanted
    ]
    if problems:
        raise problems_error(f"--inference {path} describes another model", problems)


def _plain(value: Any) -> Any:
    """`scaled_linear_beta` is MONAI core's name of `scaled_linear`."""
    return value.removesuffix("_beta") if isinstance(value, str) else value


def _expected(model: BundleSpec) -> list[tuple[str, tuple[str, ...], Any, Any]]:
    """(part, key in either package, MONAI's default, wanted value)."""
    a, d, s = model.autoencoder, model.diffusion, model.schedule
    assert isinstance(a, AutoencoderArchitecture)
    assert isinstance(d, DiffusionArchitecture)
    heads = [(d.head_channels or c) if flag else 0 for c, flag in zip(d.channels, d.attention, strict=True)]
    width, context = a.latent_channels, model.covariates.context_size
    return [
        ("autoencoder_def", ("channels", "num_channels"), None, list(a.channels)),
        ("autoencoder_def", ("latent_channels",), 3, width),
        ("autoencoder_def", ("num_res_blocks",), None, a.num_res_blocks),
        ("autoencoder_def", ("norm_num_groups",), 32, a.norm_groups),
        ("autoencoder_def", ("attention_levels",), None, [False] * len(a.channels)),
        ("autoencoder_def", ("with_encoder_nonlocal_attn",), True, False),
        ("autoencoder_def", ("with_decoder_nonlocal_attn",), True, False),
        ("diffusion_def", ("in_channels",), None, width + context),
        ("diffusion_def", ("out_channels",), None, width),
        ("diffusion_def", ("channels", "num_channels"), None, list(d.channels)),
        ("diffusion_def", ("attention_levels",), None, list(d.attention)),
        ("diffusion_def", ("num_head_channels",), 8, heads),
        ("diffusion_def", ("num_res_blocks",), None, d.num_res_blocks),
        ("diffusion_def", ("norm_num_groups",), 32, d.norm_groups),
        ("diffusion_def", ("resblock_updown",), False, d.resblock_updown),
        ("diffusion_def", ("transformer_num_layers",), 1, d.transformer_layers),
        ("diffusion_def", ("cross_attention_dim",), None, context),
        ("scheduler", ("num_train_timesteps",), 1000, s.num_train_timesteps),
        ("scheduler", ("schedule", "beta_schedule"), "linear", "scaled_linear"),
        ("scheduler", ("beta_start",), 1e-4, s.beta_start),
        ("scheduler", ("beta_end",), 2e-2, s.beta_end),
        ("scheduler", ("prediction_type",), "epsilon", s.prediction),
        ("scheduler", ("clip_sample",), True, False),
    ]


def command(arguments: argparse.Namespace) -> int:
    """See `brainsynth import-bundle --help`."""
    own = (arguments.licence, arguments.training_data)
    if (own[0] is None) != (own[1] is None):
        raise UserError("--licence and --training-data describe weights of your own: give both")
    spec = import_bundle(
        arguments.autoencoder,
        arguments.diffusion,
        arguments.output,
        inference=arguments.inference,
        covariates=arguments.covariates,
        own=None if own[0] is None else own,
        origin_mm=None if arguments.origin_mm is None else tuple(arguments.origin_mm),
    )
    print(f"bundle {spec.name}: {arguments.output} (digest {spec.digest[:12]}), licence {spec.licence}")
    return 0
