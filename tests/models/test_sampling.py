"""Samplers against distributions whose score is known in closed form."""

from __future__ import annotations

import pytest
import torch

from brainsynth.config.schema import SamplerConfig
from brainsynth.config.training import ScheduleConfig
from brainsynth.errors import UserError
from brainsynth.models.sampling import NoiseSchedule, check_sampler, draw_noise, guided, sample_latents, timesteps
from brainsynth.plan import seed_for

MEAN, STD = 0.7, 0.5


def exact(schedule: NoiseSchedule):
    """The perfect network for data N(MEAN, STD²), whatever it predicts."""

    def predict(x: torch.Tensor, t: float) -> torch.Tensor:
        index = torch.full((x.shape[0],), round(t))
        a, s = float(schedule.a[int(index[0])]), float(schedule.s[int(index[0])])
        if schedule.config.prediction == "flow":  # between training timesteps the flow is exact too
            s = (t + 1) / schedule.config.num_train_timesteps
            a = 1 - s
        gain = a * STD**2 / (a**2 * STD**2 + s**2)
        x0 = MEAN + gain * (x - a * MEAN)
        noise = (x - a * x0) / s
        return {"epsilon": noise, "v": a * noise - s * x0, "flow": noise - x0}[schedule.config.prediction]

    return predict


@pytest.mark.parametrize(
    ("prediction", "method", "steps", "tolerance"),
    [
        ("epsilon", "ddim", 200, 0.02),
        ("v", "ddim", 200, 0.02),
        ("v", "dpmpp_2m", 20, 0.04),
        ("epsilon", "dpmpp_2m", 20, 0.04),
        ("flow", "euler", 200, 0.02),
        ("flow", "ab2", 20, 0.02),
    ],
)
def test_samplers_reach_a_known_gaussian(prediction: str, method: str, steps: int, tolerance: float) -> None:
    schedule = NoiseSchedule(ScheduleConfig(prediction=prediction))
    noise = draw_noise(range(64), (1, 8, 8, 8))
    x = sample_latents(exact(schedule), noise, schedule, SamplerConfig(method=method, steps=steps))
    assert float(x.mean()) == pytest.approx(MEAN, abs=tolerance)
    assert float(x.std()) == pytest.approx(STD, rel=2 * tolerance)


def test_second_order_beats_first_at_equal_cost() -> None:
    schedule = NoiseSchedule(ScheduleConfig(prediction="flow"))
    noise = draw_noise(range(16), (1, 8, 8, 8))
    run = lambda method, steps: sample_latents(  # noqa: E731
        exact(schedule), noise, schedule, SamplerConfig(method=method, steps=steps)
    )
    truth = run("ab2", 400)
    assert float((run("ab2", 10) - truth).pow(2).mean()) < 0.5 * float((run("euler", 10) - truth).pow(2).mean())


def test_target_and_denoised_are_inverse() -> None:
    for prediction in ("epsilon", "v", "flow"):
        schedule = NoiseSchedule(ScheduleConfig(prediction=prediction))
        x0, noise, t = torch.randn(4, 2, 3, 3, 3), torch.randn(4, 2, 3, 3, 3), torch.tensor([300] * 4)
        found = schedule.denoised(schedule.target(x0, noise, t), schedule.add_noise(x0, noise, t), 300)
        torch.testing.assert_close(found, (x0, noise), rtol=1e-4, atol=1e-4)


PINNED = [[-0.036038100719451904, 0.719794511795044, 0.3174601197242737]]


def test_noise_of_a_sample_does_not_depend_on_its_batch() -> None:
    batch = draw_noise([5, 6, 7], (2, 4, 4, 4))
    assert torch.equal(batch[1], draw_noise([6], (2, 4, 4, 4))[0])
    assert not torch.equal(batch[0], batch[1])


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


def test_guidance_extrapolates_from_the_null_context() -> None:
    context = torch.ones(2, 3)
    predict = guided(lambda x, t, c: c.sum(1).view(-1, 1, 1, 1, 1).expand_as(x), context, 2.0)
    assert torch.equal(predict(torch.zeros(2, 1, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1, 1), 6.0))


def test_method_must_fit_the_prediction() -> None:
    with pytest.raises(UserError, match="use euler or ab2"):
        check_sampler(ScheduleConfig(prediction="flow"), SamplerConfig(method="ddim", steps=5))
    with pytest.raises(UserError, match="more than the 1000"):
        check_sampler(ScheduleConfig(prediction="v"), SamplerConfig(method="ddim", steps=5000))
