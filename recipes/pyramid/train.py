"""The long training: the three networks of the pyramid in one process, in turns.

    OMP_NUM_THREADS=1 nice -n 10 python -m recipes.pyramid.train --hours 24 --turn 60 --shares coarse=0.25,mid=0.5,fine=0.25

Resumes from OUTPUT/{coarse,mid,fine}.pt. Without mid.pt the mid stage starts from OUTPUT/adversarial.pt, or from flow.pt
(recipes.pyramid.start). Each turn gives a stage its share of the CPU time; a stage with share 0 is left out. The local
stages train by L1 first, and with a critic from the step that --fine-adversarial and --mid-adversarial name. Each keeps
averaged weights, the checkpoint before the last (.before), and one for each 2 CPU hours (STAGE-2h.pt, …).
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from recipes.pyramid.data import Batch, Crops, Scans, Warps, context, held_out, open_scans
from recipes.pyramid.losses import (
    PENALTY,
    Guard,
    average,
    critic_loss,
    distances,
    generator_loss,
    read_checkpoint,
    write_checkpoint,
)
from recipes.pyramid.networks import CONFIGURATION, Critic, LocalFlow, build, widen

SPLITS = ("train", "validation")
KEEP_EVERY, SHOW_EVERY, SAVE_EVERY = 7200, 1500, 120
"""CPU seconds of a stage."""
CRITIC_RATE = 5e-4
ENTRY = (1, 60, 120, 200)
"""Steps with the critic at which the usual gradient is learned again: its size changes as the critic comes in."""


@dataclass(frozen=True)
class Setting:
    """What all stages share: the scans, the split to train on (None: all), where to write, a seed."""

    scans: Scans
    split: str | None
    output: Path
    seed: int
    adversarial: dict[str, int]


class Stage:
    """One network with its optimiser, averaged weights, and checkpoint."""

    rate, decay = 1e-3, 0.999

    def __init__(self, name: str, setting: Setting):
        self.name, self.setting, self.path = name, setting, setting.output / f"{name}.pt"
        self.network: Any = build(name)
        self.count, self.cpu, self.guard, self.rows = 0, 0.0, Guard(), list[dict[str, float]]()
        self.prepare()
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(), lr=self.rate, betas=(0.9, 0.99), weight_decay=0.01
        )
        if self.path.exists():
            state = read_checkpoint(self.path)
            self.count, self.cpu, self.averaged = state["step"], state["cpu"], build(name)
            self.averaged.load_state_dict(state["ema"])
            self.network.load_state_dict(state["net"])
            self.optimiser.load_state_dict(state["opt"])
            self.restore(state)
        else:
            self.initialise()
            self.averaged = copy.deepcopy(self.network)
        self.averaged.eval()
        self.saved = self.shown = self.cpu
        self.kept = self.cpu // KEEP_EVERY

    def prepare(self) -> None:
        """Make what the stage needs in addition, its data included."""

    def restore(self, state: dict[str, Any]) -> None:
        """The same from a checkpoint."""

    def extra(self) -> dict[str, Any]:
        """The same for a checkpoint."""
        return {}

    def initialise(self) -> None:
        """Before the very first step."""

    def step(self) -> dict[str, float]:
        """One step; returns what to log."""
        raise NotImplementedError

    def show(self) -> None:
        """Print figures of both splits."""

    def save(self) -> None:
        """Write the checkpoint; keep the one before, and one for each two hours."""
        if self.path.exists():
            os.replace(self.path, self.path.with_name(self.path.name + ".before"))
        head = {"ema": self.averaged.state_dict(), "step": self.count, "cpu": self.cpu}
        rest = {"net": self.network.state_dict(), "opt": self.optimiser.state_dict(), "conf": CONFIGURATION[self.name]}
        write_checkpoint(self.path, {**head, **rest, **self.extra()})
        self.saved = self.cpu
        if self.cpu // KEEP_EVERY > self.kept:
            self.kept = self.cpu // KEEP_EVERY
            write_checkpoint(self.setting.output / f"{self.name}-{int(self.kept * 2)}h.pt", head)

    def turn(self, seconds: float, scale: Callable[[], float]) -> None:
        """Train for CPU seconds, at most 8 times that in wall-clock time."""
        cpu, wall = time.process_time(), time.monotonic()
        while time.process_time() - cpu < seconds and time.monotonic() - wall < seconds * 8:
            for group in self.optimiser.param_groups:
                group["lr"] = self.rate * scale() * min(1, (self.count + 1) / 100)
            begun = time.process_time()
            self.rows.append(self.step())
            self.cpu += time.process_time() - begun
            self.count += 1
            average(self.averaged, self.network, self.decay, self.count)
        means = " ".join(f"{name}={value:.4f}" for name, value in pd.DataFrame(self.rows).mean().items())
        self.rows = []
        clock = time.strftime("%H:%M", time.gmtime())
        spent = f"cpu {self.cpu / 60:.0f} min"
        print(clock, self.name, self.count, spent, means, "left out", self.guard.left_out, flush=True)
        if self.cpu - self.saved > SAVE_EVERY:
            self.save()
        if self.cpu - self.shown > SHOW_EVERY or (self.shown == 0 and self.count > 300):
            self.shown = self.cpu
            self.show()


class Coarse(Stage):
    """The flow of whole brains at 8 mm."""

    levels = (0.1, 0.3, 0.5, 0.7, 0.85, 0.95)

    def prepare(self) -> None:
        self.data = Warps(self.setting.scans, self.setting.split, self.setting.seed)

    def initialise(self) -> None:
        self.network.mean.fit(self.setting.scans, torch.from_numpy(context(self.setting.scans.table)))

    def step(self, count: int = 4) -> dict[str, float]:
        cells, contexts = self.data.batch(count)
        at = torch.sigmoid(torch.randn(count) * 1.3 + 0.4).clamp(1e-3, 0.999)
        loss = self.network.loss(cells, contexts, at, torch.randn_like(cells)).mean()
        loss.backward()
        self.guard.step(self.network, self.optimiser)
        return {"loss": loss.item()}

    @torch.no_grad()
    def show(self) -> None:
        for split in SPLITS:
            cells, contexts = held_out(self.setting.scans, split, 16)
            noise = torch.randn(cells.shape, generator=torch.Generator().manual_seed(5))
            times = [torch.full((len(cells),), level) for level in self.levels]
            errors = [self.averaged.loss(cells, contexts, at, noise).mean().item() for at in times]  # type: ignore[operator]
            print("  coarse levels", self.levels, split, [round(error, 4) for error in errors], flush=True)


class Local(Stage):
    """A local generator on crops: L1 at first, a conditional critic later."""

    rate, decay = 6e-4, 0.998
    seed_offset = 0

    def prepare(self) -> None:
        setting = self.setting
        self.data = Crops(setting.scans, self.name, setting.split, setting.seed + self.seed_offset)
        self.critic = Critic().to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.critics = torch.optim.Adam(self.critic.parameters(), lr=CRITIC_RATE, betas=(0.0, 0.99))
        self.critic_guard, self.since = Guard(), 0
        self.held: dict[str, Batch] = {}

    def restore(self, state: dict[str, Any]) -> None:
        self.critic.load_state_dict(state["d"])
        self.critics.load_state_dict(state["do"])
        self.since = state["since"]

    def extra(self) -> dict[str, Any]:
        return {"d": self.critic.state_dict(), "do": self.critics.state_dict(), "since": self.since}

    def step(self, count: int = 2) -> dict[str, float]:
        batch = self.data.batch(count)
        made: Tensor = self.network.one_step(*batch.condition)
        pixels, pooled = distances(batch, made)
        if self.count >= self.setting.adversarial[self.name]:
            return self.step_with_critic(batch, made, pixels, pooled)
        (pixels + 4 * ((made - batch.target) ** 2).mean()).backward()
        self.guard.step(self.network, self.optimiser)
        return {"pix": pixels.item()}

    def step_with_critic(self, batch: Batch, made: Tensor, pixels: Tensor, pooled: Tensor) -> dict[str, float]:
        """The critic's step, then the generator's; the critic's part of the loss comes in over 150 steps."""
        self.since += 1
        if self.since in ENTRY:
            self.guard.usual = self.critic_guard.usual = None
        ramp = min(1, max(0, self.since - 50) / 150)
        for group in self.optimiser.param_groups:
            group["lr"] /= 3
            group["betas"] = (0.0, 0.99)
        for group in self.critics.param_groups:
            group["lr"] = CRITIC_RATE * self.optimiser.param_groups[0]["lr"] / (self.rate / 3)
        visible = functional.relu(made)
        loss, penalty, real, features = critic_loss(self.critic, batch, visible)
        (loss + PENALTY * penalty).backward()
        self.critic_guard.step(self.critic, self.critics, 5.0)
        adversarial, matching = generator_loss(self.critic, batch, visible, real, features)
        ((1 - 0.7 * ramp) * pixels + 2 * pooled + ramp * (0.05 * adversarial + 0.1 * matching)).backward()
        self.guard.step(self.network, self.optimiser)
        values = {"pix": pixels, "D": loss, "gp": penalty, "adv": adversarial, "fm": matching, "pool": pooled}
        return {name: value.item() for name, value in values.items()}

    @torch.no_grad()
    def show(self) -> None:
        scans, name, count = self.setting.scans, self.name, 12
        if not self.held:
            self.held = {split: Crops(scans, name, split, 7, noise=0.0).batch(count) for split in SPLITS}
        for split, batch in self.held.items():
            made = functional.relu(self.averaged.one_step(*batch.condition))  # type: ignore[operator]
            both, condition = torch.cat([batch.target, made]), [torch.cat([part, part]) for part in batch.condition]
            logits = self.critic(both, *condition)[0]
            real, generated = ([round(y[part].mean().item(), 3) for y in logits] for part in _halves(count))
            error = (made - batch.target).abs().mean().item()
            print(f"   {name} {split} l1={error:.5f} D_real={real} D_made={generated}", flush=True)


