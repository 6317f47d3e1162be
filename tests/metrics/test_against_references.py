"""Fréchet distance, KID, precision, recall, density and coverage beside independent implementations on fixed inputs.

Packages that are no dependencies were run once, in an environment of their own, on `inputs()`; what they gave stands here:
torch-fidelity 0.4.0 (`fid_statistics_to_metric`, `kid_features_to_metric` with subsets of all 400 rows, so that nothing is
drawn, and `prc_features_to_metric`) and prdc 0.2 with scikit-learn 1.9.1 (`compute_prdc`), NumPy 2.4.6.
"""

import numpy as np
import pytest
import torch
from monai.metrics import FIDMetric

from brainsynth.metrics.frechet import GaussianStats, frechet_distance, frechet_of_rows, squared_mmd
from brainsynth.metrics.manifold import manifold_membership

TORCH_FIDELITY_FID = 6.899331852673711
TORCH_FIDELITY_KID = 0.2972715399237418
TORCH_FIDELITY_PRECISION_RECALL = {3: (0.4225, 0.8575), 5: (0.5325, 0.9275)}
PRDC = {3: (0.4225, 0.8575, 0.29416666666666663, 0.4925), 5: (0.5325, 0.9275, 0.2915, 0.625)}


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Real and generated features: 400 rows of 48 correlated numbers each; the generated ones shifted and wider."""
    rng = np.random.default_rng(20)
    mixing = rng.standard_normal((48, 48)) / 48**0.5
    real = rng.standard_normal((400, 48)) @ mixing
    made = 0.3 + 1.1 * rng.standard_normal((400, 48)) @ mixing
    return real, made


def test_frechet_distance_is_that_of_monai_and_torch_fidelity():
    real, made = inputs()
    found = frechet_distance(GaussianStats.of(made), GaussianStats.of(real))
    assert found == pytest.approx(float(FIDMetric()(torch.from_numpy(made), torch.from_numpy(real))), rel=1e-4)
    assert found == pytest.approx(TORCH_FIDELITY_FID, rel=1e-4)


def test_with_fewer_rows_than_features_the_quick_way_is_the_long_way():
    real, made = inputs()
    x, y = made[:15], real[:20]
    assert frechet_of_rows(x, y) == pytest.approx(frechet_distance(GaussianStats.of(x), GaussianStats.of(y)), rel=1e-9)


def test_kernel_distance_is_that_of_torch_fidelity():
    real, made = inputs()
    assert squared_mmd(made, real) == pytest.approx(TORCH_FIDELITY_KID, rel=1e-4)


@pytest.mark.parametrize("k", [3, 5])
def test_precision_and_the_others_are_those_of_prdc_and_torch_fidelity(k):
    real, made = inputs()
    found = manifold_membership(real, made, k)
    assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(PRDC[k], rel=1e-4)
    assert (found.precision, found.recall) == pytest.approx(TORCH_FIDELITY_PRECISION_RECALL[k], rel=1e-4)
