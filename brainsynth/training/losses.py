"""Losses of autoencoder, distilled decoder and what segments."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets.resnet import resnet10, resnet18, resnet50
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d, relu

from brainsynth.config.distillation import DistillLossConfig
from brainsynth.config.training import AutoencoderLossConfig
from brainsynth.errors import UserError
from brainsynth.models.weights import read_tensors
from brainsynth.places import user_path

log = logging.getLogger(__name__)
_RESNETS: dict[int, tuple[Any, str]] = {10: (resnet10, "B"), 18: (resnet18, "A"), 50: (resnet50, "B")}


def kl_divergence(mu: Tensor, sigma: Tensor) -> Tensor:
    """KL(N(mu, sigma²) ‖ N(0, 1)), summed over a sample, averaged over the batch (1312.6114, appendix B)."""
    per_cell = 0.5 * (mu.pow(2) + sigma.pow(2) - 2 * sigma.log() - 1)
    return per_cell.flatten(1).sum(1).mean()


def excess_energy(x_B1XYZ: Tensor, y_B1XYZ: Tensor) -> Tensor:  # noqa: N803
    """How much more of high frequencies x has than y, in the unit of intensity: mean over blocks of 4 × 4 × 4 voxels.

    Compared are root mean squares: where each grain lies does not matter, and too little costs nothing.
    """
    pairs = zip(_energies(x_B1XYZ), _energies(y_B1XYZ), strict=True)
    return torch.stack([relu(x - y).mean() for x, y in pairs]).mean()


def _energies(volume: Tensor) -> list[Tensor]:
    """At full and at half resolution; second differences, of which a checkerboard has most, at full resolution."""
    found = []
    for size in (4, 2):
        x = volume if size == 4 else avg_pool3d(volume, 2)
        steps = {axis: x.diff(dim=axis) for axis in (2, 3, 4)}
        high = [x - avg_pool3d(x, 3, 1, 1, count_include_pad=False), *steps.values()]
        if size == 4:
            high += [steps[a].diff(dim=b) for a in (2, 3, 4) for b in range(a, 5)]
        found += [(avg_pool3d(h.square(), size) + 1e-5).sqrt() for h in high]
    return found


def gradient_difference(x_B1XYZ: Tensor, y_B1XYZ: Tensor, scales: int) -> Tensor:  # noqa: N803
    """Mean L1 distance of the differences between neighbouring voxels, over axes and over `scales` resolutions.

    Each further resolution averages 2×2×2 voxels, for as long as every axis has two of them left. After Mathieu et al. 2016
    (1511.05440, eq. 6), with signed differences.
    """
    error = x_B1XYZ - y_B1XYZ  # differences are linear, so are averages
    terms = []
    for scale in range(scales):
        if scale:
            if min(error.shape[2:]) < 4:
                break
            error = nn.functional.avg_pool3d(error, 2)
        terms += [error.diff(dim=axis).abs().mean() for axis in (2, 3, 4)]
    return torch.stack(terms).mean()


class PerceptualLoss(nn.Module):
    """Distance of channel-normalised features of a frozen 3D ResNet (1801.03924, eq. 1, with unit weights).

    The weights come from a local file (MedicalNet layout, .safetensors, or .pth read with weights only): nothing is fetched.
    """

    def __init__(self, weights: Path, depth: int) -> None:
        super().__init__()
        build, shortcut = _RESNETS[depth]
        network = build(
            spatial_dims=3,
            n_input_channels=1,
            num_classes=1,
            feed_forward=False,
            shortcut_type=shortcut,
            bias_downsample=False,
        )
        state = {key.removeprefix("module."): value for key, value in read_tensors(weights).items()}
        try:
            network.load_state_dict({k: v for k, v in state.items() if not k.startswith(("conv_seg", "fc"))})
        except RuntimeError as error:
            raise UserError(f"{weights} does not fit a 3D ResNet-{depth}: {str(error)[:300]}") from None
        self.stages = nn.ModuleList([network.layer1, network.layer2, network.layer3, network.layer4])
        self.stem = nn.Sequential(network.conv1, network.bn1, network.act, network.maxpool)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> PerceptualLoss:
        """Stays in evaluation mode: the batch statistics are part of the weights."""
        return super().train(False)

    def forward(self, x_B1XYZ: Tensor, y_B1XYZ: Tensor) -> Tensor:  # noqa: N803
        """Mean feature distance of two batches of images in [0, 1]."""
        both = torch.cat([x_B1XYZ, y_B1XYZ]).float()
        both = (both - both.mean((1, 2, 3, 4), keepdim=True)) / (both.std((1, 2, 3, 4), keepdim=True) + 1e-6)
        features, total = self.stem(both), both.new_zeros(())
        for stage in self.stages:
            features = stage(features)
            a, b = nn.functional.normalize(features, dim=1).chunk(2)
            total = total + (a - b).pow(2).sum(1).mean()
        return total


def check_perceptual(losses: AutoencoderLossConfig | DistillLossConfig) -> None:
    """Raises UserError when a file of weights is named and is not there."""
    if (
        losses.perceptual_weights is not None
        and not user_path(losses.perceptual_weights, "losses.perceptual_weights").is_file()
    ):
        raise UserError(f"losses.perceptual_weights: there is no file {losses.perceptual_weights}")


def perceptual_loss(losses: AutoencoderLossConfig | DistillLossConfig, device: torch.device) -> PerceptualLoss | None:
    """The configured perceptual loss; None, with a warning where one was meant, when no file of weights is named."""
    if losses.perceptual_weights is None:
        if losses.perceptual_weight > 0:
            log.warning(
                "the perceptual loss is OFF: losses.perceptual_weights names no local weights file "
                "(a 3D ResNet, MedicalNet layout); reconstructions will be smoother"
            )
        return None
    return PerceptualLoss(
        user_path(losses.perceptual_weights, "losses.perceptual_weights"), losses.perceptual_depth
    ).to(device)


def label_losses(scores: Tensor, classes: Tensor, balance: float = 0.0) -> dict[str, Tensor]:
    """Cross-entropy, and 1 - soft Dice (1606.04797) averaged over the structures that are there; of (N, K) scores.

    Args:
        balance: in the cross-entropy a voxel counts by its class's number of voxels to the power of -balance. At 0.5 small
            structures are learnt early, but come out too large.
    """
    log_probabilities = torch.log_softmax(scores, 1)
    right = log_probabilities.gather(1, classes[:, None])[:, 0]
    sizes = torch.bincount(classes, minlength=scores.shape[1])
    both = torch.zeros_like(scores[0]).index_add(0, classes, right.exp())
    overlap = (2 * both + 1) / (log_probabilities.exp().sum(0) + sizes + 1)
    there = (sizes > 0).to(scores)
    there[0] = 0
    weight = sizes.clamp_min(1).to(scores).pow(-balance)[classes]
    return {
        "cross_entropy": -(weight * right).sum() / weight.sum(),
        "dice_loss": 1 - (overlap * there).sum() / there.sum().clamp_min(1),
    }