class Mid(Local):
    """The network of the local flow as a generator in one step, widened."""

    seed_offset = 1

    def initialise(self) -> None:
        for name in ("adversarial.pt", "flow.pt"):
            path = self.setting.output / name
            if path.exists():
                load_narrow(self.network, path)
                print("mid starts from", path, flush=True)
                return


class Fine(Local):
    """From noise, places and context."""

    seed_offset = 2


STAGES = {"coarse": Coarse, "mid": Mid, "fine": Fine}


def load_narrow(network: LocalFlow, path: Path) -> None:
    """Widen the averaged weights of recipes.pyramid.start into a network of the long training."""
    state = read_checkpoint(path)
    widen(network, state["ema"], state["args"]["w"])


def load_averaged(stage: str, output: Path) -> nn.Module | None:
    """The averaged network of a stage, for drawing; None where there is none. Mid may be that of recipes.pyramid.start."""
    network, path = build(stage), output / f"{stage}.pt"
    if path.exists():
        network.load_state_dict(read_checkpoint(path)["ema"])
    elif stage == "mid" and (output / "adversarial.pt").exists():
        load_narrow(network, output / "adversarial.pt")  # type: ignore[arg-type]
    else:
        return None
    return network.eval()


def _halves(count: int) -> tuple[slice, slice]:
    return slice(None, count), slice(count, None)


