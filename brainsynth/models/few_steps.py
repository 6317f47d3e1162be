"""Few-step distillation: the points of a teacher's trajectory that a student visits, and what it must predict there.

A student of n evaluations is a denoiser for one fixed grid of n timesteps. At each it predicts what takes one step of a
first-order sampler (`euler` for flow, `ddim` for v) from the teacher's trajectory back onto it, n steps further down: the
targets of progressive distillation (2202.00512), taken from the trajectory of the teacher's best solver at once instead of
by halving. So it needs no other input than the time, and any sampler code that runs the teacher runs the student.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from brainsynth.config.schema import SamplerConfig
from brainsynth.config.training import ScheduleConfig
from brainsynth.errors import UserError
from brainsynth.models.diffusion import Denoiser
from brainsynth.models.sampler_rules import METHODS, Run, check_sampler, integrates_flow, log_snr_grid, steps_in_log_snr
from brainsynth.models.sampling import draw_noise, guided, sample_latents
from brainsynth.models.schedule import NoiseSchedule, flow_times, timesteps
from brainsynth.models.solvers import Predict


def student_schedule(teacher: ScheduleConfig) -> ScheduleConfig:
    """The teacher's; but v in place of epsilon, which says nothing about the image where a student's step begins."""
    return dataclasses.replace(teacher, prediction="v") if teacher.prediction == "epsilon" else teacher


def student_sampler(teacher: SamplerConfig, evaluations: int) -> SamplerConfig:
    """How a student is sampled: guidance is folded in, so each step is one evaluation."""
    if integrates_flow(teacher):
        return SamplerConfig(method="euler", steps=evaluations, time_shift=teacher.time_shift)
    return SamplerConfig(method="ddim", steps=evaluations)


def reference_sampler(teacher: SamplerConfig, steps: int) -> SamplerConfig:
    """What a teacher converges to: its sampler with more steps, down to almost no noise."""
    last = 10.0 if steps_in_log_snr(teacher) else None
    return dataclasses.replace(teacher, steps=steps, last_log_snr=last)


def check_teacher(schedule: ScheduleConfig, sampler: SamplerConfig, evaluations: int, guidable: bool) -> None:
    """Raises UserError when a trajectory of this sampler cannot teach a student of this many evaluations."""
    check_sampler(schedule, sampler, guidable)
    if sampler.method == "ddpm" or sampler.eta > 0:
        raise UserError(f"sampler.method {sampler.method!r} adds noise: a student needs a deterministic teacher")
    if sampler.first_timestep is not None:
        raise UserError("sampler.first_timestep must be left out: a student begins at the last trained timestep")
    if sampler.steps < 2 * evaluations:
        raise UserError(
            f"sampler.steps {sampler.steps} is too few for a student of {evaluations} evaluations: take at least "
            f"{2 * evaluations}"
        )
    if not steps_in_log_snr(sampler) and sampler.steps % evaluations:
        raise UserError(
            f"sampler.steps {sampler.steps} must be a multiple of the student's {evaluations} evaluations: its "
            "timesteps are among the teacher's"
        )
    if steps_in_log_snr(sampler):
        noise = NoiseSchedule(schedule)
        _grid(noise, sampler, network_times(noise, student_sampler(sampler, evaluations)))


def network_times(schedule: NoiseSchedule, sampler: SamplerConfig) -> list[float]:
    """The network times at which a student is evaluated, from noise downwards."""
    count = schedule.config.num_train_timesteps
    if integrates_flow(sampler):
        return [float(t * count - 1) for t in flow_times(sampler.steps, sampler.time_shift)[:-1]]
    return [float(t) for t in timesteps(count, sampler.steps)]


def teacher_states(
    denoiser: Callable[[Tensor, Tensor, Tensor], Tensor],
    context: Tensor,
    seeds: Sequence[int],
    shape_cxyz: tuple[int, ...],
    schedule: NoiseSchedule,
    sampler: SamplerConfig,
    evaluations: int,
) -> Tensor:
    """(B, n + 1, C, X, Y, Z) the teacher's states at the student's n times, and where its trajectory ends.

    `sampler` is the teacher's (`check_teacher`), its guidance included; rows as in `sampling.sample_rows`.
    """
    visited = network_times(schedule, student_sampler(sampler, evaluations))
    predict = guided(denoiser, context, sampler.guidance_scale, sampler.guidance_interval, schedule)
    noise = draw_noise(seeds, shape_cxyz).to(context.device)
    states: dict[int, Tensor] = {}

    def recording(x: Tensor, t: float) -> Tensor:
        near = int(np.abs(np.array(visited) - t).argmin())
        if abs(visited[near] - t) < 1e-6 * schedule.config.num_train_timesteps:
            states[near] = x  # Heun evaluates twice at a time, the second time at the state itself
        return predict(x, t)

    end = _solve(recording, noise, schedule, sampler, visited)
    return torch.stack([*(states[i] for i in range(evaluations)), end], dim=1)


def _solve(
    predict: Predict, noise: Tensor, schedule: NoiseSchedule, sampler: SamplerConfig, visited: list[float]
) -> Tensor:
    """`sample_latents`, on a grid that has the student's timesteps in it."""
    if not steps_in_log_snr(sampler):
        return sample_latents(predict, noise, schedule, sampler)
    grid = _grid(schedule, sampler, visited)
    return METHODS[sampler.method].solve(Run(predict, noise, schedule, sampler, grid))


