"""architecture.kind: without it a UNet, as ever; sizes and grids are bounded; a mistake is told where it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from brainsynth.bundle.files import read_bundle
from brainsynth.bundle.spec import BundleSpec, check_latent_grid
from brainsynth.config.architectures import AutoencoderArchitecture, DiffusionArchitecture, TransformerArchitecture
from brainsynth.config.load import load_config
from brainsynth.config.training import DiffusionTrainConfig
from brainsynth.errors import UserError
from brainsynth.records import digest, from_dict, to_dict
from brainsynth.training.runs import training_digest
from brainsynth.volume import VolumeSpec
from tests.security.material import write_bundle

REPO = Path(__file__).parents[2]
UNET = REPO / "configs" / "ixi-4mm" / "4-diffusion.yaml"
TRANSFORMER = {"kind": "transformer", "patch_xyz": [2, 2, 2], "width": 12, "depth": 1, "heads": 2}


def load(folder: Path, **architecture: Any) -> DiffusionTrainConfig:
    config = yaml.safe_load(UNET.read_text())
    config["architecture"] = architecture
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return load_config(path, DiffusionTrainConfig)


def test_a_unet_needs_no_kind_and_keeps_its_digests(tmp_path: Path) -> None:
    config = load_config(UNET, DiffusionTrainConfig)
    assert config.architecture.kind == "unet"
    assert "kind" not in to_dict(config)["architecture"]
    # Of the code before there were kinds: trainings and bundles are found again by these.
    assert training_digest(config, "data") == "4981bd009a6a11ec7b6bd20256062cce7510a53e43a380b8544c4e82356d8957"
    assert digest(config.architecture) == "8aec51942b2b480bab2c8ede11764b90615e1853b79f259c84b16ad32be79db7"
    named = load(tmp_path, kind="unet", **to_dict(config.architecture))
    assert named == config


def test_each_kind_is_read_back_as_itself(tmp_path: Path) -> None:
    config = load(tmp_path, **TRANSFORMER)
    assert isinstance(config.architecture, TransformerArchitecture)
    assert from_dict(DiffusionTrainConfig, to_dict(config), "here") == config
    spec = read_bundle(write_bundle(tmp_path / "bundle"))
    assert isinstance(spec.diffusion, DiffusionArchitecture)
    other = dataclasses.replace(spec, diffusion=config.architecture)
    assert from_dict(BundleSpec, to_dict(other), "here") == other
    assert other.digest != spec.digest


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"kind": "transformr"}, ":1: architecture: kind: Input should be 'unet' or 'transformer'"),
        ({"kind": [1]}, "architecture: kind: Input should be"),
        ({"kind": None}, "architecture: kind: Input should be"),
        ({"wdth": 3}, "architecture.wdth: unknown key; did you mean 'width'?"),
        ({"channels": [8]}, "architecture.channels: unknown key; known keys: kind, patch_xyz, width, depth"),
        ({"patch_xyz": [2, 2]}, "architecture.patch_xyz.2: required key is missing"),
        ({"patch_xyz": [2, 2, 0]}, "patch_xyz 1 to 64"),
        ({"heads": 5}, "width (12) must be a multiple of heads (5)"),
        ({"width": 8192}, "width must be 1 to 4096"),
        ({"depth": 65}, "depth, heads, mlp_ratio and patch_xyz 1 to 64"),
        ({"mlp_ratio": 65}, "depth, heads, mlp_ratio and patch_xyz 1 to 64"),
        ({"heads": 0}, "depth, heads, mlp_ratio and patch_xyz 1 to 64"),
    ],
)
def test_a_wrong_transformer_is_told_in_its_own_words(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, **TRANSFORMER | change)
    assert told in str(caught.value)
    assert "kind=" not in str(caught.value)


def test_the_patch_must_divide_the_latents(tmp_path: Path) -> None:
    volume = VolumeSpec(shape_xyz=(24, 32, 40), spacing_mm=(4.0,) * 3, origin_mm=(0.0,) * 3)
    autoencoder = AutoencoderArchitecture(channels=(8, 8, 8), latent_channels=2, norm_groups=4)

    def patch(*xyz: int) -> TransformerArchitecture:
        return TransformerArchitecture(kind="transformer", patch_xyz=xyz, width=12, depth=1, heads=2)

    assert check_latent_grid(volume, autoencoder, patch(3, 4, 5)) == (2, 6, 8, 10)
    with pytest.raises(UserError, match=r"must be a multiple of \(12, 16, 16\): .* take smaller patches"):
        check_latent_grid(volume, autoencoder, patch(3, 4, 4))
    with pytest.raises(UserError, match="must be a multiple of 16 on every axis"):
        check_latent_grid(volume, autoencoder, patch(4, 4, 4))
    spec = read_bundle(write_bundle(tmp_path / "bundle"))
    with pytest.raises(ValueError, match=r"must be a multiple of \(2, 4, 3\)"):
        dataclasses.replace(spec, diffusion=patch(2, 4, 3))
