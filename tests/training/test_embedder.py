"""Training of the embedder: its loss, its invented persons and their pictures, and that it learns."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from brainsynth.errors import UserError
from brainsynth.training.embedder import EmbedderTraining, contrastive_loss, invent, picture, train_embedder
from tests.instruments.heads import SPACING, heads

CPU = torch.device("cpu")


def test_the_loss_is_that_of_the_paper():
    rng = torch.Generator().manual_seed(0)
    first, second = (functional.normalize(torch.randn(4, 6, generator=rng), dim=1) for _ in range(2))
    both = torch.cat([first, second])
    terms = []
    for i in range(8):
        j = (i + 4) % 8
        others = sum(torch.exp(both[i] @ both[k] / 0.1) for k in range(8) if k != i)
        terms.append(-torch.log(torch.exp(both[i] @ both[j] / 0.1) / others))
    assert contrastive_loss(first, second).item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)


def test_invented_persons_are_nobody_and_pictures_are_of_them():
    scans = torch.from_numpy(heads(4, 0))
    rng = torch.Generator().manual_seed(1)
    persons = invent(scans, scans.roll(1, 0), SPACING, rng)
    assert persons.shape == scans.shape
    assert ((persons - scans).square().mean((1, 2, 3)) > 1e-4).all()
    first, second = picture(persons, SPACING, rng), picture(persons, SPACING, rng)
    assert not torch.equal(first, second)
    assert first.min() >= 0
    assert first.max() <= 1


def test_a_warp_moves_no_voxel_too_far():
    """A bright voxel stays within the 4 mm of the warp and the 8 mm a shift may add along each axis."""
    point = torch.zeros(1, 21, 21, 21)
    point[0, 10, 10, 10] = 1
    rng = torch.Generator().manual_seed(2)
    axes = torch.stack(torch.meshgrid(*[torch.arange(21.0)] * 3, indexing="ij"))
    for _ in range(20):
        seen = picture(point, (8.0, 8.0, 8.0), rng)[0]
        peak = torch.stack([axes[i].flatten()[seen.argmax()] for i in range(3)])
        assert (8 * (peak - 10)).abs().max() <= 8 + 4 + 4  # half a voxel for the peak itself


@pytest.fixture(scope="module")
def trained():
    losses = []
    embedder = train_embedder(
        heads(12, 3), SPACING, EmbedderTraining(steps=14, identities=8), CPU, lambda _, loss: losses.append(loss)
    )
    return embedder, losses


def test_it_learns(trained):
    _, losses = trained
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:2])
    assert np.mean(losses[-3:]) < np.log(15)  # guessing


def test_pictures_of_new_people_are_nearer_to_each_other_than_to_others(trained):
    embedder, _ = trained
    rng = torch.Generator().manual_seed(4)
    strangers = torch.from_numpy(heads(10, 5))
    first = embedder.embed(picture(strangers, SPACING, rng).numpy())
    second = embedder.embed(picture(strangers, SPACING, rng).numpy())
    assert ((first @ second.T).argmax(1) == np.arange(10)).mean() >= 0.4  # guessing: 0.1


def test_the_same_seed_gives_the_same_weights():
    config = EmbedderTraining(steps=2, identities=2)
    twice = [train_embedder(heads(3, 6), SPACING, config, CPU).embed(heads(2, 7)) for _ in range(2)]
    np.testing.assert_array_equal(*twice)


def test_mistakes_are_explained():
    with pytest.raises(UserError, match="finite scans"):
        train_embedder(np.full((3, 8, 8, 8), np.nan), SPACING, EmbedderTraining(), CPU)
    with pytest.raises(ValueError, match="identities >= 2"):
        EmbedderTraining(identities=1)
