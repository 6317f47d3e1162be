"""The embedder: unit vectors, blind to mirrors and to scale, alone or in a batch, and back from its file."""

from pathlib import Path

import numpy as np
import pytest
import torch

from brainsynth.errors import UserError
from brainsynth.models.embedder import EMBEDDING_SIZE, Embedder, load_embedder, save_embedder

CPU = torch.device("cpu")


@pytest.fixture
def embedder() -> Embedder:
    torch.manual_seed(0)
    return Embedder().eval()


def volumes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(size=(count, 16, 20, 18)).astype(np.float32)


def test_rows_are_unit_vectors_and_differ(embedder):
    found = embedder.embed(volumes(3))
    assert found.shape == (3, EMBEDDING_SIZE)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    assert np.linalg.norm(found[0] - found[1]) > 1e-3
    assert embedder.embed(volumes(0)).shape == (0, EMBEDDING_SIZE)


def test_mirror_images_and_brighter_images_are_the_same(embedder):
    images = volumes(2)
    plain = embedder.embed(images)
    np.testing.assert_allclose(embedder.embed(images[:, ::-1]), plain, atol=1e-5)
    np.testing.assert_allclose(embedder.embed(0.2 + 3 * images), plain, atol=1e-4)
    assert np.abs(embedder.embed(images[:, :, ::-1]) - plain).max() > 1e-3


def test_alone_or_in_a_batch(embedder):
    images = volumes(20)
    np.testing.assert_allclose(embedder.embed(images)[17], embedder.embed(images[17:18])[0], atol=1e-5)


def test_a_constant_volume_stays_a_number(embedder):
    assert np.isfinite(embedder.embed(np.zeros((1, 16, 16, 16), np.float32))).all()


def test_weights_come_back(embedder, tmp_path: Path):
    save_embedder(embedder, tmp_path / "embedder.safetensors")
    loaded = load_embedder(tmp_path / "embedder.safetensors", CPU)
    np.testing.assert_array_equal(loaded.embed(volumes(2)), embedder.embed(volumes(2)))


def test_another_network_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="missing"):
        load_embedder(tmp_path / "embedder.safetensors", CPU)
    from brainsynth.models.weights import save_weights

    save_weights(torch.nn.Linear(2, 2), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="does not fit"):
        load_embedder(tmp_path / "other.safetensors", CPU)
