"""Few-step distillation on toy latents: which method, and its cost in quality. Writes results/distilled-steps.json.

    python -m benchmarks.distilled_steps --cache FOLDER [--only TEACHER ...]

Teachers: the flow and v networks of benchmarks/toy_latents.py (700 updates) with guidance 1.5 folded in, and a Gaussian
denoiser of the same latents (300 updates, guidance 1). Every student starts from its teacher's weights and gets UPDATES
updates of BATCH. Scored on ROWS rows that no student saw, against a reference of 200 teacher steps from the same noise,
by `measure_steps`: what a bundle records. All methods are tried on the flow teacher, the chosen one on the others.
Results are cached in FOLDER. One thread, about 15 CPU minutes.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.toy_latents import CHANNELS, SCHEDULES, SHAPE, Latents, trained, training_set
from brainsynth.config.architectures import GaussianArchitecture
from brainsynth.config.schema import SamplerConfig
from brainsynth.evaluation.step_fidelity import measure_steps
from brainsynth.models.diffusion import Denoiser
from brainsynth.models.few_steps import network_times, step_targets, student_sampler, teacher_states
from brainsynth.models.sampling import draw_noise, guided, sample_latents
from brainsynth.models.schedule import NoiseSchedule
from brainsynth.records import to_dict
from brainsynth.training.ema import Ema
from brainsynth.training.gaussian_fit import fit_gaussian

UPDATES, BATCH, RATE, ROWS, STEPS = 400, 32, 1e-3, 256, 12
TEACHERS = ("gaussian", "flow", "v")
MOST = 2048
"""Trajectories that are sampled; a method may train on the first of them only."""
GAUSSIAN = GaussianArchitecture(
    kind="gaussian", rank=16, rank_channels=1, channels=(16, 32), embedding=32, norm_groups=8
)
RESULTS = Path(__file__).parent / "results"
Batch = Callable[[Denoiser], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
"""Student as it is → x, network times, contexts, targets, weights of their errors."""


class Teacher:
    """A network to distil, the rows that it is asked for, and its samples, kept in a folder."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.schedule = NoiseSchedule(SCHEDULES["v" if name == "v" else "flow"])
        self.method, self.guidance = ("unipc" if name == "v" else "ab2"), (1.0 if name == "gaussian" else 1.5)
        self.network: Denoiser = self._gaussian() if name == "gaussian" else trained(name, 700, folder)

    def _gaussian(self) -> Denoiser:
        x0, context = training_set(self.folder)
        network, rng = Denoiser(GAUSSIAN, CHANNELS, 3, SHAPE[1:]), torch.Generator().manual_seed(31)
        fit_gaussian(network.gaussian.latents, x0, context, [str(row) for row in range(len(x0))])

        def batch(_: Denoiser) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
            index = torch.randint(len(x0), (BATCH,), generator=rng)
            noise = torch.randn(x0[index].shape, generator=rng)
            t = (1000 * torch.sigmoid(torch.randn(BATCH, generator=rng))).long().clamp(0, 999)
            noisy, error = self.schedule.add_noise(x0[index], noise, t), network.gaussian.expected_error(t)
            return noisy, t.float(), context[index], noise - x0[index], error**-0.5

        return self.student("teacher", batch, network, 300)[0]

    def student(self, label: str, batch: Batch, start: Denoiser | None = None, updates: int = UPDATES) -> Any:
        """A copy of a network trained on batches, kept in a file, and the CPU-seconds that it took."""
        student = copy.deepcopy(start or self.network)
        path = self.folder / f"{self.name}-{label.replace(' ', '-')}.safetensors"
        if not path.exists():
            began = time.process_time()
            _train(student, batch, updates)
            cpu_s = torch.tensor(time.process_time() - began)
            save_file({**{k: v.contiguous() for k, v in student.state_dict().items()}, "cpu_s": cpu_s}, path)
            print(f"{path.stem} {cpu_s:.0f} CPU-s", flush=True)
        state = load_file(path)
        cpu_s = float(state.pop("cpu_s"))
        student.load_state_dict(state)
        return student.requires_grad_(False).eval(), cpu_s

    def sampler(self, steps: int) -> SamplerConfig:
        last = 10.0 if self.method == "unipc" and steps > 100 else None
        return SamplerConfig(method=self.method, steps=steps, guidance_scale=self.guidance, last_log_snr=last)

    def velocity(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """The flow teacher's prediction, guided, for a time (B,) of each row in [0, 1]."""
        times, null = 1000 * t - 1, torch.zeros_like(context)
        both = self.network(torch.cat([x, x]), times.repeat(2), torch.cat([context, null]))
        known, unknown = both.chunk(2)
        return unknown + self.guidance * (known - unknown)

    @torch.no_grad()
    def states(self, split: str, count: int, steps: int, evaluations: int) -> tuple[Tensor, Tensor]:
        """(B, n + 1, …) trajectories and contexts (B, 3) of rows of a split."""
        path = self.folder / f"{self.name}-{split}-{steps}.pt"
        rows, first = {"train": (MOST, 10_000), "test": (ROWS, 0)}[split]
        contexts = Latents().draw(rows, torch.Generator().manual_seed(100 + first))[1]
        if not path.exists():
            parts = []
            for start in range(0, rows, 64):
                c = contexts[start : start + 64]
                seeds = list(range(first + start, first + start + len(c)))
                parts.append(teacher_states(self.network, c, seeds, SHAPE, self.schedule, self.sampler(steps), 4))
            torch.save(torch.cat(parts), path)
        found = torch.load(path, weights_only=True)[:count, :: 4 // evaluations]
        return found, contexts[:count]


def _train(student: Denoiser, batch: Batch, updates: int) -> None:
    """In place; leaves the averaged weights."""
    torch.manual_seed(9)
    student.requires_grad_(True).train()
    average, optimizer = Ema(student, 0.99), torch.optim.AdamW(student.parameters(), RATE, weight_decay=0.0)
    for step in range(updates):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 20) * min(1.0, 2 * (1 - step / updates) + 0.05)
        x, t, c, target, weight = batch(student)
        error = (student(x, t, c) - target).pow(2).flatten(1).mean(1)
        loss = (weight.pow(2) * error).mean() / weight.pow(2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        average.update(student)
    student.load_state_dict(average.state())


def segments(teacher: Teacher, evaluations: int, count: int) -> Any:
    """Ours: regression on the points of kept trajectories."""
    sampler = student_sampler(teacher.sampler(STEPS), evaluations)
    times, rng = torch.tensor(network_times(teacher.schedule, sampler)), torch.Generator().manual_seed(21)
    states, contexts = teacher.states("train", count, STEPS, evaluations)

    def batch(_: Denoiser) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        row = torch.randint(len(states), (BATCH,), generator=rng)
        which = torch.randint(evaluations, (BATCH,), generator=rng)
        x, target, weight = step_targets(states[row], which, teacher.schedule.config, sampler)
        return x, times[which], contexts[row], target, weight

    return teacher.student(f"segments {count} {evaluations}", batch)


def reflow(teacher: Teacher, count: int) -> Any:
    """Rectified flow's second round (2209.03003): straight lines between kept noise and end, at all times."""
    states, contexts = teacher.states("train", count, STEPS, 1)
    rng = torch.Generator().manual_seed(22)

    def batch(_: Denoiser) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        row = torch.randint(len(states), (BATCH,), generator=rng)
        t = torch.rand(BATCH, generator=rng).clamp(0.001, 1)
        t[: BATCH // 4] = 1.0  # where a single step begins
        w, noise, end = t.view(-1, 1, 1, 1, 1), states[row, 0], states[row, -1]
        return (1 - w) * end + w * noise, 1000 * t - 1, contexts[row], noise - end, torch.ones(BATCH)

    return teacher.student("reflow", batch)


def noised_heads(folder: Path, t: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """x_t and contexts (B, 3) of rows of the training set."""
    x0, context = training_set(folder)
    index, w = torch.randint(len(x0), (len(t),), generator=rng), t.view(-1, 1, 1, 1, 1)
    return (1 - w) * x0[index] + w * torch.randn(x0[index].shape, generator=rng), context[index]


def halving(teacher: Teacher, rounds: tuple[int, ...] = (8, 4, 2, 1)) -> dict[int, Any]:
    """Progressive distillation (2202.00512) for flow: each round learns two Euler steps of the one before, on noised heads.

    The first teacher is guided. The updates are shared between the rounds.
    """
    rng, students, spent, previous = torch.Generator().manual_seed(23), {}, 0.0, None
    for steps in rounds:

        def batch(_: Denoiser, n: int = steps, before: Denoiser | None = previous) -> tuple[Tensor, ...]:
            t, h = (torch.randint(n, (BATCH,), generator=rng) + 1) / n, 0.5 / n
            x, c = noised_heads(teacher.folder, t, rng)

            def u(x: Tensor, at: Tensor) -> Tensor:
                return teacher.velocity(x, at, c) if before is None else before(x, 1000 * at - 1, c)

            with torch.no_grad():
                first = u(x, t)
                second = u(x - h * first, t - h)
            return x, 1000 * t - 1, c, (first + second) / 2, torch.ones(BATCH)

        previous, cpu_s = teacher.student(f"halving {steps}", batch, previous, UPDATES // len(rounds))
        spent += cpu_s
        students[steps] = previous, spent
    return students


def mean_flow(teacher: Teacher, evaluations: int) -> Any:
    """MeanFlow (2505.13447) of the guided teacher: u = v - (t - r) du/dt, with r the end of t's step; on noised heads."""
    rng = torch.Generator().manual_seed(25)

    def batch(student: Denoiser) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        left = torch.rand(BATCH, generator=rng).clamp(0.001, 1)
        left[: BATCH // 4] = 1.0  # where a step begins
        t = (torch.randint(evaluations, (BATCH,), generator=rng) + left) / evaluations
        x, c = noised_heads(teacher.folder, t, rng)
        with torch.no_grad():
            v = teacher.velocity(x, t, c)
            # A difference, within t's step: with the exact derivative (torch.func.jvp) training did not converge.
            h = (left / (2 * evaluations)).clamp(max=0.05)
            before = student(x - h.view(-1, 1, 1, 1, 1) * v, 1000 * (t - h) - 1, c)
            slope = (student(x, 1000 * t - 1, c) - before) / h.view(-1, 1, 1, 1, 1)
            target = v - (left / evaluations).view(-1, 1, 1, 1, 1) * slope
        return x, 1000 * t - 1, c, target, torch.ones(BATCH)

    return teacher.student(f"mean flow {evaluations}", batch)


def consistency(teacher: Teacher, count: int) -> Any:
    """Where consistency distillation (2303.01469) leads: from every kept point of a trajectory to its end."""
    states, contexts = teacher.states("train", count, STEPS, 4)
    rng = torch.Generator().manual_seed(24)

    def batch(_: Denoiser) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        row = torch.randint(len(states), (BATCH,), generator=rng)
        which = torch.randint(4, (BATCH,), generator=rng)
        t = 1 - which / 4
        x, end = states[row, which], states[row, -1]
        return x, 1000 * t - 1, contexts[row], (x - end) / t.view(-1, 1, 1, 1, 1), t

    return teacher.student("consistency", batch)


@torch.no_grad()
def sampled(teacher: Teacher, network: Denoiser, sampler: SamplerConfig, contexts: Tensor) -> Tensor:
    parts = []
    for start in range(0, ROWS, 64):
        c = contexts[start : start + 64]
        predict = guided(network, c, sampler.guidance_scale, None, teacher.schedule)
        noise = draw_noise(list(range(start, start + len(c))), SHAPE)
        parts.append(sample_latents(predict, noise, teacher.schedule, sampler))
    return torch.cat(parts)


def judge(name: str, folder: Path) -> dict[str, Any]:
    """Every row of one teacher's table."""
    teacher, table = Teacher(name, folder), {}
    states, contexts = teacher.states("test", ROWS, 200, 1)

    def add(label: str, evaluations: int, network: Denoiser, sampler: SamplerConfig, **more: float) -> None:
        found = measure_steps(sampled(teacher, network, sampler, contexts), states[:, -1])
        table[label] = {"evaluations": evaluations, **more, **to_dict(found)}
        print(name, label, json.dumps(table[label]), flush=True)

    def few(label: str, found: Any, evaluations: int) -> None:
        network, cpu_s = found
        sampler = student_sampler(teacher.sampler(STEPS), evaluations)
        add(f"{label}, {evaluations}", evaluations, network, sampler, training_cpu_s=round(cpu_s, 1))

    for steps in (1, 2, 4, 8, 12):
        cost = steps if teacher.guidance == 1 else 2 * steps
        add(f"teacher {teacher.method}, {steps}", cost, teacher.network, teacher.sampler(steps))
    for n in (1, 2, 4):
        few("segments of 1024 trajectories", segments(teacher, n, 1024), n)
    if name == "flow":
        one, halved = reflow(teacher, 1024), halving(teacher)
        for n in (1, 2, 4):
            few("reflow of 1024 trajectories", one, n)
            few("progressive halving", halved[n], n)
        few("consistency of 1024 trajectories", consistency(teacher, 1024), 1)
        for n in (1, 2):
            few("mean flow", mean_flow(teacher, n), n)
        for count in (128, 2048):
            few(f"segments of {count} trajectories", segments(teacher, 2, count), 2)
    return table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=TEACHERS, default=TEACHERS)
    parser.add_argument("--out", type=Path, default=RESULTS / "distilled-steps.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.cache.mkdir(parents=True, exist_ok=True)
    head = {"updates": UPDATES, "batch": BATCH, "rows": ROWS, "trajectory_steps": STEPS, "reference_steps": 200}
    found = json.loads(options.out.read_text())["teachers"] if options.out.exists() else {}
    for name in options.only:
        found[name] = judge(name, options.cache)
        options.out.write_text(json.dumps(head | {"teachers": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