def main() -> None:
    """Train in turns until the hours are over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=24, help="wall-clock time")
    parser.add_argument("--shares", default="coarse=0.35,mid=0.4,fine=0.25", help="of the CPU time")
    parser.add_argument("--turn", type=float, default=120, help="mean CPU seconds of a turn")
    parser.add_argument("--cooldown", action="store_true", help="let the learning rate fall to 0 over these hours")
    parser.add_argument("--all-scans", action="store_true", help="train on validation scans too")
    parser.add_argument("--fine-adversarial", type=int, default=1200)
    parser.add_argument("--mid-adversarial", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("runs/pyramid"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seed, begun, seconds = int(time.time()), time.monotonic(), arguments.hours * 3600
    torch.manual_seed(seed)
    shares = {name: float(share) for name, share in (part.split("=") for part in arguments.shares.split(","))}
    adversarial = {"mid": arguments.mid_adversarial, "fine": arguments.fine_adversarial}
    split = None if arguments.all_scans else "train"
    setting = Setting(open_scans(arguments.output), split, arguments.output, seed, adversarial)
    stages = [kind(name, setting) for name, kind in STAGES.items() if shares.get(name, 0) > 0]
    print([(s.name, sum(p.numel() for p in s.network.parameters()), s.count) for s in stages], flush=True)

    def scale() -> float:
        return max(0.0, 1 - (time.monotonic() - begun) / seconds) if arguments.cooldown else 1.0

    while time.monotonic() - begun < seconds:
        for stage in stages:
            stage.turn(arguments.turn * shares[stage.name] * len(stages), scale)
    for stage in stages:
        stage.save()


if __name__ == "__main__":
    main()
