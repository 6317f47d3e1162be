"""The Gaussian denoiser: exact where latents are Gaussian, fitted to what was left out."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from brainsynth.bundle.files import bundle_folder, read_bundle
from brainsynth.config.architectures import GaussianArchitecture
from brainsynth.config.schema import SHIPPED_BUNDLE, SamplerConfig
from brainsynth.config.training import ScheduleConfig
from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.errors import UserError
from brainsynth.models.diffusion import Denoiser
from brainsynth.models.gaussian_denoiser import ADDED, GaussianLatents
from brainsynth.models.loading import load_models
from brainsynth.models.sampling import guided, sample_latents
from brainsynth.models.schedule import NoiseSchedule
from brainsynth.models.weights import load_weights, save_weights
from brainsynth.training.gaussian_fit import emphasise, fit_asymmetry, fit_gaussian

SHAPE, CONTEXT = (2, 4, 2, 2), 2
ARCHITECTURE = GaussianArchitecture(
    kind="gaussian", rank=2, rank_channels=1, channels=(8, 8), embedding=8, norm_groups=4
)
CELLS = math.prod(SHAPE)


def model() -> Denoiser:
    torch.manual_seed(3)
    denoiser = Denoiser(ARCHITECTURE, SHAPE[0], CONTEXT, SHAPE[1:])
    assert denoiser.gaussian is not None
    latents = denoiser.gaussian.latents
    latents.mean_map.copy_(torch.randn(latents.mean_map.shape))
    latents.factors.copy_(torch.randn(latents.factors.shape))
    latents.variance.copy_(0.1 + torch.rand(latents.variance.shape))
    return denoiser.eval()


def moments(latents: GaussianLatents, context: Tensor) -> tuple[Tensor, Tensor]:
    """Dense mean (B, D) and covariance (D, D) of z, in float64."""
    mean = latents.mean_map[0].flatten() + context @ latents.mean_map[1:].flatten(1)
    factors = torch.zeros(CELLS, 2)
    factors[: len(latents.factors)] = latents.factors
    covariance = factors @ factors.T + torch.diag(latents.variance.flatten())
    return mean.double(), covariance.double()


def test_untrained_it_predicts_what_the_dense_formula_says() -> None:
    denoiser = model()
    assert denoiser.gaussian is not None
    context = torch.rand(3, CONTEXT)
    x = torch.randn(3, *SHAPE)
    for t in (0.05, 0.5, 1.0):
        mean, covariance = moments(denoiser.gaussian.latents, context)
        noisy = (1 - t) ** 2 * covariance + t**2 * torch.eye(CELLS, dtype=torch.float64)
        surprise = x.flatten(1).double() - (1 - t) * mean
        z = mean + (1 - t) * surprise @ torch.linalg.solve(noisy, covariance)
        flow = (x.flatten(1).double() - z) / t  # E[e - z | x_t], for e = (x_t - (1 - t) z) / t
        found = denoiser(x, torch.full((3,), 1000 * t - 1), context)
        torch.testing.assert_close(found.flatten(1).double(), flow, rtol=1e-4, atol=1e-4)


def test_samples_have_the_models_mean_and_covariance() -> None:
    denoiser = model()
    assert denoiser.gaussian is not None
    count = 4000
    context = torch.tensor([[0.3, 0.9]]).expand(count, -1)
    noise = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))
    schedule = NoiseSchedule(ScheduleConfig(prediction="flow"))
    with torch.no_grad():
        z = sample_latents(guided(denoiser, context, 1.0), noise, schedule, SamplerConfig(method="ab2", steps=60))
    mean, covariance = moments(denoiser.gaussian.latents, context[:1])
    flat = z.flatten(1).double()
    spread = covariance.diagonal().sqrt()
    assert float(((flat.mean(0) - mean[0]) / spread).abs().max()) < 5 / math.sqrt(count)
    error = (torch.cov(flat.T) - covariance) / (spread[:, None] * spread)
    assert float(error.abs().max()) < 0.12


def test_the_expected_error_is_that_of_a_diagonal_model() -> None:
    denoiser = model()
    assert denoiser.gaussian is not None
    latents = denoiser.gaussian.latents
    latents.factors.zero_()
    count, t = 20000, 0.3
    asked = torch.full((count,), 1000 * t - 1)
    context = torch.zeros(count, CONTEXT)
    z = latents.mean_map[0] + latents.variance.sqrt() * torch.randn(count, *SHAPE)
    noise = torch.randn(z.shape)
    with torch.no_grad():
        found = denoiser((1 - t) * z + t * noise, asked, context)
    error = float((found - (noise - z)).pow(2).mean())
    assert error == pytest.approx(float(denoiser.gaussian.expected_error(asked[:1])), rel=0.02)


def persons(count: int, effect: float, strength: float) -> tuple[Tensor, Tensor, list[str], Tensor]:
    generator = torch.Generator().manual_seed(1)
    context = torch.rand(count, CONTEXT, generator=generator)
    slope, shared = torch.randn(2, *SHAPE, generator=generator)
    shared[1:] = 0  # one component, within the first channel
    own = torch.randn(count, 1, 1, 1, 1, generator=generator)
    noise = torch.randn(count, *SHAPE, generator=generator)
    z = 2.0 + effect * context[:, :1, None, None, None] * slope + strength * own * shared + 0.5 * noise
    return z, context, [f"s{i // 2}" for i in range(count)], slope


def test_the_fit_finds_slopes_components_and_the_rest() -> None:
    z, context, subjects, slope = persons(2000, 3.0, 1.0)
    latents = GaussianLatents(SHAPE, CONTEXT, 2, 1)
    fit_gaussian(latents, z, context, subjects)
    torch.testing.assert_close(latents.mean_map[1], 3 * slope, rtol=0.1, atol=0.25)
    found = (latents.factors @ latents.factors.T).diagonal().sum()
    wanted = torch.cov((z[:, 0].flatten(1) - context[:, :1] * 3 * slope[0].flatten()).T).diagonal().sum() - 16 * 0.25
    assert float(found) == pytest.approx(float(wanted), rel=0.15)
    assert float(latents.variance[1].mean()) == pytest.approx(0.25, rel=0.15)


def test_components_of_mere_noise_are_not_believed() -> None:
    z, context, subjects, _ = persons(30, 0.0, 0.0)
    latents = GaussianLatents(SHAPE, CONTEXT, 2, 1)
    fit_gaussian(latents, z, context, subjects)
    known = torch.cat([torch.ones(30, 1), context], 1)
    rest = z[:, 0].flatten(1)
    rest = rest - known @ torch.linalg.lstsq(known, rest).solution
    in_sample = torch.linalg.svdvals(rest)[:2].pow(2) / 30
    believed = latents.factors.pow(2).sum(0)
    assert float(believed.sum()) < 0.75 * float(in_sample.sum())
    with pytest.raises(ValueError, match="too few"):
        fit_gaussian(latents, z[:6], context[:6], subjects[:6])


def test_another_grid_than_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match="grid_xyz"):
        Denoiser(ARCHITECTURE, SHAPE[0], CONTEXT)


def test_a_deeper_denoiser_begins_as_the_one_it_starts_from(tmp_path: Path) -> None:
    shallow = model()
    for parameter in shallow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_weights(shallow, tmp_path / "diffusion.safetensors")
    deeper = Denoiser(dataclasses.replace(ARCHITECTURE, finest_blocks=3), SHAPE[0], CONTEXT, SHAPE[1:])
    with pytest.raises(UserError, match="missing"):
        load_weights(deeper, tmp_path / "diffusion.safetensors")
    load_weights(deeper, tmp_path / "diffusion.safetensors", may_lack=ADDED)
    x, t, context = torch.randn(2, *SHAPE), torch.tensor([100.0, 800.0]), torch.rand(2, CONTEXT)
    assert torch.equal(deeper(x, t, context), shallow(x, t, context))
    deeper(x, t, context).square().sum().backward()
    gradients = {
        n: p.grad for n, p in deeper.named_parameters() if n.startswith(ADDED[0]) and n.endswith("conv2.weight")
    }
    assert len(gradients) == 4
    assert all(bool(g is not None and g.any()) for g in gradients.values()), "the new blocks learn"
    save_weights(deeper, tmp_path / "deeper.safetensors")
    with pytest.raises(UserError, match="unknown"):
        load_weights(shallow, tmp_path / "deeper.safetensors", may_lack=ADDED)


@pytest.mark.parametrize("changes", range(4))
def test_a_copy_does_not_answer_with_what_was_kept_of_the_original(changes: int) -> None:
    """Kept by how often a buffer changed, which a copy counts anew: after some number of changes they meet."""
    original, other = model(), model()
    assert original.gaussian is not None
    assert other.gaussian is not None
    for _ in range(changes):
        for buffer in (original.gaussian.latents.factors, original.gaussian.latents.variance):
            buffer.mul_(1.0)
    other.gaussian.latents.factors.mul_(3.0)
    x, t, context = torch.randn(1, *SHAPE), torch.tensor([500.0]), torch.rand(1, CONTEXT)
    original(x, t, context)
    copied = copy.deepcopy(original)
    copied.load_state_dict(other.state_dict())
    assert torch.equal(copied(x, t, context), other(x, t, context))


CROSSED = dataclasses.replace(ARCHITECTURE, crossed="site")
SCHEMA = CovariateSchema(
    covariates=(
        Covariate(name="age", kind="continuous", low=0.0, high=1.0),
        Covariate(name="site", kind="binary", categories=("a", "b")),
    ),
    missing="refuse",
)


def people(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of scans whose slope along age depends on the site, their context, and a lasting asymmetry."""
    generator = torch.Generator().manual_seed(2)
    context = torch.stack([torch.rand(count, generator=generator), (torch.arange(count) % 2).float()], 1)
    slope, change, asymmetry = torch.randn(3, *SHAPE, generator=generator)
    change[ARCHITECTURE.rank_channels :] = 0
    age, site = context[:, 0, None, None, None, None], context[:, 1, None, None, None, None]
    z = age * slope + age * site * change + asymmetry
    return z + 0.01 * torch.randn(z.shape, generator=generator), context, asymmetry


