"""The distilled decoder's network: sizes, operations, bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from brainsynth.config.architectures import AutoencoderArchitecture, DecoderArchitecture
from brainsynth.models.distilled_decoder import DistilledDecoder, decode_flops

AUTOENCODER = AutoencoderArchitecture(channels=(8, 8, 8, 8), latent_channels=3, num_res_blocks=1, norm_groups=4)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_every_number_of_levels_makes_whole_volumes(levels: int) -> None:
    architecture = DecoderArchitecture(channels=(8,) * levels, blocks=(1,) * levels, norm_groups=4)
    network = DistilledDecoder(architecture, AUTOENCODER)
    assert network(torch.randn(2, 3, 2, 3, 4)).shape == (2, 1, 16, 24, 32)


def test_depth_to_space_keeps_voxels_in_place() -> None:
    """With one-voxel kernels each cell makes its own block of voxels, and no other."""
    network = DistilledDecoder(DecoderArchitecture(channels=(8,), blocks=(0,)), AUTOENCODER)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.Conv3d):
                centre = module.weight[..., 1:2, 1:2, 1:2].clone()
                module.weight.zero_()
                module.weight[..., 1:2, 1:2, 1:2] = centre
    z = torch.zeros(1, 3, 2, 3, 4)
    silent = network(z)
    z[0, :, 1, 2, 0] = 1.0
    changed = (network(z) != silent)[0, 0]
    assert changed[8:16, 16:24, 0:8].any()
    changed[8:16, 16:24, 0:8] = False
    assert not changed.any()


def test_operations_are_counted_without_computing() -> None:
    architecture = DecoderArchitecture(channels=(16,), blocks=(1,))
    found = decode_flops(lambda: DistilledDecoder(architecture, AUTOENCODER), (3, 4, 5, 6))
    assert found == 2 * 27 * 4 * 5 * 6 * (3 * 16 + 2 * 16 * 16 + 16 * 512)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"channels": (8,) * 5, "blocks": (1,) * 5}, "1 to 4 levels"),
        ({"channels": (1024, 8)}, "1 to 512 channels"),
        ({"blocks": (1,)}, "one number per level"),
        ({"blocks": (1, 17)}, "between 0 and 16"),
        ({"channels": (8, 12)}, "multiples of norm_groups"),
        ({"norm_groups": 0}, "multiples of norm_groups"),
    ],
)
def test_unbounded_sizes_are_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        DecoderArchitecture(**({"channels": (16, 8), "blocks": (1, 1)} | change))


@pytest.mark.parametrize(("factor", "levels"), [(8, 4), (1, 1), (16, 1)])
def test_levels_that_do_not_fit_the_latent_grid_are_refused(factor: int, levels: int) -> None:
    architecture = DecoderArchitecture(channels=(8,) * levels, blocks=(1,) * levels)
    with pytest.raises(ValueError, match="does not fit"):
        architecture.last_factor(factor)
