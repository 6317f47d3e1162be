"""The autoencoder of patches begins as the best linear one, and learns from there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from brainsynth.bundle.spec import LatentSpec
from brainsynth.config.architectures import PatchAutoencoderArchitecture
from brainsynth.models.autoencoder import Autoencoder
from brainsynth.models.device import autocast
from brainsynth.models.patch_autoencoder import (
    PatchAutoencoder,
    depth_to_space,
    principal_components,
    space_to_depth,
)

ARCHITECTURE = PatchAutoencoderArchitecture(kind="patch", patch=4, latent_channels=6, width=8, blocks=1, norm_groups=4)


def images(count: int = 3) -> torch.Tensor:
    rng = np.random.default_rng(0)
    smooth = rng.random((count, 1, 6, 8, 4)).repeat(4, 2).repeat(4, 3).repeat(4, 4)
    image = smooth + 0.2 * rng.random((count, 1, 24, 32, 16))
    image[:, :, :8] = 0.0
    return torch.from_numpy(image).float()


def test_depth_and_space_are_each_others_inverse_and_a_cell_holds_its_patch() -> None:
    x = images()
    deep = space_to_depth(x, 4)
    assert deep.shape == (3, 64, 6, 8, 4)
    torch.testing.assert_close(depth_to_space(deep, 4), x, rtol=0, atol=0)
    torch.testing.assert_close(deep[1, :, 3, 5, 2], x[1, 0, 12:16, 20:24, 8:12].flatten(), rtol=0, atol=0)


def test_untrained_it_is_the_best_linear_autoencoder_of_the_patches() -> None:
    x = images()
    network = PatchAutoencoder(ARCHITECTURE)
    network.start_from(principal_components(list(x[:, None]), 4, 6))
    decoded, mu, sigma = network(x)
    patches = space_to_depth(x, 4).double().movedim(1, -1).reshape(-1, 64).numpy()
    foreground = patches[patches.max(1) > 0.02]
    _, _, directions = np.linalg.svd(foreground, full_matrices=False)
    best = patches @ directions[:6].T @ directions[:6]
    found = space_to_depth(decoded, 4).movedim(1, -1).reshape(-1, 64).detach().numpy()
    np.testing.assert_allclose(found, best, atol=1e-5)
    assert not sigma.any()
    power = mu.detach()[:, :, 2:].pow(2).mean((0, 2, 3, 4))
    assert (power.diff() <= 0).all()
    assert not decoded[:, :, :8].any()


def test_components_are_orthonormal_with_a_fixed_sign() -> None:
    x = images()
    components = principal_components(list(x[:, None]), 4, 6)
    torch.testing.assert_close(components.T @ components, torch.eye(6), rtol=0, atol=1e-5)
    again = principal_components(list(x[:, None].flip(0)), 4, 6)
    torch.testing.assert_close(components, again, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="too few for 6"):
        principal_components([torch.zeros(1, 1, 8, 8, 8)], 4, 6)


def test_the_residual_learns() -> None:
    torch.manual_seed(0)
    x = images()
    network = PatchAutoencoder(ARCHITECTURE)
    network.start_from(principal_components(list(x[:, None]), 4, 6))
    optimizer = torch.optim.Adam(network.residual.parameters(), 1e-3)
    losses = []
    for _ in range(40):
        loss = (network(x)[0] - x).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 3}, "patch must be 2, 4 or 8"),
        ({"patch": 2, "latent_channels": 9}, "between 1 and the 8 voxels"),
        ({"width": 10}, "multiple of norm_groups"),
        ({"blocks": 65}, "between 1 and 64"),
    ],
)
def test_what_cannot_be_built_is_refused(changes: dict[str, int], message: str) -> None:
    sizes = {"patch": 4, "latent_channels": 6, "width": 8, "blocks": 1, "norm_groups": 4}
    with pytest.raises(ValueError, match=message):
        PatchAutoencoderArchitecture(kind="patch", **sizes | changes)


def test_bfloat16_does_not_reach_its_decoder() -> None:
    network = PatchAutoencoder(ARCHITECTURE)
    network.start_from(principal_components(list(images()[:, None]), 4, 6))
    autoencoder = Autoencoder(network, LatentSpec(shape_cxyz=(6, 6, 8, 4), shift=(0.5,) * 6, scale=(2.0,) * 6))
    z = autoencoder.encode(images())
    with autocast(z.device, "bfloat16"):
        assert network.decode(z).dtype == torch.bfloat16
        decoded = autoencoder.decode(z)
    torch.testing.assert_close(decoded, autoencoder.decode(z), rtol=0, atol=0)
