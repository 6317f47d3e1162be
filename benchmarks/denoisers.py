"""UNet against transformer of configs/ixi-4mm: same latents, same CPU seconds. Writes results/denoisers.json.

    python -m benchmarks.denoisers --run runs/ixi-4mm [--budget-s 200] [--seed 0]

One thread; the two alternate step by step, so that other load on the machine affects both. Each uses its config's batch,
learning rate and precision. The number of steps is what fits into the budget, from steps timed beforehand, so that the
learning-rate schedule completes; the averaged weights are those of about the last tenth. The score is the squared error
on the validation subjects in float32, with the same times (stratified, uniform) and noise for both.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from brainsynth.config.load import load_config
from brainsynth.config.training import DiffusionTrainConfig, TrainRuntimeConfig
from brainsynth.models.device import autocast
from brainsynth.models.diffusion import Denoiser
from brainsynth.training.diffusion import DiffusionTask, check
from brainsynth.training.loop import Worker, optimise

REPO = Path(__file__).parents[1]
CONFIGS = {"unet": "4-diffusion.yaml", "transformer": "4-diffusion-transformer.yaml"}
DRAWS, TIMED, BOOTSTRAP = 5, 3, 2000
MOMENTS = (0.5, 1.0)


class Runner:
    """One network in training, with the CPU-seconds that its steps have taken."""

    def __init__(self, name: str, run: Path, seed: int) -> None:
        places = [f"latents={run}/latents", f"autoencoder={run}/autoencoder", f"optimisation.seed={seed}"]
        config = load_config(REPO / "configs" / "ixi-4mm" / CONFIGS[name], DiffusionTrainConfig, places)
        self.name, self.config = name, dataclasses.replace(config, runtime=TrainRuntimeConfig(workers=0))
        self.restart(1000)

    def restart(self, steps: int) -> None:
        """From fresh weights, with the options of a training of that many steps."""
        options = self.config.optimisation
        self.options = dataclasses.replace(
            options, steps=steps, warmup_steps=max(1, steps // 20), ema_decay=max(0.0, 1 - 10 / steps)
        )
        config = dataclasses.replace(self.config, optimisation=self.options)
        self.task = DiffusionTask(config, check(config), Worker(config.runtime, Path(config.output)))
        self.done, self.cpu_s, self.curve = 0, 0.0, {}

    def step(self) -> None:
        """One update, timed; then the validation if its moment has come."""
        began = time.process_time()
        optimise(self.task, self.options, self.done, 0)
        self.cpu_s += time.process_time() - began
        self.done += 1
        for moment in MOMENTS:
            if self.done == round(moment * self.options.steps):
                self.curve[moment] = losses(self.task)
                print(self.name, self.done, f"{self.cpu_s:.0f} CPU-s {self.curve[moment].mean():.4f}", flush=True)


@torch.no_grad()
def losses(task: DiffusionTask) -> np.ndarray:
    """(subjects,) squared error on the validation split, a mean over DRAWS times and noises."""
    network, schedule, table = task.learner.averaged(), task.schedule, task.validation
    rng, total = torch.Generator().manual_seed(1), task.config.schedule.num_train_timesteps
    found = []
    for draw in range(DRAWS):
        t = ((draw + torch.rand(len(table), generator=rng)) / DRAWS * total).long()
        noise = torch.randn(table.mean.shape, generator=rng)
        prediction = network(schedule.add_noise(table.mean, noise, t), t.float(), table.context)
        found.append((prediction - schedule.target(table.mean, noise, t)).pow(2).flatten(1).mean(1))
    return torch.stack(found).mean(0).numpy()


def forward_costs(tasks: dict[str, DiffusionTask]) -> dict[str, dict[str, Any]]:
    """Parameters, floating-point operations and CPU-seconds of one forward, the networks taking turns; median of TIMED."""
    found: dict[str, dict[str, Any]] = {}
    for name, task in tasks.items():
        z, context = task.validation.mean[:1], task.validation.context[:1]
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            network = Denoiser(task.config.architecture, z.shape[1], context.shape[1])
            network(torch.empty(z.shape), torch.empty(1), torch.empty(context.shape))
        parameters = sum(p.numel() for p in network.parameters())
        found[name] = {"parameters": parameters, "gflop": counter.get_total_flops() / 1e9}
    for precision in ("float32", "bfloat16"):
        for batch in (1, 8):
            taken: dict[str, list[float]] = {name: [] for name in tasks}
            for _ in range(TIMED + 1):
                for name, task in tasks.items():
                    z, context = task.train.mean[:batch], task.train.context[:batch]
                    with torch.no_grad(), autocast(torch.device("cpu"), precision):
                        began = time.process_time()
                        task.learner.network(z, torch.full((batch,), 500.0), context)
                    taken[name].append(time.process_time() - began)
            for name, times in taken.items():  # the first is a warm-up
                found[name][f"cpu_s_{precision}_batch_{batch}"] = float(np.median(times[1:]))
    return found


def interval(values: np.ndarray) -> list[float]:
    """95 % interval of the mean, bootstrap over subjects."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (BOOTSTRAP, len(values)))].mean(1)
    return [float(v) for v in np.quantile(means, [0.025, 0.975])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=200.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=REPO / "benchmarks" / "results" / "denoisers.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runners = [Runner(name, arguments.run.resolve(), arguments.seed) for name in CONFIGS]
    costs = forward_costs({runner.name: runner.task for runner in runners})
    for runner in runners:  # a warm-up
        runner.step()
        runner.cpu_s = 0.0
    for _ in range(TIMED):
        for runner in runners:
            runner.step()
    for runner in runners:
        print(runner.name, f"{runner.cpu_s / TIMED:.2f} CPU-s a step", costs[runner.name], flush=True)
        runner.restart(max(20, round(arguments.budget_s / (runner.cpu_s / TIMED))))
    while waiting := [runner for runner in runners if runner.done < runner.options.steps]:
        min(waiting, key=lambda runner: runner.done / runner.options.steps).step()
    result: dict[str, Any] = {"budget_s": arguments.budget_s, "seed": arguments.seed, "torch": torch.__version__}
    result |= {"train": len(runners[0].task.train), "validation": len(runners[0].task.validation)}
    for runner in runners:
        curve = {str(at): {"loss": float(v.mean()), "interval": interval(v)} for at, v in runner.curve.items()}
        training = {"steps": runner.done, "cpu_s": runner.cpu_s, "validation": curve}
        result[runner.name] = costs[runner.name] | training
    unet, transformer = (runner.curve for runner in runners)
    result["transformer_minus_unet"] = {
        str(at): {"loss": float((transformer[at] - unet[at]).mean()), "interval": interval(transformer[at] - unet[at])}
        for at in MOMENTS
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
