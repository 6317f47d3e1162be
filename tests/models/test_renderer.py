"""The renderer's network: what enters it, and that whole images follow from map, covariates and seed alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from brainsynth.config.architectures import RendererArchitecture
from brainsynth.labels import Label, LabelTable
from brainsynth.models.device import has_bfloat16
from brainsynth.models.renderer import MapRenderer, Renderer, RendererCritic, cells_of

ARCHITECTURE = RendererArchitecture(width=8, blocks=2, noise=3, intensity_scale=1.15)
TABLE = LabelTable(labels=(Label(index=7, name="Left-A"), Label(index=2, name="Right-A")), source="test")
CPU = torch.device("cpu")


def drawn(architecture: RendererArchitecture) -> Renderer:
    torch.manual_seed(0)
    made = Renderer(architecture, 3, 5)
    for parameter in made.parameters():  # untrained it makes zeros
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


@pytest.fixture
def network() -> Renderer:
    return drawn(ARCHITECTURE)


def labels(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).choice(np.array([0, 2, 7], np.uint8), shape)


def test_a_cell_sees_the_class_of_each_of_its_voxels() -> None:
    classes = torch.zeros(1, 4, 4, 4, dtype=torch.uint8)
    classes[0, 2, 1, 3] = 2
    cells = cells_of(classes, 3)
    assert cells.shape == (1, 24, 2, 2, 2)
    assert cells.sum() == 64
    children = cells[0, :, 1, 0, 1].reshape(2, 2, 2, 3)
    assert children[0, 1, 1].tolist() == [0, 0, 1]
    assert (children[..., 0] == 1).sum() == 7


def test_an_image_follows_from_map_covariates_and_seed(network: Renderer) -> None:
    render, given, context = MapRenderer(network, TABLE, CPU), labels(9, 8, 7), np.ones(5, np.float32)
    image = render(given, context, 3)
    assert image.shape == (9, 8, 7)
    assert image.dtype == np.float32
    assert image.std() > 0.01
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        np.testing.assert_array_equal(render(given, context, 3), image)
    finally:
        torch.set_num_threads(before)
    for other in (
        render(given, context, 4),
        render(given, 0 * context, 3),
        render(9 - given * (given > 0), context, 3),
    ):
        assert np.abs(other - image).max() > 1e-3


@pytest.mark.skipif(not has_bfloat16(CPU), reason="this CPU has no instructions for bfloat16")
def test_in_bfloat16_an_image_is_nearly_the_same(network: Renderer) -> None:
    given, context = labels(9, 8, 7), np.ones(5, np.float32)
    exact = MapRenderer(network, TABLE, CPU)(given, context, 3)
    image = MapRenderer(network, TABLE, CPU, "bfloat16")(given, context, 3)
    assert image.dtype == np.float32
    assert 0 < np.abs(image - exact).max() < 0.02
    assert np.abs(image - exact).mean() < 0.1 * exact.std()


def test_without_noise_inputs_the_seed_changes_nothing() -> None:
    render = MapRenderer(drawn(dataclasses.replace(ARCHITECTURE, noise=0)), TABLE, CPU)
    image = render(labels(8, 8, 8), np.ones(5, np.float32), 3)
    assert image.std() > 0.01
    np.testing.assert_array_equal(render(labels(8, 8, 8), np.ones(5, np.float32), 4), image)


def test_a_volume_that_is_made_again_keeps_a_share_of_itself() -> None:
    architecture = dataclasses.replace(ARCHITECTURE, coarse=4)
    given, context = labels(8, 8, 8), np.ones(5, np.float32)
    image = np.random.default_rng(2).random((8, 8, 8), np.float32)
    whole = MapRenderer(drawn(architecture), TABLE, CPU)
    part = MapRenderer(drawn(dataclasses.replace(architecture, kept=0.25)), TABLE, CPU)
    made, maps = whole.remade(image, lambda _: given[None], context, 3)
    np.testing.assert_array_equal(maps, given)
    np.testing.assert_array_equal(made, whole(given, context, 3, image))
    np.testing.assert_allclose(
        part.remade(image, lambda _: given[None], context, 3)[0], 0.25 * image + 0.75 * made, atol=1e-6
    )
    for change in ({"kept": 1.0}, {"kept": 0.5, "coarse": 0}):
        with pytest.raises(ValueError, match="kept must be at least 0 and below 1, and needs coarse"):
            dataclasses.replace(architecture, **change)


def test_voxels_outside_every_structure_and_darker_than_the_edge_are_zero() -> None:
    architecture, given = dataclasses.replace(ARCHITECTURE, coarse=4, kept=0.5), labels(8, 8, 8)
    image, context = np.random.default_rng(2).random((8, 8, 8), np.float32), np.ones(5, np.float32)
    plain, edged = (MapRenderer(drawn(dataclasses.replace(architecture, edge=e)), TABLE, CPU) for e in (0.0, 0.4))
    for before, after in (
        (plain(given, context, 3, image), edged(given, context, 3, image)),
        [each.remade(image, lambda _: given[None], context, 3)[0] for each in (plain, edged)],
    ):
        dark = (given == 0) & (before < 0.4)
        assert 0 < dark.sum() < (given == 0).sum()
        assert (before[given > 0] < 0.4).any()
        np.testing.assert_array_equal(after, np.where(dark, 0, before))
    with pytest.raises(ValueError, match="edge must be at least 0 and below 1"):
        dataclasses.replace(architecture, edge=1.0)


def test_specks_that_the_edge_leaves_apart_from_every_structure_are_zero() -> None:
    architecture = dataclasses.replace(ARCHITECTURE, coarse=4, kept=0.99, edge=0.4)
    given, image = np.zeros((16, 16, 16), np.uint8), np.zeros((16, 16, 16), np.float32)
    given[2:5, 2:5, 2:5], given[12, 12, 12] = 7, 7
    image[given > 0] = 1
    image[5:8, 3, 3] = 1  # joined to a structure
    image[12:14, 2, 2] = 1  # a speck
    made, _ = MapRenderer(drawn(architecture), TABLE, CPU).remade(
        image, lambda _: given[None], np.ones(5, np.float32), 3
    )
    assert made[12:14, 2, 2].max() == 0
    assert made[5:8, 3, 3].min() > 0.5
    assert made[given > 0].min() > 0.5


def test_classes_are_the_places_in_the_table_not_the_stored_integers(network: Renderer) -> None:
    other = LabelTable(labels=(Label(index=100, name="Left-A"), Label(index=200, name="Right-A")), source="test")
    given, context = labels(8, 8, 8), np.ones(5, np.float32)
    renamed = np.array([0, 0, 200, 0, 0, 0, 0, 100], np.uint8)[given]
    image = MapRenderer(network, TABLE, CPU)(given, context, 3)
    np.testing.assert_array_equal(MapRenderer(network, other, CPU)(renamed, context, 3), image)
    with pytest.raises(ValueError, match="a network of 3 classes"):
        MapRenderer(network, LabelTable(labels=TABLE.labels[:1], source="test"), CPU)


def test_the_critic_sees_the_labels() -> None:
    torch.manual_seed(0)
    critic = RendererCritic(8, ARCHITECTURE, 3, 5)
    volume, places, context = torch.rand(2, 1, 8, 8, 8), torch.rand(2, 4, 4, 4, 4), torch.rand(2, 5)
    first, second = (torch.full((2, 8, 8, 8), kind, dtype=torch.uint8) for kind in (1, 2))
    (logits, wider), features = critic(volume, first, places, context)
    assert (logits.shape, wider.shape, len(features)) == ((2, 1, 4, 4, 4), (2, 1, 2, 2, 2), 5)
    assert not torch.equal(critic(volume, second, places, context)[0][0], logits)
