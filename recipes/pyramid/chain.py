"""Draws volumes through the pyramid for covariates of validation scans, and writes a picture next to the scans.

    python -m recipes.pyramid.chain NAME [--source noise|gauss|real8|real4] [--n 2] [--save] [--output runs/pyramid]

The source is the flow at 8 mm, the Gaussian of recipes.pyramid.coarse, or the scan itself averaged to 8 or 4 mm. Each row of
OUTPUT/pictures/NAME.png shows the scan, 8 mm, 4 mm and 2 mm in three planes. With --save also OUTPUT/NAME.npz, for
recipes.pyramid.stats.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.image import imsave
from torch import Tensor
from torch.nn import functional

from recipes.pyramid.coarse import CoarseGaussian
from recipes.pyramid.data import COHORTS, context, degrade, open_scans
from recipes.pyramid.networks import pool
from recipes.pyramid.train import STAGES, load_averaged

WHITE_LEVEL, PLANES = 1.25, (30, None, 38)


class Chain:
    """The three stages; counts the seconds of each."""

    def __init__(self, networks: dict[str, Any], steps: int, noise: tuple[float, float]):
        self.networks, self.steps, self.noise = networks, steps, noise
        self.seconds = {name: list[float]() for name in STAGES}

    @torch.no_grad()
    def make(
        self, numbers: Tensor, seed: int, at8: Tensor | None, at4: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Volumes at 8, 4 and 2 mm; a coarser one that is given is not drawn."""
        if at4 is None:
            at8 = self._coarse(numbers, seed) if at8 is None else at8
            at4 = self._local("mid", at8, self.noise[0], numbers, seed + 1)
        return at8, at4, self._local("fine", at4, self.noise[1], numbers, seed + 2)

    def _coarse(self, numbers: Tensor, seed: int) -> Tensor:
        begun = time.perf_counter()
        coarse = self.networks["coarse"]
        options = {} if isinstance(coarse, CoarseGaussian) else {"steps": self.steps}
        volume: Tensor = coarse.sample(numbers, seed=seed, **options)
        self.seconds["coarse"].append(time.perf_counter() - begun)
        return volume

    def _local(self, stage: str, coarse: Tensor, noise: float, numbers: Tensor, seed: int) -> Tensor:
        begun = time.perf_counter()
        seen = degrade(coarse, torch.full((len(numbers),), noise)) if noise else coarse
        volume: Tensor = self.networks[stage].sample(seen, noise, numbers, seed=seed)
        self.seconds[stage].append(time.perf_counter() - begun)
        return volume


def picture(rows: list[list[Tensor]], path: Path, zoom: int = 2) -> None:
    """Each volume in three planes side by side, a row for each scan."""
    lines = []
    for volumes in rows:
        tiles = []
        for volume in volumes:
            array = volume[0, 0].numpy()
            x, y, z = (size // 2 if at is None else at for size, at in zip(array.shape, PLANES, strict=True))
            planes = [array[x].T[::-1], array[:, y].T[::-1], array[:, :, z].T[::-1]]
            height = max(len(plane) for plane in planes)
            padded = [np.pad(plane, ((0, height - len(plane)), (0, 2))) for plane in planes]
            tiles.append(np.pad(np.concatenate(padded, 1), ((0, 2), (0, 4))))
        lines.append(np.concatenate(tiles, 1))
    image = np.clip(np.concatenate(lines) / WHITE_LEVEL, 0, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    imsave(path, np.kron(image, np.ones((zoom, zoom))), cmap="gray", vmin=0, vmax=1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--source", choices=["noise", "gauss", "real8", "real4"], default="noise")
    parser.add_argument("--n", type=int, default=2, help="scans of each cohort")
    parser.add_argument("--noise-8mm", type=float, default=0.02, help="added to the 8 mm volume before the mid stage")
    parser.add_argument("--noise-4mm", type=float, default=0.02, help="added to the 4 mm volume before the fine stage")
    parser.add_argument("--steps", type=int, default=10, help="of the flow at 8 mm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("runs/pyramid"))
    return parser.parse_args()


def main() -> None:
    """Draw."""
    arguments = _options()
    torch.set_num_threads(1)
    output, scans = arguments.output, open_scans(arguments.output)
    networks: dict[str, Any] = {name: load_averaged(name, output) for name in STAGES}
    if arguments.source == "gauss":
        networks["coarse"] = CoarseGaussian(scans)
    chain = Chain(networks, arguments.steps, (arguments.noise_8mm, arguments.noise_4mm))
    contexts, rows, made, chosen = torch.from_numpy(context(scans.table)), [], [], []
    for cohort in COHORTS:
        validation = np.where((scans.table["cohort"] == cohort) & (scans.table["split"] == "validation"))[0]
        for row in validation[np.linspace(0, len(validation) - 1, arguments.n).astype(int)]:
            scan = scans.volume(row)
            at4 = pool(scan) if arguments.source == "real4" else None
            at8 = pool(pool(scan)) if arguments.source == "real8" else None
            seed = arguments.seed + int(row) * 10
            *coarser, volume = chain.make(contexts[row : row + 1], seed, at8, at4)
            enlarged = zip((4, 2), coarser, strict=True)
            shown = [functional.interpolate(v, scale_factor=factor) for factor, v in enlarged if v is not None]
            rows.append([scan, *shown, volume])
            made.append(volume[0, 0].numpy().astype(np.float16))
            chosen.append(int(row))
    picture(rows, output / "pictures" / f"{arguments.name}.png")
    print({name: round(float(np.mean(taken)), 2) for name, taken in chain.seconds.items() if taken}, "seconds a volume")
    if arguments.save:
        np.savez(output / f"{arguments.name}.npz", x=np.stack(made), row=np.array(chosen))


if __name__ == "__main__":
    main()
