"""Few-step distillation on toy latents: which method, and what a student costs in quality; writes docs/distilled-steps.json.

    python benchmarks/distilled_steps.py --cache FOLDER [--only PART ...]

Teachers: the toy networks of benchmarks/toy_latents.py (flow and v, 700 updates) with guidance 1.5 folded in, and an exact
one: the score of a mixture of 24 Gaussians, whose student begins as a network that learnt that score for 300 updates. Every
method makes its students in UPDATES updates of BATCH, from the teacher's weights. Judged on ROWS rows that no student saw,
against a reference of 200 steps of the teacher from the same noise: root mean square distance relative to the reference's
root mean square, and Fréchet distance of 16 fixed random features of the latents at the same n and seeds. Intervals are
95 % bootstrap intervals over rows (BCa), the same for teacher and student. What is made is kept in FOLDER.
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
from torch import Tensor
from toy_latents import SCHEDULES, SHAPE, Latents, trained, training_set

from brainsynth.config.schema import SamplerConfig
from brainsynth.evaluation.step_fidelity import measure_steps
from brainsynth.models.diffusion import Denoiser
from brainsynth.models.few_steps import network_times, step_targets, student_sampler, teacher_states
from brainsynth.models.sampling import draw_noise, guided, sample_latents
from brainsynth.models.schedule import NoiseSchedule
from brainsynth.records import to_dict
from brainsynth.training.ema import Ema

UPDATES, BATCH, RATE, ROWS, GUIDANCE = 400, 32, 1e-3, 256, 1.5
MOST = 2048
"""Trajectories that are sampled; a method may train on the first of them only."""
DOCS = Path(__file__).parents[1] / "docs"
Predict3 = Callable[[Tensor, Tensor, Tensor], Tensor]
Batch = Callable[[int], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
"""Update → x, network times, contexts, targets, weights."""


class Mixture:
    """Exact flow prediction for a mixture of Gaussians of one spread around 24 heads of the training set."""

    def __init__(self, folder: Path) -> None:
        self.centres, self.spread = training_set(folder)[0][:24].flatten(1).double(), 0.4

    def __call__(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        s = ((t.double() + 1) / 1000).view(-1, 1)
        a, flat = 1 - s, x.flatten(1).double()
        variance = (a * self.spread) ** 2 + s**2
        off = flat[:, None] - a[:, None] * self.centres
        weights = torch.softmax(-(off**2).sum(2) / (2 * variance), 1)
        centre = weights @ self.centres
        x0 = centre + a * self.spread**2 / variance * (flat - a * centre)
        return ((flat - x0) / s).float().view_as(x)


class Teacher:
    """A network to distil, the rows that it is asked for, and its samples, kept in a folder."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.schedule = NoiseSchedule(SCHEDULES["flow" if name == "mixture" else name])
        flows = self.schedule.config.prediction == "flow"
        self.method = "ab2" if flows else "unipc"
        self.guidance = 1.0 if name == "mixture" else GUIDANCE
        self.exact = Mixture(folder) if name == "mixture" else None
        self.network: Denoiser = self._learnt() if self.exact else trained(name, 700, folder)
        self.predict: Predict3 = self.exact or self.network

    def _learnt(self) -> Denoiser:
        network, states, contexts = trained("flow", 700, self.folder), *self.kept_forward()
        noise = torch.Generator().manual_seed(31)

        def batch(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
            index = torch.randint(len(states), (BATCH,), generator=noise)
            t = torch.sigmoid(torch.randn(BATCH, generator=noise)).view(-1, 1, 1, 1, 1).clamp(0.002, 1)
            x = (1 - t) * states[index] + t * torch.randn(states[index].shape, generator=noise)
            times = 1000 * t.flatten() - 1
            return x, times, contexts[index], self.exact(x, times, contexts[index]), torch.ones(BATCH)

        return student_of(network, batch, self.folder / "mixture-start.pt", 300)

    def kept_forward(self) -> tuple[Tensor, Tensor]:
        """4096 samples of the mixture, and contexts that say nothing."""
        rng = torch.Generator().manual_seed(30)
        centres = self.exact.centres[torch.randint(24, (4096,), generator=rng)].float()
        x0 = centres + self.exact.spread * torch.randn(centres.shape, generator=rng)
        return x0.view(-1, *SHAPE), torch.zeros(4096, 3)

    def contexts(self, count: int, seed: int) -> Tensor:
        if self.exact is not None:
            return torch.zeros(count, 3)
        return Latents().draw(count, torch.Generator().manual_seed(seed))[1]

    def sampler(self, steps: int, **options: Any) -> SamplerConfig:
        if self.method == "unipc" and steps > 100:
            options["last_log_snr"] = 10.0
        return SamplerConfig(method=self.method, steps=steps, guidance_scale=self.guidance, **options)

    @torch.no_grad()
    def states(self, split: str, count: int, steps: int, evaluations: int) -> tuple[Tensor, Tensor]:
        """(B, n + 1, …) trajectories and contexts (B, 3) of rows of a split."""
        path = self.folder / f"{self.name}-{split}-{steps}.pt"
        rows, first = {"train": (MOST, 10_000), "test": (ROWS, 0)}[split]
        contexts = self.contexts(rows, 100 + first)
        if not path.exists():
            parts = []
            for start in range(0, rows, 64):
                c = contexts[start : start + 64]
                seeds = list(range(first + start, first + start + len(c)))
                parts.append(teacher_states(self.predict, c, seeds, SHAPE, self.schedule, self.sampler(steps), 4))
            torch.save(torch.cat(parts), path)
        found = torch.load(path, weights_only=True)[:count, :: 4 // evaluations]
        return found, contexts[:count]


def student_of(network: Denoiser, batch: Batch, path: Path, updates: int = UPDATES) -> Denoiser:
    """Train a copy of a network on batches; kept at `path`."""
    student = copy.deepcopy(network)
    if path.exists():
        student.load_state_dict(torch.load(path, weights_only=True))
        return student.eval()
    torch.manual_seed(9)
    student.requires_grad_(True).train()
    average, began = Ema(student, 0.99), time.process_time()
    optimizer = torch.optim.AdamW(student.parameters(), RATE, weight_decay=0.0)
    for step in range(updates):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 20) * min(1.0, 2 * (1 - step / updates) + 0.05)
        x, t, c, target, weight = batch(step)
        error = (student(x, t, c) - target).pow(2).flatten(1).mean(1)
        loss = (weight.pow(2) * error).mean() / weight.pow(2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        average.update(student)
        if step % 200 == 0:
            print(f"{path.stem} {step} loss {loss.item():.4f} {time.process_time() - began:.0f} CPU-s", flush=True)
    student.load_state_dict(average.state())
    torch.save(student.state_dict(), path)
    return student.eval()


def segments(teacher: Teacher, evaluations: int, count: int, steps: int) -> Denoiser:
    """Ours: regression on the points of kept trajectories."""
    sampler = student_sampler(teacher.sampler(steps), evaluations)
    times = torch.tensor(network_times(teacher.schedule, sampler))
    rng = torch.Generator().manual_seed(21)
    states, contexts = teacher.states("train", count, steps, evaluations)

    def batch(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        row = torch.randint(len(states), (BATCH,), generator=rng)
        which = torch.randint(evaluations, (BATCH,), generator=rng)
        x, target, weight = step_targets(states[row], which, teacher.schedule.config, sampler)
        return x, times[which], contexts[row], target, weight

    path = teacher.folder / f"{teacher.name}-segments-{count}-{steps}-{evaluations}.pt"
    return student_of(teacher.network, batch, path)


def reflow(teacher: Teacher, count: int, steps: int) -> Denoiser:
    """Rectified flow's second round (2209.03003): straight lines between kept noise and end, at all times."""
    states, contexts = teacher.states("train", count, steps, 1)
    rng = torch.Generator().manual_seed(22)

    def batch(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        row = torch.randint(len(states), (BATCH,), generator=rng)
        t = torch.rand(BATCH, generator=rng).clamp(0.001, 1)
        t[: BATCH // 4] = 1.0  # where a single step begins
        w, noise, end = t.view(-1, 1, 1, 1, 1), states[row, 0], states[row, -1]
        return (1 - w) * end + w * noise, 1000 * t - 1, contexts[row], noise - end, torch.ones(BATCH)

    return student_of(teacher.network, batch, teacher.folder / f"{teacher.name}-reflow-{count}-{steps}.pt")


def halving(teacher: Teacher, rounds: tuple[int, ...] = (8, 4, 2, 1)) -> dict[int, Denoiser]:
    """Progressive distillation (2202.00512) for flow: each round learns two Euler steps of the one before, on noised heads.

    The first teacher is guided. The updates are shared between the rounds.
    """
    x0_all, context_all = training_set(teacher.folder)
    rng, students, current = torch.Generator().manual_seed(23), {}, None
    for steps in rounds:
        previous = current

        def batch(step: int, steps: int = steps, previous: Denoiser | None = previous) -> tuple[Tensor, ...]:
            index = torch.randint(len(x0_all), (BATCH,), generator=rng)
            t = (torch.randint(steps, (BATCH,), generator=rng) + 1) / steps
            w, c, h = t.view(-1, 1, 1, 1, 1), context_all[index], 0.5 / steps
            start = (1 - w) * x0_all[index] + w * torch.randn(x0_all[index].shape, generator=rng)
            with torch.no_grad():

                def u(x: Tensor, at: Tensor) -> Tensor:
                    if previous is not None:
                        return previous(x, 1000 * at - 1, c)
                    both = teacher.network(
                        torch.cat([x, x]), (1000 * at - 1).repeat(2), torch.cat([c, torch.zeros_like(c)])
                    )
                    known, null = both.chunk(2)
                    return null + teacher.guidance * (known - null)

                first = u(start, t)
                second = u(start - h * first, t - h)
            return start, 1000 * t - 1, c, (first + second) / 2, torch.ones(BATCH)

        path = teacher.folder / f"{teacher.name}-halving-{steps}.pt"
        current = students[steps] = student_of(current or teacher.network, batch, path, UPDATES // len(rounds))
    return students


def consistency(teacher: Teacher, count: int, steps: int) -> Denoiser:
    """Consistency distillation (2303.01469) in its simplest form: from every point of a kept trajectory to its end."""
    states, contexts = teacher.states("train", count, steps, 4)
    rng = torch.Generator().manual_seed(24)

    def batch(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        row = torch.randint(len(states), (BATCH,), generator=rng)
        which = torch.randint(4, (BATCH,), generator=rng)
        t = 1 - which / 4
        x, end = states[row, which], states[row, -1]
        target = (x - end) / t.view(-1, 1, 1, 1, 1)
        return x, 1000 * t - 1, contexts[row], target, t

    return student_of(teacher.network, batch, teacher.folder / f"{teacher.name}-consistency-{count}-{steps}.pt")


@torch.no_grad()
def sampled(teacher: Teacher, network: Predict3, sampler: SamplerConfig, contexts: Tensor, seeds: list[int]) -> Tensor:
    parts = []
    for start in range(0, len(seeds), 64):
        c, some = contexts[start : start + 64], seeds[start : start + 64]
        predict = guided(network, c, sampler.guidance_scale, None, teacher.schedule)
        parts.append(sample_latents(predict, draw_noise(some, SHAPE), teacher.schedule, sampler))
    return torch.cat(parts)


def judge(name: str, folder: Path, part: str) -> dict[str, Any]:
    """Every row of one teacher's table."""
    teacher, seeds = Teacher(name, folder), list(range(ROWS))
    states, contexts = teacher.states("test", ROWS, 200, 1)
    reference, table = states[:, -1], {}

    def add(label: str, evaluations: int, network: Predict3, sampler: SamplerConfig) -> None:
        found = measure_steps(sampled(teacher, network, sampler, contexts, seeds), reference)
        table[label] = {"evaluations": evaluations, **to_dict(found)}
        print(name, json.dumps(table[label]), label, flush=True)

    def few(label: str, network: Denoiser, evaluations: int) -> None:
        add(f"{label} {evaluations}", evaluations, network, student_sampler(teacher.sampler(12), evaluations))

    each = 1 if teacher.guidance == 1 else 2
    for steps in (1, 2, 4, 6, 8, 12):
        add(f"teacher {teacher.method} {steps}", each * steps, teacher.predict, teacher.sampler(steps))
    for n in (1, 2, 4):
        few("segments of 1024 trajectories", segments(teacher, n, 1024, 12), n)
    if part == "methods":
        one = reflow(teacher, 1024, 12)
        students, consistent = halving(teacher), consistency(teacher, 1024, 12)
        for n in (1, 2, 4):
            few("reflow", one, n)
            few("progressive halving", students[n], n)
            few("trajectory to its end", consistent, n)
        for count in (128, 2048):
            for n in (1, 2):
                few(f"segments of {count} trajectories", segments(teacher, n, count, 12), n)
    return table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=["flow", "v", "mixture"])
    parser.add_argument("--out", type=Path, default=DOCS / "distilled-steps.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    head = {"updates": UPDATES, "batch": BATCH, "rows": ROWS, "reference_steps": 200}
    found = json.loads(options.out.read_text())["teachers"] if options.out.exists() else {}
    for name in options.only:
        found[name] = judge(name, options.cache, "methods" if name == "flow" else "chosen")
        options.out.write_text(json.dumps(head | {"teachers": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
