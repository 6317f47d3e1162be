"""Augmentation of labelled scans: labels move with the image, the mirror swaps sides, contrast alone moves nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from brainsynth.config.labelling import LabelAugmentation
from brainsynth.labels import Label, LabelTable
from brainsynth.training.label_augmentation import augmented, mirrored_classes, random_box
from brainsynth.training.losses import label_losses

SPACING = (2.0, 2.0, 2.0)
STILL = LabelAugmentation(warp_probability=0, mirror=False, bias=0, blur_mm=0, gamma=1, gain=1, noise=0)


def table(*names: str) -> LabelTable:
    return LabelTable(labels=tuple(Label(index=10 * (i + 1), name=name) for i, name in enumerate(names)), source="test")


def scan() -> tuple[torch.Tensor, torch.Tensor]:
    """Three nested blobs whose brightness says which is which, off the middle of every axis."""
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in (32, 40, 24)), indexing="ij")
    distance = sum(
        ((axis - middle) / size) ** 2 for axis, middle, size in zip(axes, (13, 22, 11), (11, 15, 9), strict=True)
    )
    classes = sum((distance < limit).to(torch.uint8) for limit in (1.0, 0.5, 0.2))
    return classes.float() * 0.3, classes


@pytest.mark.parametrize("seed", range(4))
def test_labels_move_with_the_image(seed: int) -> None:
    """Where labels are alike all around, the moved image still has the brightness of the moved label."""
    torch.manual_seed(seed)
    image, classes = scan()
    moving = dataclasses.replace(STILL, warp_probability=1, turn_degrees=20, shift_mm=6, size_ratio=1.2, warp_mm=5)
    box = augmented(image, classes, moving, SPACING, None, 4)
    assert (box.classes != classes.long()).float().mean() > 0.02
    distance = (box.image - 0.3 * box.classes).abs()
    inner = torch.nn.functional.max_pool3d(box.classes[None].float(), 3, 1, 1) == -torch.nn.functional.max_pool3d(
        -box.classes[None].float(), 3, 1, 1
    )
    assert inner.float().mean() > 0.3
    assert distance[inner[0]].max() < 0.15  # half a step of brightness


def test_only_the_contrast_changes_where_nothing_moves() -> None:
    torch.manual_seed(0)
    image, classes = scan()
    changed = dataclasses.replace(LabelAugmentation(), warp_probability=0, mirror=False)
    box = augmented(image, classes, changed, SPACING, None, 4)
    assert torch.equal(box.classes, classes.long())
    assert (box.image - image).abs().mean() > 0.01
    assert 0 <= box.image.min() <= box.image.max() <= 1
    assert torch.equal(augmented(image, classes, STILL, SPACING, None, 4).image, image)


def test_the_mirror_swaps_sides_and_is_off_where_a_side_has_no_other() -> None:
    swap = mirrored_classes(table("Left-Thalamus", "Brain stem", "Right thalamus", "lh insula", "rh insula"))
    assert swap is not None
    assert swap.tolist() == [0, 3, 2, 1, 5, 4]
    plain = mirrored_classes(table("thalamus", "lateral ventricle"))
    assert plain is not None
    assert plain.tolist() == [0, 1, 2]
    assert mirrored_classes(table("Left-Thalamus", "Brain stem")) is None
    image, classes = scan()
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        box = augmented(image, classes, STILL, SPACING, torch.tensor([0, 3, 2, 1]), 4)
        flipped = not torch.equal(box.image, image)
        seen.add(flipped)
        wanted = torch.tensor([0, 3, 2, 1])[classes.flip(0).long()] if flipped else classes.long()
        assert torch.equal(box.classes, wanted)
        assert torch.equal(box.image, image.flip(0) if flipped else image)
    assert seen == {False, True}


def test_boxes_lie_in_the_scan_on_whole_cells_and_reach_all_of_the_head() -> None:
    image = torch.zeros(40, 48, 32)
    image[16:36, 4:44, 8:30] = 1
    reached = torch.zeros_like(image)
    for seed in range(60):
        torch.manual_seed(seed)
        box = random_box(image, (16, 16, 64), 8)
        assert [one.stop - one.start for one in box] == [16, 16, 32]
        assert all(one.start % 8 == 0 and one.stop <= size for one, size in zip(box, image.shape, strict=True))
        reached[box] = 1
    assert reached[image > 0].all()
    assert random_box(torch.zeros(8, 8, 8), None, 8) == (slice(0, 8),) * 3


def test_the_losses_are_those_of_the_formulas_and_absent_structures_do_not_count() -> None:
    torch.manual_seed(0)
    scores, classes = torch.randn(500, 5), torch.randint(0, 4, (500,))
    values, plain = label_losses(scores, classes, balance=0.5), label_losses(scores, classes)
    p, hot = scores.softmax(1).numpy(), np.eye(5)[classes.numpy()]
    overlap = (2 * (p * hot).sum(0) + 1) / (p.sum(0) + hot.sum(0) + 1)
    assert float(values["dice_loss"]) == pytest.approx(1 - overlap[1:4].mean(), rel=1e-5)
    assert float(plain["cross_entropy"]) == pytest.approx(-np.log((p * hot).sum(1)).mean(), rel=1e-5)
    weight = 1 / np.sqrt(hot.sum(0))[classes.numpy()]
    assert float(values["cross_entropy"]) == pytest.approx(
        np.average(-np.log((p * hot).sum(1)), weights=weight), rel=1e-5
    )
    assert float(label_losses(scores, torch.zeros_like(classes))["dice_loss"]) == 1
    perfect = label_losses(torch.nn.functional.one_hot(classes, 5) * 50.0, classes)
    assert float(perfect["dice_loss"]) == pytest.approx(0, abs=1e-5)
