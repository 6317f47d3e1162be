"""The first phases of the mid stage (8 → 4 mm): a local flow, then its network as a one-step generator with a critic.

    python -m recipes.pyramid.start flow --minutes 33 [--output runs/pyramid]
    python -m recipes.pyramid.start adversarial --minutes 17

They write OUTPUT/flow.pt and OUTPUT/adversarial.pt, and resume from them. recipes.pyramid.train starts from the second, or
from the first. Minutes are wall-clock time.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from recipes.pyramid.data import Batch, Crops, Scans, open_scans
from recipes.pyramid.losses import (
    PENALTY,
    average,
    critic_loss,
    distances,
    generator_loss,
    read_checkpoint,
    write_checkpoint,
)
from recipes.pyramid.networks import DETAIL, Critic, LocalFlow, unshuffle

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
SIZE = {"w": 64, "blocks": 5}
BATCH, CROP = 3, 12


def elapsed(minutes: float) -> Iterator[float]:
    """The share of the time that has passed, until it has."""
    begun = time.monotonic()
    while (share := (time.monotonic() - begun) / (minutes * 60)) < 1:
        yield share


def flow_loss(network: LocalFlow, batch: Batch, at: Tensor, seed: int | None = None) -> Tensor:
    """Of each crop, inside the head; in units of what independent cells leave open."""
    detail = (unshuffle(batch.target) - batch.degraded) / DETAIL
    noise = torch.randn(detail.shape, generator=None if seed is None else torch.Generator().manual_seed(seed))
    t = at.view(-1, 1, 1, 1, 1)
    weight = (functional.max_pool3d(batch.coarse, 3, 1, 1) > 0.05).float() + 0.05
    error = (network((1 - t) * detail + t * noise, at, *batch.condition) - (noise - detail)) ** 2 * weight
    return error.sum((1, 2, 3, 4)) / (8 * weight.sum((1, 2, 3, 4))) * (at * at + (1 - at) ** 2)


@torch.no_grad()
def report(network: LocalFlow, held: dict[str, Batch]) -> None:
    """Error of the flow at each level, of crops of both splits."""
    for split, batch in held.items():
        errors = [flow_loss(network, batch, torch.full((12,), level), 5).mean().item() for level in LEVELS]
        print("levels", LEVELS, split, [round(error, 4) for error in errors], flush=True)


def flow(scans: Scans, output: Path, minutes: float, rate: float = 1.5e-3, fall: float = 0.3) -> None:
    """Train; the learning rate falls to zero over the last part of the time."""
    torch.manual_seed(0)
    path, network, step = output / "flow.pt", LocalFlow(SIZE["w"], SIZE["blocks"]), 0
    network = network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    averaged = copy.deepcopy(network)
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
    if path.exists():
        state = read_checkpoint(path)
        step = state["step"]
        for part, name in ((network, "f"), (averaged, "ema"), (optimiser, "o")):
            part.load_state_dict(state[name])
    crops = Crops(scans, "mid", "train", step + 1, CROP)
    torch.manual_seed(3)
    held = {split: Crops(scans, "mid", split, 7, CROP).batch(12) for split in ("train", "validation")}
    torch.manual_seed(step)
    losses: list[float] = []
    for share in elapsed(minutes):
        batch, at = crops.batch(BATCH), torch.sigmoid(torch.randn(BATCH) * 1.2).clamp(1e-3, 0.999)
        loss = flow_loss(network, batch, at).mean()
        optimiser.param_groups[0]["lr"] = rate * min(1, (step + 1) / 50) * min(1, (1 - share) / fall)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        step += 1
        average(averaged, network, 0.998, step)
        losses.append(loss.item())
        if step % 100 == 0:
            print(step, f"loss {np.mean(losses[-100:]):.4f}", flush=True)
        if step % 200 == 0:
            write_checkpoint(path, _flow_state(network, averaged, optimiser, step))
    write_checkpoint(path, _flow_state(network, averaged, optimiser, step))
    report(averaged, held)


def _flow_state(
    network: LocalFlow, averaged: LocalFlow, optimiser: torch.optim.Optimizer, step: int
) -> dict[str, object]:
    weights = {"f": network.state_dict(), "ema": averaged.state_dict(), "o": optimiser.state_dict()}
    return {**weights, "step": step, "args": SIZE}


class Adversarial:
    """The flow's network as a generator in one step; its critic is narrower than that of the long training."""

    def __init__(self, output: Path):
        torch.manual_seed(1)
        self.path, self.step = output / "adversarial.pt", 0
        state = read_checkpoint(output / "flow.pt")
        self.size = state["args"]
        network = LocalFlow(self.size["w"], self.size["blocks"])
        network.load_state_dict(state["ema"])
        self.network = network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.averaged = copy.deepcopy(self.network)
        self.critic = Critic(48, 64).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=2e-4, betas=(0.0, 0.99))
        self.critics = torch.optim.Adam(self.critic.parameters(), lr=5e-4, betas=(0.0, 0.99))
        if self.path.exists():
            state = read_checkpoint(self.path)
            self.step = state["step"]
            for name, part in self._parts().items():
                part.load_state_dict(state[name])

    def _parts(self) -> dict[str, torch.nn.Module | torch.optim.Optimizer]:
        optimisers = {"go": self.optimiser, "do": self.critics}
        return {"f": self.network, "ema": self.averaged, "d": self.critic, **optimisers}

    def save(self) -> None:
        """Write the checkpoint."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        write_checkpoint(self.path, {**parts, "step": self.step, "args": self.size})

    def update(self, batch: Batch) -> dict[str, float]:
        """One step of both networks; the critic's part of the loss comes in between steps 50 and 150."""
        made = self.network.one_step(*batch.condition)
        visible = functional.relu(made)
        loss, penalty, real, features = critic_loss(self.critic, batch, visible)
        self.critics.zero_grad()
        (loss + PENALTY * penalty).backward()
        torch.nn.utils.clip_grad_norm_(self.critic.parameters(), 5.0)
        self.critics.step()
        adversarial, matching = generator_loss(self.critic, batch, visible, real, features)
        pixels, pooled = distances(batch, made)
        ramp = min(1, max(0, self.step - 50) / 100)
        self.optimiser.zero_grad()
        (0.3 * pixels + 2 * pooled + ramp * (0.05 * adversarial + 0.1 * matching)).backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        average(self.averaged, self.network, 0.995, self.step)
        values = {"D": loss, "gp": penalty, "adv": adversarial, "fm": matching, "pix": pixels, "pool": pooled}
        return {name: value.item() for name, value in values.items()}


def adversarial(scans: Scans, output: Path, minutes: float) -> None:
    """Train with the critic."""
    training = Adversarial(output)
    crops, rows = Crops(scans, "mid", "train", training.step + 11, CROP), []
    for _ in elapsed(minutes):
        rows.append(training.update(crops.batch(BATCH)))
        if training.step % 50 == 0:
            print(training.step, pd.DataFrame(rows[-50:]).mean().round(4).to_dict(), flush=True)
        if training.step % 200 == 0:
            training.save()
    training.save()


def main() -> None:
    """Run one phase."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=["flow", "adversarial"])
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/pyramid"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    phase = flow if arguments.phase == "flow" else adversarial
    phase(open_scans(arguments.output), arguments.output, arguments.minutes)


if __name__ == "__main__":
    main()
