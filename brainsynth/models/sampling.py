"""From a sampler's config to latents. Randomness enters as an argument, one stream per sample, so no batch mate counts.

Which method at how many evaluations is as good as which: docs/samplers.md.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from brainsynth.config.schema import SamplerConfig
from brainsynth.models.device import ready_to_copy
from brainsynth.models.sampler_rules import METHODS, Run, check_sampler
from brainsynth.models.schedule import NoiseSchedule
from brainsynth.models.solvers import Predict, StepNoise


def draw_noise(seeds: Sequence[int], shape: tuple[int, ...], step: int = 0) -> Tensor:
    """(B, *shape) standard normal float32 noise, one CPU stream per sample: no batch mate or device changes it.

    Step 0 is where sampling starts; stochastic samplers ask for steps 1, 2, … Philox4x64 (Salmon et al. 2011) keyed by the
    whole seed, the step in the counter's upper half, and Box-Muller in float64. torch's own CPU generator looks at the lower
    32 bits of a seed only: of 100,000 subjects one or two pairs would share their noise.
    """
    return torch.stack([_normal(int(seed), step, math.prod(shape)).view(shape) for seed in seeds])


def _normal(seed: int, step: int, count: int) -> Tensor:
    half = (count + 1) // 2
    # Raw words are the same in every version of NumPy; its normal variates may change.
    stream = np.random.Philox(key=seed, counter=step << 128)
    words = np.asarray(stream.random_raw(2 * half)) >> np.uint64(11)
    uniform = (words.astype(np.float64) + 1.0) * 2.0**-53  # in (0, 1]
    radius, angle = np.sqrt(-2.0 * np.log(uniform[:half])), 2.0 * np.pi * uniform[half:]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    return torch.from_numpy(normal.astype(np.float32))


def sample_latents(
    predict: Predict,
    noise: Tensor,
    schedule: NoiseSchedule,
    sampler: SamplerConfig,
    step_noise: StepNoise | None = None,
) -> Tensor:
    """Run a sampler from noise to latents, both (B, C, X, Y, Z) float32.

    Args:
        predict: the network, with context and guidance bound (see `guided`).
        noise: where to start, standard normal.
        schedule: the one the network was trained with.
        sampler: method, steps and their options.
        step_noise: fresh noise of each step, for `ddpm` and for `ddim` with eta above 0; the others never ask.

    Raises:
        UserError: when the method does not fit what the network predicts.
        ValueError: when a stochastic sampler gets no `step_noise`.
    """
    check_sampler(schedule.config, sampler)
    method = METHODS[sampler.method]
    return method.solve(Run(predict, noise, schedule, sampler, method.grid(schedule, sampler), step_noise))


def sample_rows(
    denoiser: Callable[[Tensor, Tensor, Tensor], Tensor],
    context: Tensor,
    seeds: Sequence[int],
    shape_cxyz: tuple[int, ...],
    schedule: NoiseSchedule,
    sampler: SamplerConfig,
) -> Tensor:
    """Latents (B, C, X, Y, Z) of rows: of each one's context (B, K), on the device that computes, and seed."""
    draw = functools.partial(draw_noise, seeds, shape_cxyz)
    predict = guided(denoiser, context, sampler.guidance_scale, sampler.guidance_interval, schedule)
    with contextlib.ExitStack() as stack:
        ahead = stack.enter_context(drawn_ahead(draw, sampler.steps)) if context.device.type != "cpu" else draw
        return sample_latents(predict, draw(0).to(context.device), schedule, sampler, ahead)


@contextlib.contextmanager
def drawn_ahead(draw: StepNoise, steps: int) -> Iterator[StepNoise]:
    """The same noise, of which that of the next step is drawn while a device computes this one, once the first was asked."""
    with ThreadPoolExecutor(1) as pool:

        def begin(step: int) -> Future[Tensor]:
            return pool.submit(lambda: ready_to_copy(draw(step)))

        waiting: dict[int, Future[Tensor]] = {}

        def noise(step: int) -> Tensor:
            now = waiting.pop(step, None) or begin(step)
            if step + 1 < steps:
                waiting[step + 1] = begin(step + 1)
            return now.result()

        yield noise


def guided(
    predict_context: Callable[[Tensor, Tensor, Tensor], Tensor],
    context: Tensor,
    scale: float,
    interval: tuple[float, float] | None = None,
    schedule: NoiseSchedule | None = None,
) -> Predict:
    """A `Predict` with the context bound and classifier-free guidance (2207.12598): null + scale * (known - null).

    Both go through the network as one batch of twice the size. With an interval (2404.07724) only steps whose noise level
    s/a in `schedule` lies within it are guided; the others cost one evaluation of the plain batch.
    """

    def predict(x: Tensor, t: float) -> Tensor:
        times = torch.full((x.shape[0],), t, device=x.device, dtype=torch.float32)
        if scale == 1.0 or not active(t):
            return predict_context(x, times, context)
        both = torch.cat([context, torch.zeros_like(context)])
        known, null = predict_context(torch.cat([x, x]), torch.cat([times, times]), both).chunk(2)
        return null + scale * (known - null)

    def active(t: float) -> bool:
        if interval is None:
            return True
        if schedule is None:
            raise ValueError("an interval needs the schedule")
        return interval[0] <= schedule.noise_level(t) <= interval[1]

    return predict
