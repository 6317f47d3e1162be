"""The diffusion transformer: patches, positions, attention against a plain float64 one, zero start, size."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from brainsynth.bundle.files import read_bundle
from brainsynth.config.architectures import TransformerArchitecture
from brainsynth.models.device import autocast
from brainsynth.models.diffusion import Denoiser
from brainsynth.models.loading import load_models
from brainsynth.models.sampling import guided
from brainsynth.models.transformer import Attention, DiffusionTransformer, patchify, positions, unpatchify
from tests.security.material import write_bundle

SMALL = TransformerArchitecture(kind="transformer", patch_xyz=(1, 2, 3), width=24, depth=2, heads=4, mlp_ratio=2)
GRID = (2, 4, 6)


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    z = torch.randn(batch, 2, *GRID, generator=rng)
    return z, torch.linspace(5, 950, batch), torch.rand(batch, 6, generator=rng)


def awake() -> Denoiser:
    """With every weight away from its start, so that nothing is hidden behind a zero."""
    torch.manual_seed(0)
    denoiser = Denoiser(SMALL, 2, 6)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return denoiser.eval()


def test_patches_are_the_cells_of_their_place_and_go_back() -> None:
    z, patch = inputs()[0], SMALL.patch_xyz
    tokens, grid = patchify(z, patch)
    assert grid == (2, 2, 2)
    assert tokens.shape == (3, 8, 2 * 6)
    for number, (x, y, w) in enumerate(itertools.product(*map(range, grid))):
        cells = z[:, :, x : x + 1, 2 * y : 2 * y + 2, 3 * w : 3 * w + 3]
        assert torch.equal(tokens[:, number], cells.flatten(1))
    assert torch.equal(unpatchify(tokens, patch, grid), z)


def test_positions_differ_at_every_place_and_by_axis() -> None:
    for width in (24, 25, 26, 64):
        found = positions((3, 4, 5), width)
        assert found.shape == (60, width)
        assert torch.cdist(found, found).add(torch.eye(60)).min() > 0.1
    at = positions((3, 4, 5), 24).view(3, 4, 5, 24)
    expected = torch.tensor([f(2 / 10_000 ** (i / 4)) for f in (math.cos, math.sin) for i in range(4)])
    for axis in range(3):  # each axis has its own third
        assert torch.allclose(at.movedim(axis, 0)[2, ..., 8 * axis : 8 * axis + 8], expected.expand(*_rest(axis), 8))


def _rest(axis: int) -> list[int]:
    return [n for other, n in enumerate((3, 4, 5)) if other != axis]


def test_attention_equals_a_plain_one_in_float64() -> None:
    torch.manual_seed(0)
    attention, tokens = Attention(24, 4).double(), torch.randn(2, 7, 24, dtype=torch.float64)
    expected = torch.empty_like(tokens)
    parts = zip(attention.qkv.weight.detach().chunk(3), attention.qkv.bias.detach().chunk(3), strict=True)
    query, key, value = (tokens @ weight.T + bias for weight, bias in parts)
    for sample, head, i in itertools.product(range(2), range(4), range(7)):
        its = slice(6 * head, 6 * head + 6)
        scores = [float(query[sample, i, its] @ key[sample, j, its]) / math.sqrt(6) for j in range(7)]
        weights = [math.exp(s) / sum(map(math.exp, scores)) for s in scores]
        expected[sample, i, its] = sum(w * value[sample, j, its] for j, w in enumerate(weights))
    expected = expected @ attention.out.weight.T + attention.out.bias
    assert torch.allclose(attention(tokens), expected, rtol=0, atol=1e-12)
    difference = attention.float()(tokens.float()) - expected
    assert difference.abs().max() < 1e-5


def test_blocks_know_no_order_and_the_network_knows_the_place() -> None:
    denoiser = awake()
    assert denoiser.transformer is not None
    tokens, condition, order = torch.randn(3, 8, 24), torch.randn(3, 24), torch.randperm(8)
    block = denoiser.transformer.blocks[0]
    assert torch.allclose(block(tokens[:, order], condition), block(tokens, condition)[:, order], atol=1e-5)
    z, t, context = inputs()
    out = denoiser(z, t, context)
    assert out.shape == z.shape
    for axis in (2, 3, 4):  # a flip moves whole patches along x; along y and z also the cells inside one
        assert (denoiser(z.flip(axis), t, context).flip(axis) - out).abs().max() > 0.01


def test_a_sample_depends_on_no_batch_mate_and_repeats_itself() -> None:
    denoiser, (z, t, context) = awake(), inputs()
    together = denoiser(z, t, context)
    assert torch.equal(together, denoiser(z, t, context))
    for i in range(3):
        assert torch.allclose(denoiser(z[i : i + 1], t[i : i + 1], context[i : i + 1])[0], together[i], atol=1e-5)


def test_null_context_is_an_answer_of_its_own_and_guidance_goes_away_from_it() -> None:
    denoiser, (z, _, context) = awake(), inputs()
    t = torch.full((3,), 400.0)
    known, null = denoiser(z, t, context), denoiser(z, t, torch.zeros_like(context))
    assert (known - null).abs().mean() > 0.01
    expected = null + 2 * (known - null)
    assert torch.allclose(guided(denoiser, context, 2.0)(z, 400.0), expected, atol=1e-4)


def test_bfloat16_agrees_with_float32() -> None:
    denoiser, (z, t, context) = awake(), inputs()
    exact = denoiser(z, t, context)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = denoiser(z, t, context)
    assert rounded.dtype == torch.float32
    error = (rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error < 0.03


def test_a_bundle_of_it_is_loaded_in_both_precisions(tmp_path: Path) -> None:
    """As generation loads it: the checks and rewrites that are the UNet's do not meet it."""
    folder = write_bundle(tmp_path / "bundle", dataclasses.replace(SMALL, patch_xyz=(1, 2, 4)))
    spec, device = read_bundle(folder), torch.device("cpu")
    z, t, context = torch.randn(2, 1, 4, 4, 4), torch.tensor([9.0, 900.0]), torch.rand(2, spec.covariates.context_size)
    answers = []
    for precision in ("float32", "bfloat16"):
        _, denoiser = load_models(folder, spec, device, precision, rewrites=True)
        torch.manual_seed(1)
        torch.nn.init.normal_(denoiser.transformer.head.weight)  # fresh networks answer zero
        with autocast(device, precision):
            answers.append(denoiser(z, t, context))
    assert answers[0].std() > 0.1
    error = (answers[1] - answers[0]).square().mean().sqrt() / answers[0].square().mean().sqrt()
    assert 0 < error < 0.03


