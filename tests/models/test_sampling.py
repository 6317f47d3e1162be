"""Noise per sample, guidance, and which sampler fits which network. What samplers yield: test_solvers.py."""

from __future__ import annotations

import dataclasses
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from brainsynth.config.schema import SAMPLER_OPTIONS, SamplerConfig
from brainsynth.config.training import ScheduleConfig
from brainsynth.errors import UserError
from brainsynth.models.sampler_rules import METHODS, check_sampler
from brainsynth.models.sampling import draw_noise, drawn_ahead, guided, sample_latents
from brainsynth.models.schedule import NoiseSchedule, timesteps
from brainsynth.plan import seed_for


def test_target_and_denoised_are_inverse() -> None:
    for prediction, zero, step in (("epsilon", False, 300), ("v", False, 300), ("flow", False, 300), ("v", True, 999)):
        schedule = NoiseSchedule(ScheduleConfig(prediction=prediction, zero_terminal_snr=zero))
        x0, noise, t = torch.randn(4, 2, 3, 3, 3), torch.randn(4, 2, 3, 3, 3), torch.tensor([step] * 4)
        found = schedule.denoised(schedule.target(x0, noise, t), schedule.add_noise(x0, noise, t), step)
        torch.testing.assert_close(found, (x0, noise), rtol=1e-4, atol=1e-4)
        if zero:
            assert torch.equal(schedule.add_noise(x0, noise, t), noise)


PINNED = [[-0.036038100719451904, 0.719794511795044, 0.3174601197242737]]


def test_noise_of_a_sample_does_not_depend_on_its_batch() -> None:
    batch = draw_noise([5, 6, 7], (2, 4, 4, 4))
    assert torch.equal(batch[1], draw_noise([6], (2, 4, 4, 4))[0])
    assert not torch.equal(batch[0], batch[1])


@pytest.mark.parametrize("sampler", [SamplerConfig(method="ddpm", steps=5), SamplerConfig(method="unipc", steps=5)])
def test_noise_drawn_ahead_is_the_same_and_no_more(sampler: SamplerConfig) -> None:
    asked: list[int] = []

    def draw(step: int) -> torch.Tensor:
        asked.append(step)
        return draw_noise([5, 6], (1, 3, 3, 3), step)

    schedule = NoiseSchedule(ScheduleConfig(prediction="epsilon"))
    start, predict = draw_noise([5, 6], (1, 3, 3, 3)), lambda x, t: 0.5 * x
    expected = sample_latents(predict, start, schedule, sampler, draw)
    before = [*asked]
    asked.clear()
    with drawn_ahead(draw, sampler.steps) as ahead:
        assert torch.equal(sample_latents(predict, start, schedule, sampler, ahead), expected)
    assert asked == before == ([1, 2, 3, 4] if sampler.method == "ddpm" else [])


def test_every_bit_of_a_seed_counts() -> None:
    seeds = [0, 1, 2**31, 2**32, 2**33, 2**40, 2**62, 2**63 - 1, 2**32 + 1]
    noise = draw_noise(seeds, (3, 5, 5, 5))
    for i in range(len(seeds)):
        for j in range(i):
            assert abs(torch.corrcoef(noise[[i, j]].flatten(1))[0, 1]) < 0.2, (seeds[i], seeds[j])
    many = draw_noise([seed_for(0, f"syn{row:06d}") for row in range(20_000)], (8,))
    assert len(torch.unique(many, dim=0)) == 20_000


def test_noise_is_standard_normal_and_stays_what_it_was() -> None:
    noise = draw_noise(range(40), (3, 20, 28, 20)).double()
    assert noise.dtype == torch.float64
    assert abs(noise.mean()) < 0.004
    assert abs(noise.var() - 1) < 0.005
    assert abs((noise**4).mean() - 3) < 0.03
    assert noise.abs().max() < 8.6
    # Every dataset that was made is made again from these numbers: they may never change.
    first = draw_noise([123456789012345678], (1, 1, 1, 3))[0, 0, 0]
    torch.testing.assert_close(first, torch.tensor(PINNED), rtol=1e-6, atol=1e-6)


def test_timesteps_start_at_pure_noise_and_are_even() -> None:
    assert timesteps(1000, 50)[0] == 999
    assert timesteps(1000, 50)[-1] == 19
    assert timesteps(1000, 1000) == list(range(999, -1, -1))


