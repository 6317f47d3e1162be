"""The example adapters of recipes/generators, on the real networks with small random weights, through the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.inferers import DiffusionInferer
from monai.networks.schedulers.rectified_flow import RFlowScheduler

from brainsynth import open_dataset
from brainsynth.config.schema import GenerateConfig
from brainsynth.stages import generate
from recipes.generators.heun_flow import HeunFlow
from tests.line import as_config

AUTOENCODER = {
    "spatial_dims": 3, "in_channels": 1, "out_channels": 1, "latent_channels": 4, "num_channels": [8, 8, 8],
    "num_res_blocks": [1, 1, 1], "norm_num_groups": 4, "attention_levels": [False, False, False], "num_splits": 1,
    "norm_float16": False,
}  # fmt: skip
DIFFUSION = {
    "spatial_dims": 3, "in_channels": 4, "out_channels": 4, "num_channels": [8, 16], "attention_levels": [False, True],
    "num_head_channels": [0, 8], "num_res_blocks": 1, "norm_num_groups": 4, "include_spacing_input": True,
    "num_class_embeds": 128, "resblock_updown": True, "include_fc": True,
}  # fmt: skip
SCHEDULER = {
    "num_train_timesteps": 1000, "use_discrete_timesteps": False, "use_timestep_transform": True, "sample_method": "uniform",
    "scale": 1.4, "spatial_dim": 3,
}  # fmt: skip
STEPS = 3


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter: MONAI's networks with random weights."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    autoencoder, diffusion = AutoencoderKlMaisi(**AUTOENCODER), DiffusionModelUNetMaisi(**DIFFUSION)
    for parameter in diffusion.parameters():  # its last layer begins at zero
        torch.nn.init.normal_(parameter, std=0.1)
    about = {
        "name": "tiny rectified flow", "autoencoder": AUTOENCODER, "diffusion": DIFFUSION, "scheduler": SCHEDULER,
        "latent_shape": [4, 4, 6, 4], "scale_factor": 1.3, "contrasts": {"T1w": 9, "T2w": 10},
        "volume": {"shape_xyz": [16, 24, 16], "spacing_mm": [8.0, 8.0, 8.0], "origin_mm": [-60.0, -92.0, -60.0]},
    }  # fmt: skip
    (folder / "network.json").write_text(json.dumps(about))
    torch.save(autoencoder.state_dict(), folder / "autoencoder.pt")
    torch.save(diffusion.state_dict(), folder / "diffusion.pt")
    return folder


def generated(tmp_path: Path, bundle: str, options: dict[str, Any], rows: pd.DataFrame) -> Any:
    rows.to_csv(tmp_path / "rows.csv", index=False)
    config = {
        "bundle": bundle, "options": options, "output": str(tmp_path / "dataset"), "samples_per_shard": 2,
        "stored_dtype": "float32", "covariates": {"table": str(tmp_path / "rows.csv")},
        "runtime": {"workers": 0, "threads_per_worker": 1, "micro_batch": 3},
    }  # fmt: skip
    generate.run(as_config(config, GenerateConfig, tmp_path))
    return open_dataset(str(tmp_path / "dataset"))


def test_rectified_flow_gives_what_monai_gives(weights: Path, tmp_path: Path) -> None:
    rows = pd.DataFrame({"contrast": ["T1w", "T2w", "T1w"]})
    options = {"folder": str(weights), "steps": STEPS, "licence": "NVIDIA", "training_data": "none"}
    dataset = generated(tmp_path, "recipes.generators.rectified_flow:RectifiedFlow", options, rows)
    seeds = pd.read_parquet(tmp_path / "dataset" / "manifest" / "subjects.parquet")["seed"].tolist()
    autoencoder, diffusion = AutoencoderKlMaisi(**AUTOENCODER), DiffusionModelUNetMaisi(**DIFFUSION)
    autoencoder.load_state_dict(torch.load(weights / "autoencoder.pt", weights_only=True))
    diffusion.load_state_dict(torch.load(weights / "diffusion.pt", weights_only=True))
    autoencoder.eval(), diffusion.eval()
    scheduler = RFlowScheduler(**SCHEDULER)
    for index, (contrast, seed) in enumerate(zip(rows["contrast"], seeds, strict=True)):
        noise = torch.randn((1, 4, 4, 6, 4), generator=torch.Generator().manual_seed(int(seed)))
        scheduler.set_timesteps(STEPS, input_img_size_numel=4 * 6 * 4)
        label = torch.tensor([{"T1w": 9, "T2w": 10}[contrast]])

        def conditioned(x: torch.Tensor, timesteps: torch.Tensor, context: Any = None, of: Any = label) -> torch.Tensor:
            spacing = torch.full((1, 3), 800.0)
            return diffusion(x, timesteps=timesteps, class_labels=of, spacing_tensor=spacing)

        with torch.no_grad():
            latents = DiffusionInferer(scheduler).sample(noise, conditioned, scheduler, verbose=False)
            image = autoencoder.decode_stage_2_outputs(latents / 1.3)[0, 0].clip(0, 1).numpy()
        assert image.std() > 0
        np.testing.assert_allclose(dataset.volume(index), image, atol=2.0**-11)


def test_a_row_does_not_depend_on_its_neighbours(weights: Path, tmp_path: Path) -> None:
    options = {"folder": str(weights), "steps": STEPS}
    (tmp_path / "three").mkdir(), (tmp_path / "one").mkdir()
    name = "recipes.generators.rectified_flow:RectifiedFlow"
    three = generated(tmp_path / "three", name, options, pd.DataFrame({"contrast": ["T1w", "T2w", "T1w"]}))
    one = generated(tmp_path / "one", name, options, pd.DataFrame({"contrast": ["T2w"], "sample_id": ["syn000001"]}))
    np.testing.assert_array_equal(one.volume(0), three.volume(1))


class Velocity(torch.nn.Module):
    """A small transformer-free WaveDiT-style network: voxels, time and conditions in, a velocity out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.Conv3d(4, 1, 3, padding=1)
        self.condition = torch.nn.Linear(2, 4)

    def forward(self, x: torch.Tensor, t: torch.Tensor, conditions: torch.Tensor) -> torch.Tensor:
        shift = self.condition(torch.cat([t[:, None], conditions[:, :1]], 1))[..., None, None, None]
        return self.last(torch.nn.functional.silu(self.first(x) + shift))


