"""The pretrained network: every layer against plain NumPy, axes, and weights that must fit exactly."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from brainsynth.errors import UserError
from brainsynth.models.segmenter import STRUCTURES, Segmenter, load_segmenter

CPU = torch.device("cpu")
TINY = (5, 6, 7)


def naive_conv(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, dilation: int) -> np.ndarray:
    """(C, X, Y, Z) → (K, X, Y, Z): the definition of a zero-padded dilated convolution, voxel by voxel, in float64."""
    out = np.zeros((len(weight), *x.shape[1:]))
    reach = weight.shape[-1] // 2
    for at in np.ndindex(*x.shape[1:]):
        for tap in np.ndindex(*weight.shape[2:]):
            seen = tuple(i + (t - reach) * dilation for i, t in zip(at, tap, strict=True))
            if all(0 <= s < n for s, n in zip(seen, x.shape[1:], strict=True)):
                out[(slice(None), *at)] += weight[(slice(None), slice(None), *tap)] @ x[(slice(None), *seen)]
    return out if bias is None else out + bias[:, None, None, None]


def elu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1)


def random_state(network: torch.nn.Module, gain: float = 1.6) -> dict[str, torch.Tensor]:
    """Weights that neither fade nor explode through the layers."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(tensor.shape, generator=generator) * (gain / math.sqrt(max(tensor[0].numel(), 9)))
        for name, tensor in network.state_dict().items()
    }


def written(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    path = folder / "weights.safetensors"
    save_file(state, path)
    return path


def arrays(network: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in network.state_dict().items()}


def test_the_first_layer_is_exact_on_a_fixed_input() -> None:
    """Small integers, so that float32 adds them without rounding: the sums must be equal, not close."""
    network = Segmenter()
    weight = (torch.arange(30 * 27) * 7 % 11 - 4).float().reshape(30, 1, 3, 3, 3)
    network.load_state_dict({**network.state_dict(), "conv0.weight": weight, "conv0.bias": torch.arange(30.0) - 15})
    image = (torch.arange(math.prod(TINY)) * 5 % 13).float().reshape(1, 1, *TINY)
    found = network.get_submodule("conv0")(image)[0].detach().numpy()
    state = arrays(network)
    expected = naive_conv(image[0].double().numpy(), state["conv0.weight"], state["conv0.bias"], 1)
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(expected)) > 100


def test_all_layers_of_the_segmenter_are_as_specified() -> None:
    network = Segmenter()
    network.load_state_dict(random_state(network))
    image = torch.rand(TINY, generator=torch.Generator().manual_seed(1))
    state, x = arrays(network), image[None].double().numpy()
    for index, dilation in enumerate((1, 2, 4, 8, 16, 8, 4, 2, 1)):
        x = elu(naive_conv(x, state[f"conv{index}.weight"], state[f"conv{index}.bias"], dilation))
    x = naive_conv(x, state["conv9.weight"], state["conv9.bias"], 1)
    with torch.no_grad():
        np.testing.assert_allclose(network(image[None, None])[0].numpy(), x, rtol=1e-4, atol=1e-5)
    assert len(np.unique(x.argmax(0))) > 2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_labels_are_the_best_scores_in_ras_order(tmp_path: Path, precision: str) -> None:
    """More voxels than one piece of scores; the same answer as argmax over scores on turned axes."""
    network = load_segmenter(written(tmp_path, random_state(Segmenter())), CPU, precision)
    image = torch.rand((52, 40, 36), generator=torch.Generator().manual_seed(2))
    labels = network.labels(image)
    assert labels.dtype == torch.uint8
    assert labels.shape == image.shape
    turned = image.numpy()[::-1, :, ::-1].transpose(0, 2, 1).copy()  # to the left, down, to the front
    with torch.no_grad():
        dtype = next(network.parameters()).dtype
        scores = network(torch.from_numpy(turned)[None, None].to(dtype))[0].float().numpy()
    back = scores.argmax(0).transpose(0, 2, 1)[::-1, :, ::-1]
    assert (labels.numpy() == back).mean() > (0.9999 if precision == "float32" else 0.97)
    assert len(np.unique(back)) > 3


@pytest.mark.parametrize(("tap", "moved"), [((2, 1, 1), (1, 0, 0)), ((1, 2, 1), (0, 0, 1)), ((1, 1, 2), (0, -1, 0))])
def test_axes_run_left_down_and_to_the_front(tap: tuple[int, ...], moved: tuple[int, ...]) -> None:
    """A first layer that looks one voxel ahead shifts what is seen: to the right, up and to the back of RAS+."""
    network = Segmenter()
    state = {name: torch.zeros_like(tensor) for name, tensor in network.state_dict().items()}
    state["conv0.weight"][(0, 0, *tap)] = 1
    for index in range(1, 9):
        state[f"conv{index}.weight"][0, 0, 1, 1, 1] = 1
    state["conv9.weight"][5, 0] = 1
    state["conv9.bias"][0] = 0.5
    network.load_state_dict(state)
    image = torch.zeros((6, 7, 8))
    image[2, 3, 4] = 1
    expected = tuple(np.add((2, 3, 4), moved))
    assert [tuple(index) for index in np.argwhere(network.labels(image).numpy() == 5)] == [expected]


def test_structures_are_the_labels_of_the_network() -> None:
    assert len(STRUCTURES) == 18
    assert (STRUCTURES[3], STRUCTURES[11], STRUCTURES[17]) == ("lateral ventricle", "3rd ventricle", "ventral DC")


def test_weights_are_loaded_as_they_are(tmp_path: Path) -> None:
    state = random_state(Segmenter())
    exact = load_segmenter(written(tmp_path, state), CPU, "float32")
    assert all(torch.equal(tensor, state[name]) for name, tensor in exact.state_dict().items())
    half = load_segmenter(written(tmp_path, state), CPU)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert not half.training
    assert not any(p.requires_grad for p in half.parameters())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("conv4.bias"), "conv4.bias: missing"),
        (lambda s: s.update({"conv10.weight": torch.zeros(2)}), "conv10.weight: unknown"),
        (lambda s: s.update({"conv0.weight": torch.zeros(30, 2, 3, 3, 3)}), "conv0.weight: shape .*want .30, 1, 3"),
        (lambda s: s["conv7.weight"].view(-1)[3:4].fill_(math.nan), "NaN or infinite weights in conv7.weight"),
        (lambda s: s["conv9.bias"].view(-1)[:1].fill_(math.inf), "NaN or infinite weights in conv9.bias"),
    ],
    ids=["missing", "unknown", "misshapen", "nan", "inf"],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, change, says: str) -> None:
    state = random_state(Segmenter())
    change(state)
    with pytest.raises(UserError, match=says):
        load_segmenter(written(tmp_path, state), CPU)


def test_files_that_hold_no_such_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no weights at"):
        load_segmenter(tmp_path / "absent.safetensors", CPU)
    with pytest.raises(UserError, match="no weights at"):
        load_segmenter(tmp_path, CPU)
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(UserError, match="damaged"):
        load_segmenter(tmp_path / "text", CPU)
    save_file({"other.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="does not fit the architecture"):
        load_segmenter(tmp_path / "other.safetensors", CPU)
    whole = written(tmp_path, random_state(Segmenter()))
    with pytest.raises(UserError, match="neither bfloat16 nor float32"):
        load_segmenter(whole, CPU, "float16")
    (tmp_path / "cut").write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        load_segmenter(tmp_path / "cut", CPU)
