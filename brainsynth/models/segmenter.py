"""A small pretrained 3D network that names 18 structures in a T1w image.

A stack of dilated 3 × 3 × 3 convolutions at full resolution (the MeshNet design, Fedorov et al. 2017, arXiv 1612.00940) with
the weights of brainchop (MIT): its 18-class model with 30 channels. This package ships no weights; a config names the
safetensors file, and it must fit this architecture exactly.

Layers work on channels-last tensors. On one core of a CPU with AVX-512 that saves 40 % of the time, and bfloat16 as much
again; `benchmarks/segmentation_ruler.py` prints both, and what bfloat16 changes in ml.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from brainsynth.errors import UserError
from brainsynth.models.device import layout
from brainsynth.models.weights import load_weights

STRUCTURES = (
    "background",
    "cerebral white matter",
    "cerebral cortex",
    "lateral ventricle",
    "inferior lateral ventricle",
    "cerebellum white matter",
    "cerebellum cortex",
    "thalamus",
    "caudate",
    "putamen",
    "pallidum",
    "3rd ventricle",
    "4th ventricle",
    "brain stem",
    "hippocampus",
    "amygdala",
    "accumbens",
    "ventral DC",
)
"""Names of the segmenter's labels, in order; both sides of the brain share a label."""
_SEGMENTER_DILATIONS = (1, 2, 4, 8, 16, 8, 4, 2, 1)
_SEGMENTER_CHANNELS = 30
_PIECE = 1 << 16  # voxels whose class scores exist at one time

Precision = Literal["bfloat16", "float32"]


class Segmenter(nn.Module):
    """1 mm T1w image → one of 18 structures per voxel.

    Nine dilated convolutions with ELU, then a 1 × 1 × 1 convolution to class scores. A voxel sees 46 voxels around it.
    """

    def __init__(self) -> None:
        super().__init__()
        for index, dilation in enumerate(_SEGMENTER_DILATIONS):
            inputs = _SEGMENTER_CHANNELS if index else 1
            conv = nn.Conv3d(inputs, _SEGMENTER_CHANNELS, 3, padding=dilation, dilation=dilation)
            self.add_module(f"conv{index}", conv)
        self.add_module(f"conv{len(_SEGMENTER_DILATIONS)}", nn.Conv3d(_SEGMENTER_CHANNELS, len(STRUCTURES), 1))

    def features(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 30, L, I, A) features before the last layer, of (B, 1, L, I, A) intensities in [0, 1] at 1 mm.

        Axes run to the left, down and to the front: the order that the weights were trained on.
        """
        *hidden, _ = self.children()
        for conv in hidden:
            image = functional.elu(conv(image), inplace=True)
        return image

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 18, L, I, A) class scores of (B, 1, L, I, A) intensities in [0, 1] at 1 mm."""
        scores: torch.Tensor = self.get_submodule(f"conv{len(_SEGMENTER_DILATIONS)}")(self.features(image))
        return scores

    @torch.inference_mode()
    def labels(self, image: torch.Tensor) -> torch.Tensor:
        """(X, Y, Z) uint8 indices into STRUCTURES, of (X, Y, Z) float intensities in [0, 1], RAS+ at 1 mm.

        Class scores are float32 whatever the precision of the features: rounded scores would tie, and ties favour the
        background.
        """
        features = self.features(_batch(_to_left_inferior_anterior(image), self))
        last = self.get_submodule(f"conv{len(_SEGMENTER_DILATIONS)}")
        assert isinstance(last, nn.Conv3d)
        assert last.bias is not None
        weight, bias = last.weight.float().flatten(1).t().contiguous(), last.bias.float()
        voxels = features[0].permute(1, 2, 3, 0).reshape(-1, _SEGMENTER_CHANNELS)
        labels = torch.empty(len(voxels), dtype=torch.uint8, device=voxels.device)
        for start in range(0, len(voxels), _PIECE):
            scores = torch.addmm(bias, voxels[start : start + _PIECE].float(), weight)
            labels[start : start + _PIECE] = scores.argmax(1)
        return _to_right_anterior_superior(labels.reshape(features.shape[2:]))

    @torch.inference_mode()
    def coarse_labels(self, image: torch.Tensor, factor: int) -> torch.Tensor:
        """(X / factor, …) labels of blocks of voxels: of each the class with the largest mean probability.

        Args:
            image: as for `labels`; axes are multiples of `factor`.
        """
        features = self.features(_batch(_to_left_inferior_anterior(image), self)).float()
        last = self.get_submodule(f"conv{len(_SEGMENTER_DILATIONS)}")
        assert isinstance(last, nn.Conv3d)
        assert last.bias is not None
        weight, bias = last.weight.float(), last.bias.float()
        slabs = [
            functional.avg_pool3d(functional.conv3d(slab, weight, bias).softmax(1), factor).argmax(1)[0]
            for slab in torch.split(features, factor, 2)
        ]
        return _to_right_anterior_superior(torch.cat(slabs).to(torch.uint8))


def load_segmenter(weights: Path, device: torch.device, precision: Precision = "bfloat16") -> Segmenter:
    """The segmenter with the weights of a safetensors file (`conv0.weight` … `conv9.bias`), ready to predict.

    Raises:
        UserError: the file is missing or damaged, a key is missing, unknown or misshapen, or a weight is not finite.
    """
    if precision not in ("bfloat16", "float32"):
        raise UserError(f"precision {precision!r} is neither bfloat16 nor float32")
    if not weights.is_file():
        raise UserError(f"there are no weights at {weights}; give the path of the pretrained safetensors file")
    network = Segmenter()
    load_weights(network, weights)
    broken = [name for name, tensor in network.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(f"{weights} holds NaN or infinite weights in {', '.join(broken[:5])}; fetch the file again")
    layout(network)
    network.requires_grad_(False).eval().to(device, torch.bfloat16 if precision == "bfloat16" else torch.float32)
    return network


def _batch(image: torch.Tensor, network: nn.Module) -> torch.Tensor:
    """(1, 1, …) on the network's device and in its precision."""
    parameter = next(network.parameters())
    return image[None, None].to(device=parameter.device, dtype=parameter.dtype).contiguous()


def _to_left_inferior_anterior(image: torch.Tensor) -> torch.Tensor:
    return image.flip((0, 2)).permute(0, 2, 1)


def _to_right_anterior_superior(image: torch.Tensor) -> torch.Tensor:
    return image.permute(0, 2, 1).flip((0, 2))
