"""How near a student's latents come: known errors, equal sets, and what is refused."""

from __future__ import annotations

import pytest
import torch

from brainsynth.errors import UserError
from brainsynth.evaluation.step_fidelity import latent_features, measure_steps


def latents(seed: int, count: int = 40) -> torch.Tensor:
    return torch.randn(count, 3, 4, 5, 4, generator=torch.Generator().manual_seed(seed))


def test_equal_latents_have_no_error() -> None:
    found = measure_steps(latents(1), latents(1))
    assert (found.latent_error.value, found.latent_error.high) == (0.0, 0.0)
    assert found.frechet.high == pytest.approx(0.0, abs=1e-6)


def test_the_error_is_relative_and_the_intervals_hold_the_value() -> None:
    reference = latents(1)
    found = measure_steps(3 * (1.1 * reference), 3 * reference)
    assert found.latent_error.value == pytest.approx(0.1, rel=1e-4)
    noisy = measure_steps(reference + 0.2 * latents(2), reference)
    for figure in (noisy.latent_error, noisy.frechet):
        assert figure.low < figure.value < figure.high
    assert noisy.latent_error.value == pytest.approx(0.2, rel=0.05)


def test_frechet_sees_a_changed_distribution_and_not_a_changed_order() -> None:
    reference = latents(1, 200)
    near = measure_steps(reference.flip(0), reference)
    blurred = measure_steps(0.7 * reference, reference)
    assert near.latent_error.value > 1
    assert blurred.latent_error.value < 0.4
    assert near.frechet.value < 1e-6 < 0.1 < blurred.frechet.value
    assert latent_features(reference).shape == (200, 16)


def test_too_few_or_broken_latents_are_refused() -> None:
    with pytest.raises(UserError, match="more than 16 held-out latents"):
        measure_steps(latents(1, 16), latents(1, 16))
    broken = latents(1)
    broken[3, 0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="all finite"):
        measure_steps(broken, latents(1))