class Counted:
    """A network that sums its context, and remembers the batches it saw."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(x))
        return x + t.view(-1, 1, 1, 1, 1) + context.sum(1).view(-1, 1, 1, 1, 1)


def test_guidance_extrapolates_from_the_null_context_in_one_batch() -> None:
    context, x, network = torch.tensor([[1.0, 2.0], [0.5, 0.0]]), torch.randn(2, 1, 2, 2, 2), Counted()
    found = guided(network, context, 2.0)(x, 3.0)
    assert network.batches == [4]
    times = torch.full((2,), 3.0)
    known, null = network(x, times, context), network(x, times, torch.zeros_like(context))
    assert torch.equal(found, null + 2.0 * (known - null))
    assert torch.equal(guided(network, context, 1.0)(x, 3.0), known)
    assert network.batches == [4, 2, 2, 2]


@pytest.mark.parametrize(("prediction", "method"), [("v", "ddim"), ("flow", "euler")])
def test_outside_its_interval_guidance_costs_nothing(prediction: str, method: str) -> None:
    schedule, network = NoiseSchedule(ScheduleConfig(prediction=prediction)), Counted()
    sampler = SamplerConfig(method=method, steps=20, guidance_scale=1.5, guidance_interval=(0.3, 3.0))
    predict = guided(network, torch.ones(2, 3), sampler.guidance_scale, sampler.guidance_interval, schedule)
    sample_latents(predict, draw_noise([1, 2], (1, 2, 2, 2)), schedule, sampler)
    if prediction == "flow":
        levels = [t / (1 - t) if t < 1 else np.inf for t in np.linspace(1, 0, 21)[:-1]]
    else:
        levels = [schedule.s[t] / schedule.a[t] for t in timesteps(1000, 20)]
    assert network.batches == [4 if 0.3 <= level <= 3.0 else 2 for level in levels]
    assert 4 < network.batches.count(4) < 16


def test_only_the_network_counts_not_what_it_is_trained_to_predict() -> None:
    """One network read as v and, by a e + s x, as epsilon: the samplers see the same x_0."""
    schedules = {kind: NoiseSchedule(ScheduleConfig(prediction=kind)) for kind in ("epsilon", "v")}
    noise = draw_noise(range(4), (1, 4, 4, 4)).double()
    v = lambda x, t: torch.tanh(0.5 * x - t / 1000)  # noqa: E731

    def epsilon(x: torch.Tensor, t: float) -> torch.Tensor:
        return float(schedules["v"].a[int(t)]) * v(x, t) + float(schedules["v"].s[int(t)]) * x

    for method in ("ddim", "dpmpp_2m", "unipc"):
        sampler = SamplerConfig(method=method, steps=8)
        found = sample_latents(epsilon, noise, schedules["epsilon"], sampler)
        torch.testing.assert_close(found, sample_latents(v, noise, schedules["v"], sampler))


def test_every_method_of_the_config_has_its_entry() -> None:
    methods = get_args(get_type_hints(SamplerConfig)["method"])
    assert tuple(METHODS) == methods
    assert {name for _, takers in SAMPLER_OPTIONS.values() for name in takers} <= set(methods)
    assert set(SAMPLER_OPTIONS) <= {option.name for option in dataclasses.fields(SamplerConfig)}
    predictions = get_args(get_type_hints(ScheduleConfig)["prediction"])
    assert {kind for method in METHODS.values() for kind in method.predictions} == set(predictions)


def test_method_must_fit_the_prediction() -> None:
    with pytest.raises(UserError, match="use euler, heun or ab2"):
        check_sampler(ScheduleConfig(prediction="flow"), SamplerConfig(method="ddim", steps=5))
    with pytest.raises(UserError, match="more than the 1000"):
        check_sampler(ScheduleConfig(prediction="v"), SamplerConfig(method="ddim", steps=5000))


@pytest.mark.parametrize(
    ("first", "told"), [(1000, "from sampler.steps, 8, to 999"), (7, "to 999"), (8, "less noise than the last")]
)
def test_where_sampling_cannot_begin(first: int, told: str) -> None:
    sampler = SamplerConfig(method="unipc", steps=8, last_log_snr=1.0, first_timestep=first)
    with pytest.raises(UserError, match=told):
        check_sampler(ScheduleConfig(prediction="v"), sampler)


def test_sampling_begins_where_it_is_asked_to() -> None:
    seen: list[float] = []

    def predict(x: torch.Tensor, t: float) -> torch.Tensor:
        seen.append(t)
        return x

    sampler = SamplerConfig(method="unipc", steps=8, first_timestep=980)
    sample_latents(predict, torch.ones(1, 1, 2, 2, 2), NoiseSchedule(ScheduleConfig(prediction="v")), sampler)
    assert (seen[0], len(seen)) == (980.0, 8)
