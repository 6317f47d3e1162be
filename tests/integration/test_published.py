"""The model zoo's weight files → bundle → dataset, on the paper's structure with few channels.

The peer is MONAI core itself: its networks with the arguments of the zoo's inference.json, and its own converter of old
key styles. The full size is proved by benchmarks/published_weights.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
from torch import Tensor, nn

from brainsynth import open_dataset
from brainsynth.bundle.spec import BundleSpec, LatentSpec
from brainsynth.cli import main
from brainsynth.config.architectures import AutoencoderArchitecture
from brainsynth.config.load import load_config
from brainsynth.config.schema import CovariateSource, GenerateConfig, PrepareConfig, RuntimeConfig, SamplerConfig
from brainsynth.config.training import AutoencoderTrainConfig, DiffusionTrainConfig
from brainsynth.errors import UserError
from brainsynth.executors.dataset import make_dataset
from brainsynth.models.autoencoder import build_autoencoder
from brainsynth.models.diffusion import Denoiser
from brainsynth.models.loading import load_models
from brainsynth.models.sampling import draw_noise, sample_latents
from brainsynth.models.schedule import NoiseSchedule
from brainsynth.planning import plan_generation
from brainsynth.stages.import_bundle import PAPER, import_bundle
from brainsynth.stages.regenerate import regenerate
from brainsynth.volume import VolumeSpec

OWN = ("CC0-1.0", "none: random weights")
SMALL = dataclasses.replace(
    PAPER,
    autoencoder=AutoencoderArchitecture(channels=(8, 16, 16, 16), latent_channels=3, norm_groups=8),
    diffusion=dataclasses.replace(PAPER.diffusion, channels=(8, 16, 24), norm_groups=8),
    latents=LatentSpec(shape_cxyz=(3, 4, 8, 4), shift=(0.0,) * 3, scale=(1.0,) * 3),
    volume=VolumeSpec(shape_xyz=(32, 64, 32), spacing_mm=(1.0,) * 3, origin_mm=PAPER.volume.origin_mm),
)
ROWS = pd.DataFrame(
    {"sex": ["F", "M", "F"], "age": [44.0, 60.0, 82.0], "ventricular_volume": [10.0, 40.0, 150.0]}
    | {"brain_volume": [1700.0, 1500.0, 1200.0]}
)


def peers() -> tuple[nn.Module, nn.Module]:
    """MONAI core's networks as the zoo configures them, narrower."""
    common: dict[str, Any] = {"spatial_dims": 3, "num_res_blocks": 2, "norm_num_groups": 8, "norm_eps": 1e-6}
    autoencoder = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=3,
        channels=(8, 16, 16, 16),
        attention_levels=(False,) * 4,
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
        **common,
    )
    unet = DiffusionModelUNet(
        in_channels=7,
        out_channels=3,
        channels=(8, 16, 24),
        attention_levels=(False, True, True),
        resblock_updown=True,
        num_head_channels=(0, 16, 24),
        with_conditioning=True,
        transformer_num_layers=1,
        cross_attention_dim=4,
        upcast_attention=True,
        use_flash_attention=False,
        **common,
    )
    return autoencoder.eval(), unet.eval()


def old_name(key: str) -> str:
    """MONAI core's name → the name in files of the GenerativeModels package."""
    return re.sub(r"\.(attn[12])\.out_proj\.", r".\1.to_out.0.", key.replace(".postconv.", ".conv."))


Files = dict[str, tuple[Path, Path]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """(autoencoder, diffusion) files of both key styles with the same random numbers."""
    folder = tmp_path_factory.mktemp("zoo")
    torch.manual_seed(0)
    made: Files = {style: (folder / f"{style}-a.pt", folder / f"{style}-d.pt") for style in ("old", "core")}
    for index, network in enumerate(peers()):
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)
        state = network.state_dict()
        torch.save(state, made["core"][index])
        torch.save({old_name(key): tensor for key, tensor in state.items()}, made["old"][index])
    return made


