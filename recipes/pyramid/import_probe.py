"""Weights of the probes' long training as a file that `train-autoencoder` can start from.

    python -m recipes.pyramid.import_probe MID.pt FINE.pt [--cohort runs/t1w-2mm/cohort] [--output FILE.safetensors]

Name the file (runs/t1w-2mm-pyramid/probe.safetensors) under `start_from` of configs/t1w-2mm-pyramid/2-autoencoder.yaml.
The cohort is only asked for its covariates. Both networks then make the same volumes of the same noise, which is checked;
prints the largest difference.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from brainsynth.covariates.schema import CovariateSchema
from brainsynth.models.pyramid import PyramidAutoencoder, Upsampler, places
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import open_store
from recipes.pyramid.probes import ARCHITECTURE, LocalNetwork, columns, converted

GRID, TOLERANCE = (10, 14, 10), 2e-5


def pyramid_of(stages: list[dict[str, Tensor]], schema: CovariateSchema) -> PyramidAutoencoder:
    """The product's network with the weights of the probes' stages, from the coarsest on."""
    network, matrix = PyramidAutoencoder(ARCHITECTURE, schema.context_size), columns(schema)
    for index, (old, architecture) in enumerate(zip(stages, ARCHITECTURE.stages, strict=True)):
        network.stages[index].load_state_dict(converted(old, architecture, index == 0, matrix))
    return network.eval()


@torch.no_grad()
def largest_difference(stages: list[dict[str, Tensor]], network: PyramidAutoencoder, schema: CovariateSchema) -> float:
    """Between what a stage of the probes and of the product make of the same random volumes, covariates and noise."""
    torch.manual_seed(0)
    values = torch.rand(3, len(schema.covariates))
    known = torch.tensor([[1.0], [1.0], [0.0]]).expand_as(values)
    context = torch.cat([values * known, known], 1)
    largest = 0.0
    for index, (old, architecture) in enumerate(zip(stages, ARCHITECTURE.stages, strict=True)):
        peer, mine = LocalNetwork(architecture, index == 0), network.stages[index]
        peer.load_state_dict(old)
        assert isinstance(mine, Upsampler)
        coarse, level = torch.rand(3, 1, *GRID), torch.tensor([0.0, 0.03, 0.08])
        noise = torch.randn(3, architecture.noise, *GRID)
        theirs = peer(coarse, level, places(coarse), context @ columns(schema).T, noise)
        ours = mine(coarse, level, places(coarse), context, noise).relu()
        largest = max(largest, float((ours - theirs).abs().max()))
    return largest


def main() -> None:
    """Convert, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mid", type=Path)
    parser.add_argument("fine", type=Path)
    parser.add_argument("--cohort", default="runs/t1w-2mm/cohort")
    parser.add_argument("--output", type=Path, default=Path("runs/t1w-2mm-pyramid/probe.safetensors"))
    arguments = parser.parse_args()
    schema = read_plan(open_store(arguments.cohort)).covariates
    stages = [torch.load(path, weights_only=True)["ema"] for path in (arguments.mid, arguments.fine)]
    network = pyramid_of(stages, schema)
    difference = largest_difference(stages, network, schema)
    print(f"largest difference of intensities: {difference:.2g}")
    if not difference < TOLERANCE:
        raise SystemExit("the converted weights make other volumes: nothing was written")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, arguments.output)


if __name__ == "__main__":
    main()
