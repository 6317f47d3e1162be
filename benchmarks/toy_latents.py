"""A conditional latent diffusion small enough for a CPU: procedural heads of known volumes, a linear autoencoder, a UNet.

A head is a brain and two ventricles (ellipsoids with soft edges, their volumes exact up to rasterising), a smooth random
texture inside the brain and voxel noise, on 16³ voxels. The latent is 4 channels on 4³ cells: the first four principal
components of 4³ patches, each scaled to unit variance, as a trained autoencoder's latents are. Training sees 8192 heads a
few times; the true distribution is known to any precision, because more heads cost milliseconds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from brainsynth.config.architectures import DiffusionArchitecture
from brainsynth.config.training import ScheduleConfig
from brainsynth.models.diffusion import Denoiser, drop_context
from brainsynth.models.schedule import NoiseSchedule
from brainsynth.models.weights import load_weights
from brainsynth.training.ema import Ema
from brainsynth.training.runs import write_weights

GRID, PATCH, CHANNELS = 16, 4, 4
SHAPE = (CHANNELS, GRID // PATCH, GRID // PATCH, GRID // PATCH)
SCHEDULES = {
    "epsilon": ScheduleConfig(prediction="epsilon"),
    "v": ScheduleConfig(prediction="v"),
    "v, zero terminal SNR": ScheduleConfig(prediction="v", zero_terminal_snr=True),
    "flow": ScheduleConfig(prediction="flow"),
}
ARCHITECTURE = DiffusionArchitecture(
    channels=(16, 32), attention=(False, True), head_channels=32, num_res_blocks=1, norm_groups=8
)


def draw_covariates(count: int, rng: torch.Generator) -> Tensor:
    """(B, 3) context: brain and ventricular volume in [0, 1], and 1 for "known"."""
    brain = torch.rand(count, generator=rng)
    ventricle = (0.7 * torch.rand(count, generator=rng) + 0.3 * (1 - brain)).clamp(0, 1)
    return torch.stack([brain, ventricle, torch.ones(count)], 1)


def draw_heads(context: Tensor, rng: torch.Generator) -> Tensor:
    """(B, 1, 16, 16, 16) float32 images of heads with these volumes; pose, shape and texture are random."""
    count = len(context)
    axis = torch.linspace(-1, 1, GRID)
    at = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).view(1, 3, GRID, GRID, GRID)

    def column(values: Tensor) -> Tensor:
        return values.view(count, -1, 1, 1, 1)

    def normal(size: int) -> Tensor:
        return torch.randn(count, size, generator=rng)

    def ellipsoid(centre: Tensor, radii: Tensor) -> Tensor:
        depth = 1 - ((at - column(centre)) / column(radii)).pow(2).sum(1, keepdim=True).sqrt()
        return torch.sigmoid(depth * column(radii.mean(1)) * GRID)

    def radii(volume: Tensor, stretch: Tensor) -> Tensor:
        stretch = stretch - stretch.mean(1, keepdim=True)  # changes the shape and keeps the volume
        return volume.view(-1, 1) ** (1 / 3) * torch.exp(stretch)

    shift = 0.05 * normal(3)
    brain = ellipsoid(shift, radii(0.30 + 0.16 * context[:, 0], torch.tensor([-0.05, 0.1, -0.05]) + 0.05 * normal(3)))
    size = 0.006 + 0.030 * context[:, 1]
    left, right = (
        ellipsoid(
            shift + torch.tensor([side * 0.2, -0.05, 0.1]) + 0.02 * normal(3),
            radii(size, torch.tensor([-0.3, 0.5, -0.2]) + 0.1 * normal(3)),
        )
        for side in (-1, 1)
    )
    texture = interpolate(torch.randn(count, 1, 6, 6, 6, generator=rng), (GRID, GRID, GRID), mode="trilinear")
    image = brain * (0.7 + 0.08 * texture) * (1 - 0.8 * (left + right).clamp(0, 1))
    return image + 0.02 * torch.randn(image.shape, generator=rng)


class Latents:
    """Images → latents: principal components of patches, fitted once on fixed heads."""

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(11)
        patches = self._patches(draw_heads(draw_covariates(256, rng), rng))
        self.mean = patches.mean((0, 2))
        flat = (patches - self.mean.view(1, -1, 1)).transpose(1, 2).reshape(-1, PATCH**3)
        _, _, directions = torch.linalg.svd(flat, full_matrices=False)
        self.directions = directions[:CHANNELS] / (flat @ directions[:CHANNELS].T).std(0).view(-1, 1)

    @staticmethod
    def _patches(images: Tensor) -> Tensor:
        n, p = GRID // PATCH, PATCH
        cut = images.view(-1, n, p, n, p, n, p).permute(0, 2, 4, 6, 1, 3, 5)
        return cut.reshape(len(images), p**3, n**3)

    def encode(self, images: Tensor) -> Tensor:
        """(B, 4, 4, 4, 4) latents."""
        return (self.directions @ (self._patches(images) - self.mean.view(1, -1, 1))).view(-1, *SHAPE)

    def draw(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents and contexts of fresh heads."""
        context = draw_covariates(count, rng)
        return self.encode(draw_heads(context, rng)), context


def build() -> Denoiser:
    """The denoiser, untrained."""
    return Denoiser(ARCHITECTURE, CHANNELS, 3)


def training_set(folder: Path) -> tuple[Tensor, Tensor]:
    """8192 latents and contexts, drawn once."""
    path = folder / "training-set.npz"
    if not path.exists():
        latents, rng = Latents(), torch.Generator().manual_seed(6)
        parts = [latents.draw(256, rng) for _ in range(32)]
        np.savez(path, x0=torch.cat([z for z, _ in parts]), context=torch.cat([c for _, c in parts]))
    kept = np.load(path)
    return torch.from_numpy(kept["x0"]), torch.from_numpy(kept["context"])


def train(name: str, steps: int, path: Path, batch: int = 32, rate: float = 2e-3) -> None:
    """Train one denoiser and leave its averaged weights at `path`."""
    all_x0, all_context = training_set(path.parent)
    torch.manual_seed(5)
    rng, schedule, network = torch.Generator().manual_seed(7), NoiseSchedule(SCHEDULES[name]), build()
    average, began = Ema(network, 0.998), time.process_time()
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, step / 50) * min(1.0, 4 * (1 - step / steps) + 0.01)
        index = torch.randint(len(all_x0), (batch,), generator=rng)
        x0 = all_x0[index]
        context = drop_context(all_context[index], torch.rand(batch, generator=rng) < 0.1)
        u = (torch.arange(batch) + torch.rand(batch, generator=rng)) / batch
        if name == "flow":
            u = torch.sigmoid(torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)))
        t, noise = (u * 1000).long().clamp(0, 999), torch.randn(x0.shape, generator=rng)
        prediction = network(schedule.add_noise(x0, noise, t), t.float(), context)
        loss = (prediction - schedule.target(x0, noise, t)).pow(2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        average.update(network)
        if step % 50 == 0:
            print(f"{name} {step} loss {loss.item():.4f} {time.process_time() - began:.0f} CPU-s", flush=True)
    network.load_state_dict(average.state())
    write_weights(network, path)


def trained(name: str, steps: int, folder: Path) -> Denoiser:
    """The denoiser of this schedule, trained now unless `folder` has it."""
    path = folder / f"{name.replace(', ', '-').replace(' ', '-')}-{steps}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        train(name, steps, path)
    network = build()
    load_weights(network, path)
    return network.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=list(SCHEDULES))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--cache", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for wanted in options.names:
        trained(wanted, options.steps, options.cache)
