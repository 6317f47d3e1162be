"""Average the denoiser weights of two trainings, of which the second continued the first: `start_from` of a third one.

    python -m recipes.average_weights runs/t1w-2mm/diffusion runs/t1w-2mm/diffusion-deeper --share 0.6 \
        --output runs/t1w-2mm/diffusion-averaged.safetensors

The later weights have the smaller error at little noise; at much noise, where few people decide, the earlier ones do. Blocks
that the second training added are the identity in the first: in the average they add `--share` of what they add.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from brainsynth.bundle.spec import DIFFUSION_FILE
from brainsynth.models.gaussian_denoiser import GAUSSIAN
from brainsynth.models.weights import read_tensors
from brainsynth.training.starting import starting_file

_ADDS = (".conv2.", ".modulation.")
"""In the names of what is 0 in a block that is the identity."""


def main() -> None:
    """Read, average, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("--share", type=float, required=True, help="of the second training's weights, 0 to 1")
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()
    first, second = (read_tensors(starting_file(name, DIFFUSION_FILE)) for name in (arguments.first, arguments.second))
    averaged = {}
    for name, later in second.items():
        if name.startswith(GAUSSIAN):
            averaged[name] = later  # fitted anyway
        elif name in first:
            averaged[name] = torch.lerp(first[name].float(), later.float(), arguments.share).to(later.dtype)
        else:
            averaged[name] = later * arguments.share if any(part in name for part in _ADDS) else later
    save_file(averaged, arguments.output)


if __name__ == "__main__":
    main()
