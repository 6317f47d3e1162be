"""A bundle's denoiser trained further on another cohort's latents: same whitening, same Gaussian model, own record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from brainsynth.bundle.files import read_bundle
from brainsynth.bundle.spec import DIFFUSION_FILE
from brainsynth.config.schema import EncodeConfig, ExportConfig, PrepareConfig
from brainsynth.config.training import DiffusionTrainConfig
from brainsynth.errors import UserError
from brainsynth.reading.dataset import open_dataset
from brainsynth.stages import encode_latents, export_bundle, prepare_cohort, train_diffusion
from brainsynth.storage.filesystem import open_store
from brainsynth.training.diffusion import DiffusionTask
from brainsynth.training.latents import read_latent_spec
from tests.line import COVARIATES, Line, as_config


@pytest.fixture(scope="module")
def gaussian(line: Line) -> Path:
    """A bundle with a Gaussian denoiser, from the line's latents."""
    train_diffusion.run(as_config(line.diffusion("gaussian", kind="gaussian"), DiffusionTrainConfig, line.root))
    export_bundle.run(as_config(line.bundle("gaussian", "gaussian-bundle"), ExportConfig, line.root))
    return line.root / "gaussian-bundle"


@pytest.fixture(scope="module")
def few(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The line's scans as another cohort: another split."""
    folder = tmp_path_factory.mktemp("few")
    config = line.prepare() | {"output": str(folder / "cohort"), "validation_fraction": 0.1}
    prepare_cohort.run(as_config(config, PrepareConfig, folder))
    return folder


def latents(line: Line, few: Path, bundle: Path, **changes: Any) -> dict[str, Any]:
    places = {"cohort": str(few / "cohort"), "autoencoder": str(bundle), "output": str(few / "latents")}
    return line.latents() | places | changes


def test_a_bundle_is_trained_further(line: Line, gaussian: Path, few: Path) -> None:
    encode_latents.run(as_config(latents(line, few, gaussian), EncodeConfig, few))
    before = read_bundle(gaussian)
    assert read_latent_spec(open_store(str(few / "latents"))) == before.latents
    config = line.diffusion("further", kind="gaussian")
    config |= {"latents": str(few / "latents"), "autoencoder": str(gaussian), "output": str(few / "diffusion")}
    twice = config | {"start_from": str(gaussian), "emphasis": {"age": 1.2}}
    with pytest.raises(UserError, match="emphasis: the Gaussian model of the bundle is kept"):
        train_diffusion.run(as_config(twice, DiffusionTrainConfig, few))
    train_diffusion.run(as_config(config | {"start_from": str(gaussian)}, DiffusionTrainConfig, few))
    export_bundle.run(as_config(line.bundle() | {"diffusion": str(few / "diffusion"), "output": str(few / "bundle")}, ExportConfig, few))  # fmt: skip # noqa: E501
    made = read_bundle(few / "bundle")
    assert made.weights["autoencoder.safetensors"] == before.weights["autoencoder.safetensors"]
    assert made.weights[DIFFUSION_FILE] != before.weights[DIFFUSION_FILE]
    assert made.latents == before.latents
    assert made.provenance["cohort_fingerprint"] == open_dataset(str(few / "cohort")).manifest["plan_fingerprint"]
    old, new = (load_file(folder / DIFFUSION_FILE) for folder in (gaussian, few / "bundle"))
    for name in ("mean_map", "factors", "variance"):
        key = f"gaussian.latents.{name}"
        assert (old[key] == new[key]).all(), "the Gaussian model is the bundle's"
    assert any((old[key] != new[key]).any() for key in old if ".network." in key)


def test_mirror_images_keep_a_mean_of_their_own(
    line: Line, gaussian: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle has no mean of mirror images; with that of scans, its network would learn that brains are symmetric."""
    encode_latents.run(
        as_config(latents(line, few, gaussian, output=str(tmp_path / "latents"), mirror=True), EncodeConfig, tmp_path)
    )
    tasks: list[DiffusionTask] = []
    one_update = DiffusionTask.step
    monkeypatch.setattr(DiffusionTask, "step", lambda task, step: tasks.append(task) or one_update(task, step))
    config = line.diffusion("further", kind="gaussian") | {"latents": str(tmp_path / "latents")}
    config |= {"autoencoder": str(gaussian), "output": str(tmp_path / "diffusion"), "start_from": str(gaussian)}
    train_diffusion.run(as_config(config, DiffusionTrainConfig, tmp_path))
    train, model = tasks[-1].train, tasks[-1].learner.network.gaussian.latents
    assert 2 * train.mirrored.sum() == len(train)
    left = [
        (train.mean[train.mirrored] - model.mean(train.context[train.mirrored], flags)).mean(0).square().mean()
        for flags in (None, torch.ones(len(train) // 2, dtype=torch.bool))
    ]
    assert left[1] < 0.9 * left[0]


def test_what_does_not_fit_the_bundle_is_refused(line: Line, gaussian: Path, few: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="keep the bundle's shift and scale: leave it out"):
        encode_latents.run(as_config(latents(line, few, gaussian, whitening=0.5), EncodeConfig, tmp_path))
    others = {"covariates": [{**c, "high": 99.0} if c["name"] == "age" else c for c in COVARIATES["covariates"]]}
    config = line.prepare() | {"output": str(tmp_path / "cohort"), "covariates": others}
    prepare_cohort.run(as_config(config, PrepareConfig, tmp_path))
    asked = latents(line, few, gaussian, cohort=str(tmp_path / "cohort"), output=str(tmp_path / "latents"))
    with pytest.raises(UserError, match="knows other covariates than this cohort"):
        encode_latents.run(as_config(asked, EncodeConfig, tmp_path))
    assert not (tmp_path / "latents").exists()
