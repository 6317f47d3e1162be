"""The labeller's network: cells and voxels, boxes and whole volumes, the same labels from any batch and any threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from brainsynth.config.architectures import LabellerArchitecture
from brainsynth.models.labeller import Labeller, VolumeLabeller, grid_places
from brainsynth.models.patch_autoencoder import depth_to_space, space_to_depth

CPU = torch.device("cpu")
SMALL = LabellerArchitecture(channels=(8, 12), blocks=(1, 1))
INDICES = (4, 17, 254)


def network(architecture: LabellerArchitecture = SMALL) -> Labeller:
    """Random weights, in the last layer of each block too."""
    torch.manual_seed(0)
    labeller = Labeller(architecture, len(INDICES) + 1)
    for parameter in labeller.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return labeller.eval()


def images(count: int, shape: tuple[int, ...] = (16, 20, 12)) -> np.ndarray:
    return np.random.default_rng(1).random((count, *shape), np.float32)


def test_cells_hold_their_voxels_in_the_order_that_is_documented_and_come_back() -> None:
    image = torch.arange(2 * 3 * 4 * 8 * 4).reshape(2, 3, 4, 8, 4)
    cells = space_to_depth(image, 4)
    assert cells.shape == (2, 64 * 3, 1, 2, 1)
    voxel = (1 * 4 + 2) * 4 + 3
    assert torch.equal(cells[:, 3 * voxel : 3 * voxel + 3, 0, 1, 0], image[:, :, 1, 4 + 2, 3])
    assert torch.equal(depth_to_space(cells, 4), image)


class Knowing(Labeller):
    """Scores that name the class of every voxel of a known map, in the order in which the training's loss reads them."""

    truth: torch.Tensor

    def forward(self, image: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.one_hot(
            space_to_depth(self.truth[None, None], self.cell).movedim(1, -1), self.classes
        )


def test_every_voxel_gets_its_own_label_not_that_of_another_of_its_cell() -> None:
    labeller = Knowing(SMALL, len(INDICES) + 1)
    labeller.truth = torch.from_numpy(np.random.default_rng(2).integers(0, 4, (16, 20, 12)))
    made = VolumeLabeller(labeller, INDICES, CPU)(images(1))[0]
    assert np.array_equal(made, np.array([0, *INDICES])[labeller.truth.numpy()])


def test_labels_are_the_tables_integers_on_the_grid_of_any_image() -> None:
    labeller = VolumeLabeller(network(), INDICES, CPU)
    for shape in ((16, 20, 12), (7, 9, 5)):
        labels = labeller(images(2, shape))
        assert labels.shape == (2, *shape)
        assert labels.dtype == np.uint8
        assert set(np.unique(labels)) <= {0, *INDICES}
    assert len(np.unique(labeller(images(2)))) > 1
    with pytest.raises(ValueError, match="4 classes for background and 2 structures"):
        VolumeLabeller(network(), (1, 2), CPU)


def test_a_label_map_does_not_depend_on_the_batch_nor_on_the_number_of_threads() -> None:
    """The network's own scores do depend on the threads at this size, which is why it is given one."""
    wide = network(LabellerArchitecture(channels=(48, 64), blocks=(1, 1)))
    seen: list[torch.Tensor] = []
    wide.register_forward_hook(lambda module, inputs, scores: seen.append(scores))
    labeller, volumes, before = VolumeLabeller(wide, INDICES, CPU), images(3, (24, 32, 24)), torch.get_num_threads()
    together = labeller(volumes)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for volume, labels in zip(volumes, together, strict=True):
                assert np.array_equal(labeller(volume[None])[0], labels)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(scores, seen[number % 3]) for number, scores in enumerate(seen))


def test_autocast_around_it_changes_nothing() -> None:
    """Generation runs in bfloat16 where the config says so; labels stay float32."""
    labeller, volume = VolumeLabeller(network(), INDICES, CPU), images(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = labeller(volume)
    assert np.array_equal(inside, labeller(volume))


def test_a_box_is_labelled_at_its_place_in_the_whole_grid() -> None:
    """The inner cells of a box get the scores that they have in the whole volume, given their places; not without."""
    labeller = network(LabellerArchitecture(channels=(8, 8), blocks=(1, 1)))
    image = torch.from_numpy(images(1, (64, 32, 32)))[:, None]
    places = grid_places((16, 8, 8))
    with torch.no_grad():
        whole, box = labeller(image)[:, 16:], labeller(image[:, :, 32:], places[:, :, 8:])
        lost = labeller(image[:, :, 32:])
    torch.testing.assert_close(box[:, 10:], whole[:, 10:])
    assert (lost - whole)[:, 10:].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"channels": (), "blocks": ()}, "channels must be 1 to 8 levels"),
        ({"channels": (8, 8), "blocks": (1,)}, "blocks needs one number per level"),
        ({"channels": (8,), "blocks": (99,)}, "blocks needs one number per level, between 1 and 16"),
        ({"channels": (8,), "blocks": (1,), "cell": 3}, "cell must be 1, 2 or 4"),
    ],
)
def test_an_architecture_that_is_none_is_refused(wrong: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        LabellerArchitecture(**wrong)