def velocity(path: Path) -> torch.nn.Module:
    network = Velocity()
    network.load_state_dict(torch.load(path, weights_only=True))
    return network


def test_a_flow_in_voxels(tmp_path: Path) -> None:
    torch.manual_seed(1)
    torch.save(Velocity().state_dict(), tmp_path / "weights.pt")
    options = {"velocity": f"{__name__}:velocity", "weights": str(tmp_path / "weights.pt"), "steps": 4, "size": 12}
    ages = pd.DataFrame({"age": [30.0, 80.0, 30.0], "noise_seed": [1, 1, 2]})
    dataset = generated(tmp_path, "recipes.generators.heun_flow:HeunFlow", options, ages)
    assert len(dataset) == 3
    young, old, other = dataset.volumes()
    assert 0 < np.abs(young - old).mean() < np.abs(young - other).mean(), "one noise at two ages is not one person"
    np.testing.assert_allclose(dataset.affine[:3, 3], [-16.5] * 3)


def test_heun_steps_are_of_second_order(tmp_path: Path) -> None:
    """Of dx/dt = x the exact answer is known: twice the steps, a quarter of the error."""
    torch.save({}, tmp_path / "weights.pt")
    errors = []
    for steps in (8, 16):
        flow = HeunFlow(f"{__name__}:decay", str(tmp_path / "weights.pt"), steps, size=4)
        flow.load("cpu")
        start = torch.randn((1, 1, 4, 4, 4), generator=torch.Generator().manual_seed(5))[0, 0].numpy()
        made = flow.sample(pd.DataFrame({"age": [40.0]}), [5])[0]
        inside = (start > 0.1) & (start * np.exp(-1) < 0.9)
        errors.append(np.abs(made - start * np.exp(-1))[inside].max())
    assert 3 < errors[0] / errors[1] < 5


class Decay(torch.nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor, conditions: torch.Tensor) -> torch.Tensor:
        return x


def decay(path: Path) -> torch.nn.Module:
    return Decay()
