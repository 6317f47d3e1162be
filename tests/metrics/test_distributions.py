"""Cohen's d: known numbers, and what is refused."""

import numpy as np
import pytest

from brainsynth.errors import UserError
from brainsynth.metrics.distributions import cohens_d
from brainsynth.metrics.intervals import bootstrap_interval


def test_cohens_d_of_known_numbers():
    assert cohens_d([2.0, 4.0, 6.0], [1.0, 3.0, 5.0]) == pytest.approx(0.5)
    rng = np.random.default_rng(4)
    x, y = rng.normal(1.5, 3, 100_000), rng.normal(0, 3, 50_000)
    assert cohens_d(x, y) == pytest.approx(0.5, abs=0.02)
    assert cohens_d(y, x) == -cohens_d(x, y)
    found = bootstrap_interval(cohens_d, [x[:200], y[:200]], resamples=400)
    assert found.low < 0.5 < found.high
    assert found.low > 0


def test_what_has_no_answer_is_refused():
    with pytest.raises(UserError, match="1 of 3 values"):
        cohens_d([1.0, np.nan, 2.0], [1.0, 2.0])
    for wrong in ([1.0], np.zeros((2, 2))):
        with pytest.raises(UserError, match="list of at least"):
            cohens_d(wrong, [1.0, 2.0])
    with pytest.raises(UserError, match="constant"):
        cohens_d(np.ones(5), np.full(5, 2.0))