def _grid(schedule: NoiseSchedule, sampler: SamplerConfig, visited: list[float]) -> list[int]:
    """The sampler's own timesteps, of which the nearest make way for those in `visited`."""
    grid = np.array(log_snr_grid(schedule, sampler))
    for t in visited:
        grid[np.abs(grid - t).argmin()] = round(t)
    if (np.diff(grid) >= 0).any() or not set(visited) <= set(grid.tolist()):
        raise UserError(
            f"sampler.steps {sampler.steps} of {sampler.method} leave no room for the student's timesteps "
            f"{[round(t) for t in visited]}; take more steps"
        )
    return [int(t) for t in grid]


@functools.lru_cache
def _arcs(config: ScheduleConfig, sampler: SamplerConfig) -> list[tuple[float, float]]:
    """Per step of a student (p, q), such that x' = p x - q prediction is one step of its sampler."""
    schedule = NoiseSchedule(config)
    if integrates_flow(sampler):
        times = flow_times(sampler.steps, sampler.time_shift)
        return [(1.0, float(times[i] - times[i + 1])) for i in range(sampler.steps)]
    grid = timesteps(config.num_train_timesteps, sampler.steps)
    a, s = (np.append(level[grid], end) for level, end in ((schedule.a, 1.0), (schedule.s, 0.0)))
    # DDIM of v in its angle: x' = cos(d) x - sin(d) v (2202.00512, appendix D)
    return [
        (float(a[i] * a[i + 1] + s[i] * s[i + 1]), float(a[i + 1] * s[i] - a[i] * s[i + 1]))
        for i in range(sampler.steps)
    ]


@torch.no_grad()
def fold_guidance(denoiser: Denoiser, scale: float) -> None:
    """Guide a Gaussian denoiser's closed form once and for all, in place; a student learns the rest, which its network says.

    Its estimate is affine in the mean that the covariates predict: null + scale * (known - null) is the estimate for slopes
    that are `scale` times as steep. Other denoisers stay as they are: all of their guidance is learnt.
    """
    if denoiser.gaussian is not None:
        denoiser.gaussian.latents.mean_map[1:] *= scale
        if denoiser.gaussian.latents.products:
            denoiser.gaussian.latents.product_map *= scale


def step_targets(
    states: Tensor, steps: Tensor, config: ScheduleConfig, sampler: SamplerConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, target, q) of a batch: states (B, n + 1, C, X, Y, Z) and the step (B,) of each, 0 for the one from noise.

    `target` is the prediction with which a step of `sampler` leads from x to the trajectory's next state; an error of the
    prediction is, times q (B,), an error of that state.
    """
    rows = torch.arange(len(states))
    x, following = states[rows, steps], states[rows, steps + 1]
    p, q = torch.tensor(_arcs(config, sampler), dtype=torch.float64)[steps].unbind(1)
    shape = (-1, *(1,) * (x.ndim - 1))
    target = (p.view(shape) * x.double() - following.double()) / q.view(shape)
    return x, target.float(), q.float()
