"""MedicalNet's ResNet-50: read from the authors' kind of file, strictly, and nothing in it is executed."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from brainsynth.errors import UserError
from brainsynth.models.medicalnet import FEATURES, MedicalNet, load_medicalnet

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Random weights under the authors' keys: a data-parallel network without counters, as their torch wrote it."""
    torch.manual_seed(0)
    network = MedicalNet().network
    for name, tensor in network.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.1)
    state = {f"module.{k}": v.clone() for k, v in network.state_dict().items() if not k.endswith("batches_tracked")}
    assert "module.layer3.5.conv2.weight" in state
    assert state["module.conv1.weight"].shape == (64, 1, 7, 7, 7)
    return state


@pytest.fixture(scope="module")
def file(weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("medicalnet") / "resnet_50_23dataset.pth"
    torch.save({"state_dict": weights}, path)
    return path


def test_the_authors_file_is_read(weights: dict[str, torch.Tensor], file: Path) -> None:
    network = load_medicalnet(file, CPU)
    stored = network.network.state_dict()
    assert all(torch.equal(stored[k.removeprefix("module.")], v) for k, v in weights.items())
    assert not network.training
    volumes = torch.from_numpy(np.random.default_rng(0).random((2, 24, 32, 24), np.float32))
    found = network(volumes)
    assert found.shape == (2, FEATURES)
    assert (found[0] - found[1]).abs().max() > 1e-4
    # Standardised per volume: brightness and contrast do not count.
    assert torch.allclose(network(0.1 + 3 * volumes), found, atol=1e-3, rtol=1e-3)


def test_it_has_the_strides_and_dilations_of_the_authors_network() -> None:
    """Halved three times, then dilated: 1/8 of each axis at the end, with the global mean as the feature."""
    network = MedicalNet().network.eval()
    shapes = []
    for stage in (network.conv1, network.layer1, network.layer2, network.layer3, network.layer4):
        stage.register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.shape[1:])))
    with torch.inference_mode():
        network(torch.zeros(1, 1, 32, 48, 32))
    assert shapes == [(64, 16, 24, 16), (256, 8, 12, 8), (512, 4, 6, 4), (1024, 4, 6, 4), (2048, 4, 6, 4)]
    assert [network.layer3[i].conv2.dilation[0] for i in range(6)] == [2] * 6
    assert [network.layer4[i].conv2.dilation[0] for i in range(3)] == [4] * 3


def test_another_network_is_refused(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    fewer = {k.removeprefix("module."): v for k, v in weights.items() if "layer4.2.bn3.weight" not in k}
    save_file(fewer, tmp_path / "fewer.safetensors")
    with pytest.raises(UserError, match="Missing key.*layer4.2.bn3.weight"):
        load_medicalnet(tmp_path / "fewer.safetensors", CPU)
    torch.save({"state_dict": {**weights, "module.conv_seg.0.weight": torch.zeros(1)}}, tmp_path / "more.pth")
    with pytest.raises(UserError, match="Unexpected key"):
        load_medicalnet(tmp_path / "more.pth", CPU)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list"):
        load_medicalnet(tmp_path / "list.pth", CPU)
    with pytest.raises(UserError, match="is missing"):
        load_medicalnet(tmp_path / "absent.pth", CPU)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


def test_a_file_that_would_run_code_runs_none(tmp_path: Path) -> None:
    torch.save({"state_dict": Trap(str(tmp_path / "sprung"))}, tmp_path / "trap.pth")
    with pytest.raises(UserError, match="nothing in it was executed"):
        load_medicalnet(tmp_path / "trap.pth", CPU)
    assert not (tmp_path / "sprung").exists()