def test_crossed_each_site_has_its_own_slopes() -> None:
    z, context, _ = people(400)
    denoiser = Denoiser(CROSSED, SHAPE[0], CONTEXT, SHAPE[1:], SCHEMA)
    plain = Denoiser(ARCHITECTURE, SHAPE[0], CONTEXT, SHAPE[1:], SCHEMA)
    errors = []
    for each in (denoiser, plain):
        assert each.gaussian is not None
        fit_gaussian(each.gaussian.latents, z, context, [f"s{i}" for i in range(400)])
        errors.append(float((each.gaussian.latents.mean(context) - z).square().mean()))
    assert errors[0] < 0.001 < 0.005 < errors[1]


def test_a_site_s_slope_along_a_logarithmic_covariate_is_closer_to_the_common_one() -> None:
    z, context, _ = people(40)
    maps = []
    for curved in (frozenset(), frozenset({0})):
        denoiser = Denoiser(CROSSED, SHAPE[0], CONTEXT, SHAPE[1:], SCHEMA)
        assert denoiser.gaussian is not None
        fit_gaussian(denoiser.gaussian.latents, z, context, [f"s{i}" for i in range(40)], curved=curved)
        maps.append(float(denoiser.gaussian.latents.product_map.square().mean()))
    assert maps[1] < 0.5 * maps[0]
    logarithmic = dataclasses.replace(SCHEMA.covariates[0], low=0.1, scale="log")
    assert dataclasses.replace(SCHEMA, covariates=(SCHEMA.covariates[1], logarithmic)).logarithmic() == {1}
    assert SCHEMA.logarithmic() == frozenset()