def test_it_starts_at_zero_and_a_gradient_reaches_every_parameter() -> None:
    """The first step moves the head alone; the second the modulations, gates among them; then what is behind those."""
    torch.manual_seed(0)
    denoiser, (z, t, context) = Denoiser(SMALL, 2, 6), inputs()

    def step() -> set[str]:
        """Names of the parameters that get no gradient in this step."""
        denoiser.zero_grad()
        (denoiser(z, t, context) - z).pow(2).mean().backward()
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter.sub_(0.1 * parameter.grad)
        return {name.removeprefix("transformer.") for name, p in denoiser.named_parameters() if not p.grad.any()}

    assert not denoiser(z, t, context).any()
    everything = {name.removeprefix("transformer.") for name, _ in denoiser.named_parameters()}
    assert everything - step() == {"head.weight", "head.bias"}
    behind = ("time", "covariates", *(f"blocks.{i}.{part}" for i in range(2) for part in ("attention", "mlp")))
    assert step() == {name for name in everything if name.startswith(behind)}
    assert step() == set()


@pytest.mark.parametrize("architecture", [SMALL, dataclasses.replace(SMALL, width=36, depth=3, mlp_ratio=4)])
def test_the_number_of_parameters(architecture: TransformerArchitecture) -> None:
    w, r, k, c = architecture.width, architecture.mlp_ratio, 6, 2
    numbers = c * math.prod(architecture.patch_xyz)
    embeddings = (numbers + 1) * w + (256 + 1 + w + 1) * w + (k + 1 + w + 1) * w
    block = (4 + 2 * r + 6) * w**2 + (4 + r + 1 + 6) * w
    final = 2 * w**2 + 2 * w + (w + 1) * numbers
    network = DiffusionTransformer(architecture, c, k)
    assert sum(p.numel() for p in network.parameters()) == embeddings + architecture.depth * block + final