@pytest.fixture(scope="module")
def bundle(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "small"
    import_small(files["old"], folder)
    return folder


def import_small(pair: tuple[Path, Path], folder: Path, **options: Any) -> BundleSpec:
    return import_bundle(str(pair[0]), str(pair[1]), str(folder), own=OWN, model=SMALL, **options)


def peers_with(pair: tuple[Path, Path]) -> tuple[nn.Module, nn.Module]:
    networks = peers()
    for network, path in zip(networks, pair, strict=True):
        network.load_old_state_dict(torch.load(path, weights_only=True))
        network.requires_grad_(False)
    return networks


@pytest.mark.parametrize(
    ("what", "count", "listing"),
    [
        ("autoencoder", 162, "1c24d3d957fb08874825e718d92f14fb32a5206b86167ae47623af9c74ad1e6c"),
        ("diffusion", 528, "f81f207bb581a0874793a7b839f9ffb2eade19ffa3ced1e26cff070166386427"),
    ],
)
def test_old_names_are_those_that_the_published_classes_write(what: str, count: int, listing: str) -> None:
    """`listing` is the sha256 of keys and shapes that monai-generative 0.2.3 gives its networks at the paper's size."""
    with torch.device("meta"):
        network = (
            build_autoencoder(PAPER.autoencoder) if what == "autoencoder" else Denoiser(PAPER.diffusion, 3, 4).unet
        )
    lines = sorted(f"{old_name(key)} {tuple(tensor.shape)}" for key, tensor in network.state_dict().items())
    assert len(lines) == count
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == listing


def test_the_record_is_that_of_the_papers_configs() -> None:
    folder = Path(__file__).parents[2] / "configs" / "paper"
    autoencoder = load_config(folder / "autoencoder.yaml", AutoencoderTrainConfig)
    diffusion = load_config(folder / "diffusion.yaml", DiffusionTrainConfig)
    covariates = load_config(folder / "cohort.yaml", PrepareConfig).covariates
    assert PAPER.autoencoder == autoencoder.architecture
    assert PAPER.diffusion == diffusion.architecture
    assert PAPER.schedule == diffusion.schedule
    ranges = [
        [(c.name, c.unit, c.low, c.high, c.categories) for c in s.covariates] for s in (PAPER.covariates, covariates)
    ]
    assert ranges[0] == ranges[1]


def test_encoding_is_the_papers() -> None:
    """Min-max to [0, 1] in the order sex, age, ventricles, brain; ranges in mm³ as published, tables in ml."""
    rng = np.random.default_rng(0)
    sex, age = rng.integers(0, 2, 5000), rng.uniform(44, 82, 5000)
    ventricles, brain = rng.uniform(6995.68, 171375.0, 5000), rng.uniform(1144240.0, 1793910.0, 5000)
    table = pd.DataFrame(
        {"sex": np.array(["F", "M"])[sex], "age": age}
        | {"ventricular_volume": ventricles / 1000, "brain_volume": brain / 1000}
    )
    ages, volumes = (age - 44) / (82 - 44), (ventricles - 6995.68) / (171375.0 - 6995.68)
    wanted = np.stack([sex, ages, volumes, (brain - 1144240.0) / (1793910.0 - 1144240.0)], axis=1).astype(np.float32)
    assert np.array_equal(PAPER.covariates.encode(PAPER.covariates.validate(table, "test")), wanted)
    beyond = ROWS.assign(ventricular_volume=6.99568 + 1.9 * (171.375 - 6.99568))
    checked = PAPER.covariates.validate(beyond, "test", allow_out_of_range=True)
    assert PAPER.covariates.encode(checked)[:, 2] == pytest.approx(1.9)  # the paper's Figure 4 asks for it


def test_every_voxel_lies_where_the_zoos_own_saver_put_it() -> None:
    saver = np.array([[-1, 0, 0, 96.48149872], [0, 1, 0, -141.47715759], [0, 0, 1, -156.55375671], [0, 0, 0, 1]])
    network_volume = np.arange(160 * 224 * 160).reshape(160, 224, 160)
    cropped, ours = network_volume[5:-5, 5:-5, :-15], np.flip(network_volume, PAPER.flipped_axes)
    for voxel in ((0, 0, 0), (149, 213, 144), (10, 100, 70)):
        place = saver @ [*voxel, 1]
        x, y, z = np.rint(np.linalg.inv(PAPER.volume.affine) @ place)[:3].astype(int)
        assert ours[x, y, z] == cropped[voxel]
        np.testing.assert_allclose(PAPER.volume.affine @ [x, y, z, 1], place, atol=1e-9)


def test_both_key_styles_give_one_bundle_and_repeating_is_harmless(files: Files, bundle: Path, tmp_path: Path) -> None:
    old, core = import_small(files["old"], bundle), import_small(files["core"], tmp_path / "core")
    assert old.weights == core.weights
    assert old.licence == OWN[0]
    assert old.provenance["autoencoder_file_md5"] == hashlib.md5(files["old"][0].read_bytes()).hexdigest()  # noqa: S324
    with pytest.raises(UserError, match="holds another bundle"):
        import_small(files["core"], bundle)


@pytest.mark.parametrize("rewrites", [False, True])
def test_networks_equal_the_peers(rewrites: bool, files: Files, bundle: Path) -> None:
    peer_autoencoder, peer_unet = peers_with(files["old"])
    spec = import_small(files["old"], bundle)
    autoencoder, denoiser = load_models(bundle, spec, torch.device("cpu"), rewrites=rewrites)
    torch.manual_seed(1)
    z, t, context = torch.randn(2, 3, 4, 8, 4), torch.tensor([979.0, 19.0]), torch.rand(2, 4)
    prediction = ask(peer_unet, z, t, context)
    assert prediction.std() > 0.1
    torch.testing.assert_close(denoiser(z, t, context), prediction, rtol=1e-4, atol=1e-5)
    # in float64 a difference is an error, not a sum in another order; the peer's attention cannot run in it
    autoencoder, peer_autoencoder = autoencoder.double(), peer_autoencoder.double()
    image = peer_autoencoder.decode(z.double())
    assert image.std() > 0.1
    expected = image.clamp(0, 1).flip(2).float()
    torch.testing.assert_close(autoencoder.decode(z.double()), expected, rtol=1e-6, atol=1e-6)
    mean, _ = peer_autoencoder.encode(image)
    torch.testing.assert_close(autoencoder.encode(image.flip(2)), mean, rtol=1e-6, atol=1e-6)


def ask(unet: nn.Module, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """As the zoo's sampler does: covariates as planes and as one token."""
    planes = context[:, :, None, None, None].expand(-1, -1, *z.shape[2:])
    prediction: Tensor = unet(torch.cat([z, planes], dim=1), timesteps=t, context=context[:, None])
    return prediction


def generation(bundle: Path, folder: Path, **changes: Any) -> GenerateConfig:
    table = folder / "rows.csv"
    ROWS.to_csv(table, index=False)
    values: dict[str, Any] = {
        "bundle": str(bundle),
        "output": str(folder / "data"),
        "covariates": CovariateSource(table=str(table)),
        "sampler": SamplerConfig(method="ddim", steps=3),
        "runtime": RuntimeConfig(workers=0, threads_per_worker=1),
    }
    return GenerateConfig(**(values | changes))


def test_a_dataset_keeps_values_and_affine(files: Files, bundle: Path, tmp_path: Path) -> None:
    """The zoo's savers cut the volume, stretch each image to its own extremes, or lose the affine."""
    config = generation(bundle, tmp_path)
    work = plan_generation(config)
    make_dataset(work, config.runtime)
    dataset = open_dataset(config.output)
    autoencoder, unet = peers_with(files["old"])
    context = torch.from_numpy(SMALL.covariates.encode(ROWS))
    noise = draw_noise(work.samples["seed"].tolist(), SMALL.latents.shape_cxyz)
    schedule = NoiseSchedule(SMALL.schedule)
    predict = lambda z, t: ask(unet, z, torch.full((len(z),), t), context)  # noqa: E731
    images = autoencoder.decode(sample_latents(predict, noise, schedule, config.sampler))[:, 0]
    images = images.clamp(0, 1).flip(1).numpy()
    assert 0.01 < (images == 0).mean() < 0.99  # values on both sides of the clip
    for row, image in enumerate(images):
        sample = dataset[row]
        assert np.abs(sample["image"] - image).max() <= SMALL.volume.step
        np.testing.assert_array_equal(sample["affine"], SMALL.volume.affine)
    assert all(found.same_voxels for found in regenerate(config.output, str(bundle), [0, 2]))
    plain = generation(
        bundle,
        tmp_path,
        output=str(tmp_path / "plain"),
        runtime=RuntimeConfig(workers=0, threads_per_worker=1, exact_rewrites=False),
    )
    assert plan_generation(plain).plan.fingerprint == work.plan.fingerprint  # circumstance, not identity
    make_dataset(plan_generation(plain), plain.runtime)
    assert np.abs(open_dataset(plain.output).volumes() - dataset.volumes()).max() <= SMALL.volume.step
    assert all(found.same_voxels for found in regenerate(plain.output, str(bundle), [1]))


def test_rows_are_drawn_only_where_a_distribution_is_known(files: Files, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no covariate distribution.*give covariates\.table"):
        plan_generation(generation(bundle, tmp_path, covariates=CovariateSource(draw=5)))
    rng = np.random.default_rng(0)
    age = rng.uniform(46, 80, 60)
    people = pd.DataFrame({"sex": ["F", "M"] * 30, "age": age, "ventricular_volume": age + rng.normal(0, 5, 60)})
    people.assign(brain_volume=rng.normal(1500, 60, 60)).to_csv(tmp_path / "people.csv", index=False)
    import_small(files["old"], tmp_path / "drawn", covariates=str(tmp_path / "people.csv"))
    work = plan_generation(generation(tmp_path / "drawn", tmp_path, covariates=CovariateSource(draw=5)))
    assert len(work.samples) == 5
    assert not work.samples["extrapolated"].any()


def zoo_description(**scheduler: Any) -> dict[str, Any]:
    """The parts of the zoo's inference.json that describe the model, for SMALL."""
    return {
        "imports": ["$import os"],
        "autoencoder_def": {"_target_": "monai.networks.nets.AutoencoderKL", "spatial_dims": 3, "latent_channels": 3}
        | {"channels": [8, 16, 16, 16], "num_res_blocks": 2, "norm_num_groups": 8, "attention_levels": [False] * 4}
        | {"with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False},
        "diffusion_def": {"in_channels": 7, "out_channels": 3, "num_channels": [8, 16, 24], "num_res_blocks": 2}
        | {"attention_levels": [False, True, True], "norm_num_groups": 8, "resblock_updown": True}
        | {"num_head_channels": [0, 16, 24], "transformer_num_layers": 1, "cross_attention_dim": 4},
        "scheduler": {"beta_start": 0.0015, "beta_end": 0.0205, "num_train_timesteps": 1000, "clip_sample": False}
        | {"schedule": "scaled_linear_beta"}
        | scheduler,
    }


def test_the_zoos_own_description_is_compared(files: Files, tmp_path: Path) -> None:
    described = tmp_path / "inference.json"
    described.write_text(json.dumps(zoo_description()))
    import_small(files["core"], tmp_path / "good", inference=str(described))
    for change, told in (
        (
            {"prediction_type": "v_prediction"},
            "prediction_type: the file says 'v_prediction', these weights need 'epsilon'",
        ),
        ({"beta_end": 0.0195}, "beta_end: the file says 0.0195"),
        ({"schedule": "linear_beta"}, "schedule/beta_schedule: the file says 'linear'"),
    ):
        described.write_text(json.dumps(zoo_description(**change)))
        with pytest.raises(UserError, match=re.escape(told)):
            import_small(files["core"], tmp_path / "bad", inference=str(described))
    described.write_text("{}")
    with pytest.raises(UserError, match=re.escape("is not the bundle's configs/inference.json")):
        import_small(files["core"], tmp_path / "bad", inference=str(described))
    assert not list(tmp_path.glob("*bad*"))


def spoil_missing(state: dict[str, Any]) -> str:
    del state["post_quant_conv.conv.bias"]
    return "post_quant_conv.conv.bias: missing"


def spoil_extra(state: dict[str, Any]) -> str:
    state["loss.weight"] = torch.zeros(1)
    return "loss.weight: unknown"


def spoil_shape(state: dict[str, Any]) -> str:
    state["encoder.blocks.0.conv.weight"] = torch.zeros(8, 2, 3, 3, 3)
    return "shape (8, 2, 3, 3, 3), want (8, 1, 3, 3, 3)"


def spoil_type(state: dict[str, Any]) -> str:
    state["encoder.blocks.0.conv.bias"] = state["encoder.blocks.0.conv.bias"].half()
    return "torch.float16, want torch.float32"


def spoil_value(state: dict[str, Any]) -> str:
    state["encoder.blocks.0.conv.bias"][3] = torch.nan
    return "holds NaN or infinity"


def spoil_style(state: dict[str, Any]) -> str:
    state["decoder.blocks.3.postconv.conv.bias"] = state["decoder.blocks.3.conv.conv.bias"]
    return "given in both key styles"


def spoil_nesting(state: dict[str, Any]) -> str:
    state["optimizer"] = {"step": 1}
    return "not a plain state dict"


def spoil_code(state: dict[str, Any]) -> str:
    state["trap"] = Trap()
    return "nothing in it was executed"


class Trap:
    """Runs code when it is unpickled carelessly."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("the file ran code",))


@pytest.mark.parametrize(
    "spoil",
    [spoil_missing, spoil_extra, spoil_shape, spoil_type, spoil_value, spoil_style, spoil_nesting, spoil_code],
    ids=lambda spoil: spoil.__name__,
)
def test_a_file_that_does_not_fit_is_refused(
    spoil: Any, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(files["old"][0], weights_only=True)
    told = spoil(state)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UserError, match=re.escape(told)):
        import_small((tmp_path / "a.pt", files["old"][1]), tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    assert "ran code" not in capsys.readouterr().out


def command(*arguments: str | Path) -> tuple[int, str]:
    """(exit code, standard error) of `brainsynth import-bundle`."""
    err = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["brainsynth", "import-bundle", *map(str, arguments)]),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as left,
    ):
        main()
    return int(left.value.code or 0), err.getvalue()


def test_mistakes_at_the_command_line(files: Files, tmp_path: Path) -> None:
    a, d = files["old"]
    text = tmp_path / "text.pt"
    text.write_text("not weights")
    cut = tmp_path / "cut.pt"
    cut.write_bytes(a.read_bytes()[:5000])
    own = ("--licence", OWN[0], "--training-data", OWN[1])
    out = tmp_path / "bundle"
    for arguments, told in (
        (("--autoencoder", tmp_path / "no.pt", "--diffusion", d), "--autoencoder: there is no file"),
        (("--autoencoder", a, "--diffusion", d), "not the published weights"),
        (("--autoencoder", a, "--diffusion", d, "--licence", "MIT"), "give both"),
        (("--autoencoder", d, "--diffusion", a, *own), "were the two files swapped?"),
        (("--autoencoder", text, "--diffusion", d, *own), "is damaged or holds more than weights"),
        (("--autoencoder", cut, "--diffusion", d, *own), "is damaged or holds more than weights"),
        (("--autoencoder", a, "--diffusion", d, *own), "want (64, 1, 3, 3, 3)"),  # small files, the paper's size
        (("--autoencoder", a, "--diffusion", d, *own, "--covariates", tmp_path / "no.csv"), "there is no table"),
        (("--autoencoder", a, "--diffusion", d, *own, "--inference", tmp_path / "no.json"), "inference.json"),
    ):
        code, err = command(*arguments, "--output", out)
        assert code == 2, err
        assert told in err
        assert "Traceback" not in err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.pt", "text.pt"]
    out.mkdir()
    (out / "note.txt").write_text("something of the user's")
    code, err = command("--autoencoder", a, "--diffusion", d, *own, "--output", out)
    assert code == 2
    assert "is not empty" in err
    assert (out / "note.txt").exists()