@pytest.mark.parametrize("crossed", ["", "site"])
def test_emphasis_makes_slopes_steeper_about_the_middle_of_each_site(crossed: str) -> None:
    z, context, _ = people(200)
    context[:, 0] += 0.5 * context[:, 1]  # one site is older
    flagged = torch.cat([context, torch.ones_like(context)], 1)
    flagged[0, [0, 2]] = 0  # of one the age is not known
    schema = dataclasses.replace(SCHEMA, missing="indicator")
    denoiser = Denoiser(dataclasses.replace(ARCHITECTURE, crossed=crossed), SHAPE[0], 4, SHAPE[1:], schema)
    assert denoiser.gaussian is not None
    model = denoiser.gaussian.latents
    fit_gaussian(model, z, flagged, [f"s{i}" for i in range(200)])

    def means() -> Tensor:
        rows = torch.tensor([[age, site, 1.0, 1.0] for site in (0.0, 1.0) for age in (0.2, 0.7)] + [[0.0, 0, 0, 0]])
        return model.mean(rows)

    before, of_people = means(), model.mean(flagged[1:])
    emphasise(model, flagged, schema.by_position({"age": 1.5}, "emphasis"), flagged=True)
    after = means()
    torch.testing.assert_close(after[1] - after[0], 1.5 * (before[1] - before[0]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after[3] - after[2], 1.5 * (before[3] - before[2]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after[4], before[4])  # nothing known
    first = ARCHITECTURE.rank_channels if crossed else 0
    for site in (0, 1) if crossed else ():
        its = context[1:, 1] == site
        torch.testing.assert_close(
            model.mean(flagged[1:])[its, :first].mean(0), of_people[its, :first].mean(0), rtol=1e-3, atol=1e-3
        )
    torch.testing.assert_close(
        model.mean(flagged[1:])[:, first:].mean(0), of_people[:, first:].mean(0), rtol=1e-3, atol=1e-3
    )


def test_the_network_is_not_asked_where_there_is_much_noise() -> None:
    quiet, asked = (
        Denoiser(dataclasses.replace(ARCHITECTURE, network_until=until), SHAPE[0], CONTEXT, SHAPE[1:]).eval()
        for until in (0.6, 1.0)
    )
    assert quiet.gaussian is not None
    assert asked.gaussian is not None
    torch.nn.init.normal_(quiet.gaussian.network.last.weight, generator=torch.Generator().manual_seed(0))
    asked.load_state_dict(quiet.state_dict())
    untrained = Denoiser(ARCHITECTURE, SHAPE[0], CONTEXT, SHAPE[1:]).eval()
    z, context = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.zeros(3, CONTEXT)
    t = torch.tensor([300.0, 599.0, 700.0])
    alone, whole = untrained(z, t, context), asked(z, t, context)
    for made in (quiet(z, t, context), quiet.train()(z, t, context).detach()):
        torch.testing.assert_close(made[:2], whole[:2])
        torch.testing.assert_close(made[2], alone[2])
        assert not torch.allclose(alone[:2], whole[:2])
    calls: list[int] = []
    quiet.gaussian.network.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        torch.testing.assert_close(quiet(z, t + 400, context), untrained(z, t + 400, context))
        assert not calls
        quiet(z, t, context)
    assert len(calls) == 1


def test_a_loaded_model_is_guided_away_from_its_gaussian_and_one_in_training_is_not() -> None:
    folder, device = bundle_folder(SHIPPED_BUNDLE), torch.device("cpu")
    spec = read_bundle(folder)
    assert isinstance(spec.diffusion, GaussianArchitecture)
    x, t = torch.randn(1, *spec.latents.shape_cxyz), torch.tensor([649.0])
    context = torch.rand(1, spec.covariates.context_size)
    flows = []
    for weight in (1.0, 1.5, 2.5):
        architecture = dataclasses.replace(spec.diffusion, autoguidance=weight)
        _, loaded = load_models(folder, dataclasses.replace(spec, diffusion=architecture), device)
        flows.append(loaded(x, t, context))
    torch.testing.assert_close(flows[2] - flows[0], 3 * (flows[1] - flows[0]), rtol=1e-3, atol=1e-4)
    assert (flows[1] - flows[0]).abs().max() > 0.1
    guided_architecture = dataclasses.replace(ARCHITECTURE, autoguidance=2.0)
    trained = Denoiser(guided_architecture, SHAPE[0], CONTEXT, SHAPE[1:])
    assert trained.gaussian is not None
    assert trained.gaussian.guidance == 1.0
    with pytest.raises(ValueError, match="autoguidance must be 1 to 4"):
        dataclasses.replace(ARCHITECTURE, autoguidance=0.5)


def test_only_a_continuous_covariate_is_emphasised() -> None:
    with pytest.raises(UserError, match="emphasis: 'site' is not a continuous covariate; there are: age"):
        SCHEMA.by_position({"site": 1.2}, "emphasis")


def test_weights_of_a_crossed_mean_are_kept(tmp_path: Path) -> None:
    z, context, _ = people(50)
    denoiser = Denoiser(CROSSED, SHAPE[0], CONTEXT, SHAPE[1:], SCHEMA).eval()
    assert denoiser.gaussian is not None
    fit_gaussian(denoiser.gaussian.latents, z, context, [f"s{i}" for i in range(50)])
    save_weights(denoiser, tmp_path / "weights.safetensors")
    other = Denoiser(CROSSED, SHAPE[0], CONTEXT, SHAPE[1:], SCHEMA).eval()
    load_weights(other, tmp_path / "weights.safetensors")
    t = torch.full((3,), 500.0)
    torch.testing.assert_close(other(z[:3], t, context[:3]), denoiser(z[:3], t, context[:3]))


@pytest.mark.parametrize("name", ["age", "sites"])
def test_only_a_binary_covariate_is_crossed(name: str) -> None:
    with pytest.raises(UserError, match=f"architecture.crossed: '{name}' is not a binary covariate; there are: site"):
        Denoiser(dataclasses.replace(ARCHITECTURE, crossed=name), SHAPE[0], CONTEXT, SHAPE[1:], SCHEMA)


@pytest.mark.parametrize("architecture", [ARCHITECTURE, CROSSED])
def test_mirror_images_teach_the_network_and_leave_the_mean_that_of_scans(architecture: GaussianArchitecture) -> None:
    z, context, asymmetry = people(400)
    mirror = z - 2 * asymmetry  # as if a mirror image's latents were those of a scan with the opposite asymmetry
    both, contexts = torch.cat([z, mirror]), torch.cat([context, context])
    mirrored = torch.arange(800) >= 400
    denoiser = Denoiser(architecture, SHAPE[0], CONTEXT, SHAPE[1:], SCHEMA)
    assert denoiser.gaussian is not None
    latents = denoiser.gaussian.latents
    fit_gaussian(latents, both, contexts, [f"s{i % 400}" for i in range(800)], mirrored)
    torch.testing.assert_close(latents.asymmetry[0], asymmetry, rtol=0, atol=0.1)
    torch.testing.assert_close(latents.mean(context).mean(0), z.mean(0), rtol=0, atol=0.05)
    torch.testing.assert_close(
        latents.mean(context, torch.ones(400, dtype=torch.bool)).mean(0), mirror.mean(0), rtol=0, atol=0.05
    )
    assert "asymmetry" not in "".join(denoiser.state_dict())
    kept = Denoiser(architecture, SHAPE[0], CONTEXT, SHAPE[1:], SCHEMA)
    kept.load_state_dict(denoiser.state_dict())
    assert kept.gaussian is not None
    fit_asymmetry(kept.gaussian.latents, both + 0.3, contexts, mirrored)  # of another scanner
    torch.testing.assert_close(kept.gaussian.latents.asymmetry, latents.asymmetry, rtol=0, atol=0.01)
    torch.testing.assert_close(kept.gaussian.latents.mean(context), latents.mean(context))
    assert float(latents.variance.mean()) < 0.1 * float(asymmetry.square().mean()), "it is not noise"
