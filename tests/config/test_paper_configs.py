"""The configs at the paper's size: they load, fit each other, and build networks of exactly the paper's size."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.blocks import SABlock
from torch.utils.flop_counter import FlopCounterMode

from brainsynth.bundle.spec import check_latent_grid
from brainsynth.config.architectures import DenoiserArchitecture, DiffusionArchitecture
from brainsynth.config.distillation import DistillConfig
from brainsynth.config.load import load_config
from brainsynth.config.schema import EncodeConfig, ExportConfig, GenerateConfig, PrepareConfig
from brainsynth.config.training import AutoencoderTrainConfig, DiffusionTrainConfig, ScheduleConfig
from brainsynth.models.autoencoder import build_autoencoder
from brainsynth.models.diffusion import Denoiser
from brainsynth.models.distilled_decoder import DistilledDecoder, decode_flops
from brainsynth.models.sampler_rules import check_sampler

FOLDER = Path(__file__).parents[2] / "configs" / "paper"
CLASSES: dict[str, type[Any]] = {
    "cohort": PrepareConfig,
    "autoencoder": AutoencoderTrainConfig,
    "latents": EncodeConfig,
    "diffusion": DiffusionTrainConfig,
    "diffusion-transformer": DiffusionTrainConfig,
    "bundle": ExportConfig,
    "distill-decoder": DistillConfig,
    "generate": GenerateConfig,
}


@pytest.fixture(scope="module")
def configs() -> dict[str, Any]:
    return {name: load_config(FOLDER / f"{name}.yaml", cls) for name, cls in CLASSES.items()}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_every_config_is_tested() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(CLASSES)


def test_each_stage_reads_what_the_one_before_wrote(configs: dict[str, Any]) -> None:
    assert configs["autoencoder"].cohort == configs["latents"].cohort == configs["cohort"].output
    assert configs["latents"].autoencoder == configs["autoencoder"].output
    for name in ("diffusion", "diffusion-transformer"):
        assert configs[name].latents == configs["latents"].output
        assert configs[name].autoencoder == configs["autoencoder"].output
    assert configs["bundle"].diffusion == configs["diffusion"].output
    assert configs["generate"].bundle == configs["bundle"].output == configs["distill-decoder"].bundle
    assert configs["distill-decoder"].latents == configs["latents"].output


def test_the_grids_are_the_papers(configs: dict[str, Any]) -> None:
    volume = configs["cohort"].volume
    assert volume.shape_xyz == (160, 224, 160)
    assert volume.spacing_mm == (1.0, 1.0, 1.0)
    for name in ("diffusion", "diffusion-transformer"):
        latents = check_latent_grid(volume, configs["autoencoder"].architecture, configs[name].architecture)
        assert latents == (3, 20, 28, 20)


def test_the_networks_have_the_papers_size(configs: dict[str, Any]) -> None:
    covariates = configs["cohort"].covariates
    assert covariates.context_size == 4
    assert configs["diffusion"].conditioning_dropout == 0  # the all-zero context is a real subject here
    with torch.device("meta"):
        autoencoder = build_autoencoder(configs["autoencoder"].architecture)
        denoiser = Denoiser(configs["diffusion"].architecture, 3, covariates.context_size)
    assert count(autoencoder) == 13_766_248
    assert count(denoiser) == 553_168_899
    heads = {(b.to_q.out_features, b.num_heads) for b in denoiser.modules() if isinstance(b, SABlock)}
    assert heads == {(512, 1), (768, 1)}


def test_the_transformers_size_and_operations_are_what_its_config_says(configs: dict[str, Any]) -> None:
    """DiT-B/2's layout and, in the comment, DiT-L/2's. A block costs 24 W² a token, and attention 4 W a pair of tokens."""
    base = configs["diffusion-transformer"].architecture
    large = dataclasses.replace(base, width=1024, depth=24, heads=16)
    said, tokens = (FOLDER / "diffusion-transformer.yaml").read_text(), 10 * 14 * 10
    for architecture, parameters, gflop in ((base, 130_141_464, 310), (large, 457_870_360, 1039)):
        denoiser, counted = meta_forward(architecture)
        assert (count(denoiser), round(counted / 1e9)) == (parameters, gflop)
        in_blocks = architecture.depth * (24 * architecture.width**2 * tokens + 4 * architecture.width * tokens**2)
        assert counted == pytest.approx(in_blocks, rel=0.002)  # the rest: embeddings, modulations, head
        assert f"{parameters:,}" in said
        assert str(gflop) in said
    assert round(meta_forward(configs["diffusion"].architecture)[1] / 1e9) == 1452


def meta_forward(architecture: DenoiserArchitecture) -> tuple[Denoiser, int]:
    """The network, and the operations of one forward of one volume; nothing is computed."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        denoiser = Denoiser(architecture, 3, 4)
        denoiser(torch.empty(1, 3, 20, 28, 20), torch.empty(1), torch.empty(1, 4))
    return denoiser, counter.get_total_flops()


def test_schedule_and_sampler_are_the_papers(configs: dict[str, Any]) -> None:
    schedule, sampler = configs["diffusion"].schedule, configs["generate"].sampler
    assert schedule == ScheduleConfig(prediction="epsilon", beta_start=0.0015, beta_end=0.0205)
    assert (sampler.method, sampler.steps, sampler.guidance_scale) == ("ddim", 50, 1.0)
    check_sampler(schedule, sampler)
    check_sampler(ScheduleConfig(prediction="v"), sampler)  # the alternative in the comment


def test_batches_divide_among_the_workers(configs: dict[str, Any]) -> None:
    for name in ("autoencoder", "diffusion", "diffusion-transformer"):
        assert configs[name].optimisation.batch_size % configs[name].runtime.workers == 0


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_one_head_a_level_runs_in_both_precisions(precision: torch.dtype) -> None:
    """The paper's options (one head, upcast attention, resampling blocks) on a small network."""
    torch.manual_seed(0)
    architecture = DiffusionArchitecture(
        channels=(8, 16, 24),
        attention=(False, True, True),
        head_channels=0,
        num_res_blocks=1,
        norm_groups=8,
        resblock_updown=True,
        upcast_attention=True,
    )
    denoiser = Denoiser(architecture, 3, 4)
    torch.nn.init.normal_(denoiser.unet.out[2].conv.weight)  # fresh networks answer zero
    z, context = torch.randn(2, 3, 8, 8, 8), torch.rand(2, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        prediction = denoiser(z, torch.tensor([10.0, 900.0]), context)
    assert prediction.shape == z.shape
    assert prediction.isfinite().all()
    assert prediction.std() > 0


def test_heads_that_do_not_divide_a_level_are_refused() -> None:
    channels = {"channels": (256, 512, 768), "attention": (False, True, True)}
    DiffusionArchitecture(**channels, head_channels=256)
    with pytest.raises(ValueError, match="multiples of head_channels"):
        DiffusionArchitecture(**channels, head_channels=512)
    with pytest.raises(ValueError, match="0 for one head a level"):
        DiffusionArchitecture(**channels, head_channels=-1)


def test_the_distilled_decoder_takes_a_twentieth_of_the_operations(configs: dict[str, Any]) -> None:
    own = configs["autoencoder"].architecture
    architecture, shape = configs["distill-decoder"].architecture, (own.latent_channels, 20, 28, 20)
    light = decode_flops(lambda: DistilledDecoder(architecture, own), shape)
    full = decode_flops(lambda: build_autoencoder(own).decode, shape)
    assert (round(full / 1e12, 2), round(light / 1e12, 2)) == (15.14, 0.76)
