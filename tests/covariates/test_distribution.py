"""The covariate distribution keeps what it claims to keep, on made-up cohorts and on real ones."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from brainsynth.covariates.arrays import to_arrays
from brainsynth.covariates.distribution import Constraint, CovariateDistribution, fit_distribution
from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.errors import UserError
from brainsynth.records import canonical_json, from_dict, seal, to_dict, unseal

DATA = Path(os.environ.get("BRAINSYNTH_DATA", Path(__file__).resolve().parents[1].parent / "shared" / "data"))
COHORTS = {
    "fcon1000": ("tables/fcon1000_freesurfer_volumes.tsv", "lat_vent_ml"),
    "ixi_fullres": ("tables/ixi_dlmuse_fullres_volumes.tsv", "vent_total_ml"),
    "ixi_2mm": ("ixi_2mm/participants.tsv", "vent_ml"),
}


def continuous(name: str, low: float, high: float, log: bool = False) -> Covariate:
    return Covariate(name=name, kind="continuous", low=low, high=high, scale="log" if log else "linear")


SEX = Covariate(name="sex", kind="binary", categories=("F", "M"))
SCHEMA = CovariateSchema(
    covariates=(
        continuous("age", 18, 95),
        SEX,
        continuous("vent_ml", 2, 250, log=True),
        continuous("brain_ml", 700, 1900),
    )
)
CONTINUOUS = ("age", "vent_ml", "brain_ml")
SITE = Covariate(name="site", kind="categorical", categories=("a", "b", "c", "nobody"))
SITE_SCHEMA = CovariateSchema(covariates=(*SCHEMA.covariates, SITE))


def made_up(n: int, seed: int = 0) -> pd.DataFrame:
    """Known structure: skewed ventricles grow with age, brains shrink with it and are 130 ml larger in men."""
    rng = np.random.default_rng(seed)
    age = 20 + 65 * rng.beta(1.3, 1.3, n)
    man = rng.random(n) < 0.4
    size = rng.standard_normal(n)
    site = np.array(["a", "b", "c"])[rng.choice(3, n, p=[0.6, 0.3, 0.1])]
    return pd.DataFrame(
        {
            "age": age,
            "sex": np.where(man, "M", "F"),
            "vent_ml": np.exp(2.0 + 0.018 * age + 0.3 * size + 0.3 * rng.standard_normal(n)).clip(3, 240),
            "brain_ml": 1250 - 3 * (age - 50) + 130 * man + 80 * size + 40 * (site == "c"),
            "site": site,
        }
    )


def real(cohort: str) -> tuple[pd.DataFrame, CovariateSchema]:
    """A real cohort with the ventricles called vent_ml, and a schema with room around what was seen."""
    path, ventricles = COHORTS[cohort]
    if not (DATA / path).is_file():
        pytest.skip(f"real cohort tables are not here: no {path} below BRAINSYNTH_DATA or ../shared/data")
    table = pd.read_csv(DATA / path, sep="\t").rename(columns={ventricles: "vent_ml"})
    bounds = {name: (0.8 * table[name].min(), 1.2 * table[name].max()) for name in CONTINUOUS}
    covariates = [continuous(name, *bounds[name], log=name == "vent_ml") for name in CONTINUOUS]
    return table, CovariateSchema(covariates=(covariates[0], SEX, *covariates[1:]))


def halves(table: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    order = np.random.default_rng(seed).permutation(len(table))
    return table.iloc[order[::2]].reset_index(drop=True), table.iloc[order[1::2]].reset_index(drop=True)


def rank_correlations(table: pd.DataFrame) -> np.ndarray:
    return table[list(CONTINUOUS)].corr("spearman").to_numpy()[np.triu_indices(3, 1)]


def sex_effect(table: pd.DataFrame) -> float:
    """Cohen's d of brain volume, men above women."""
    men, women = table.brain_ml[table.sex == "M"], table.brain_ml[table.sex == "F"]
    return float((men.mean() - women.mean()) / np.sqrt((men.var() + women.var()) / 2))


def bootstrap_error(table: pd.DataFrame, statistic, rounds: int = 200) -> np.ndarray:
    """Standard error of a statistic under resampling of people: what the cohort itself leaves open."""
    rng = np.random.default_rng(7)
    return np.std([statistic(table.iloc[rng.integers(0, len(table), len(table))]) for _ in range(rounds)], axis=0)


def scaled(table: pd.DataFrame, reference: pd.DataFrame) -> np.ndarray:
    """(B, 4) on a common scale for nearest-neighbour distances; a different sex is far."""
    log = lambda t: np.column_stack([t.age, np.log(t.vent_ml), t.brain_ml])  # noqa: E731
    values = (log(table) - log(reference).mean(axis=0)) / log(reference).std(axis=0)
    return np.column_stack([values, 10.0 * (table.sex == "M")])


def nearest(rows: pd.DataFrame, to: pd.DataFrame) -> np.ndarray:
    a, b = scaled(rows, to), scaled(to, to)
    return np.sqrt(((a[:, None] - b[None]) ** 2).sum(axis=2)).min(axis=1)


@pytest.fixture(scope="module")
def fitted() -> CovariateDistribution:
    return fit_distribution(made_up(400), SCHEMA, "made-up cohort")


def test_draws_from_a_known_truth_match_new_people() -> None:
    """Fitted on 2,000 people, judged on 2,000 others of the same truth."""
    drawn = fit_distribution(made_up(2000), SITE_SCHEMA, "made up").draw(2000, seed=1)
    others = made_up(2000, seed=99)
    for name in CONTINUOUS:
        assert stats.ks_2samp(drawn[name], others[name]).pvalue > 0.001, name
    for name in ("sex", "site"):
        counts = pd.crosstab(
            pd.concat([drawn[name], others[name]], ignore_index=True), np.repeat(["drawn", "others"], 2000)
        )
        assert stats.chi2_contingency(counts).pvalue > 0.001, name
    assert rank_correlations(drawn) == pytest.approx(rank_correlations(others), abs=0.08)
    assert sex_effect(drawn) == pytest.approx(sex_effect(others), abs=0.2)
    at_c, others_at_c = drawn[drawn.site == "c"], others[others.site == "c"]
    shift = at_c.brain_ml.mean() - drawn.brain_ml.mean()
    assert shift == pytest.approx(others_at_c.brain_ml.mean() - others.brain_ml.mean(), abs=25)


def test_a_dependence_is_not_invented() -> None:
    """Shuffled columns must stay independent, so the checks above do not pass by construction."""
    rng = np.random.default_rng(3)
    shuffled = made_up(2000).apply(lambda column: rng.permutation(column))
    drawn = fit_distribution(shuffled, SCHEMA, "shuffled").draw(5000, seed=1)
    assert np.abs(rank_correlations(drawn)).max() < 0.1
    assert abs(sex_effect(drawn)) < 0.2


@pytest.mark.parametrize("cohort", COHORTS)
def test_real_cohort_is_kept(cohort: str) -> None:
    table, schema = real(cohort)
    drawn = fit_distribution(table, schema, cohort).draw(5000, seed=4)
    known = table.dropna(subset=["age", "sex"])
    for name in CONTINUOUS:
        # Whole-year ages have atoms that a smooth marginal cannot have: the distance is at least half the largest.
        atom = known[name].value_counts(normalize=True).max()
        assert stats.ks_2samp(drawn[name], known[name]).statistic < atom / 2 + 1.0 / np.sqrt(len(known)), name
    women = int((known.sex == "F").sum())
    assert stats.binomtest(women, len(known), (drawn.sex == "F").mean()).pvalue > 0.1
    room = 2.5 * bootstrap_error(known, rank_correlations)
    assert (np.abs(rank_correlations(drawn) - rank_correlations(known)) < room).all()
    assert abs(sex_effect(drawn) - sex_effect(known)) < 1.5 * bootstrap_error(known, sex_effect)
    assert sex_effect(drawn) > 1.0


@pytest.mark.parametrize("cohort", COHORTS)
def test_drawn_rows_are_as_close_to_held_out_people_as_the_fitted_people_are(cohort: str) -> None:
    table, schema = real(cohort)
    table = table.dropna(subset=["age", "sex"])
    drawn_distance, real_distance, drawn_rank, real_rank, effects = [], [], [], [], []
    # Both halves take both parts: a large effect in one half is a small one in the other.
    for seed, (train, held_out) in enumerate(
        pair for k in range(6) for pair in itertools.permutations(halves(table, k))
    ):
        drawn = fit_distribution(train, schema, cohort).draw(4000, seed=seed)
        for name in CONTINUOUS:
            drawn_distance.append(stats.ks_2samp(drawn[name], held_out[name]).statistic)
            real_distance.append(stats.ks_2samp(train[name], held_out[name]).statistic)
        drawn_rank.append(np.abs(rank_correlations(drawn) - rank_correlations(held_out)).mean())
        real_rank.append(np.abs(rank_correlations(train) - rank_correlations(held_out)).mean())
        effects.append((sex_effect(drawn), sex_effect(held_out)))
    atom = table.age.value_counts(normalize=True).max()
    assert np.mean(drawn_distance) < np.mean(real_distance) * 1.1 + atom / 6
    assert np.mean(drawn_rank) < np.mean(real_rank) * 1.15
    of_drawn, of_held_out = np.mean(effects, axis=0)
    assert of_drawn == pytest.approx(of_held_out, rel=0.12)


@pytest.mark.parametrize("cohort", COHORTS)
def test_guard_flags_few_real_people_and_no_drawn_row(cohort: str) -> None:
    table, schema = real(cohort)
    flagged = []
    for seed in range(8):
        train, held_out = halves(table, seed)
        distribution = fit_distribution(train, schema, cohort)
        flagged.append(1 - distribution.in_support(held_out).mean())
        assert distribution.in_support(distribution.draw(3000, seed=seed)).all()
    assert np.mean(flagged) < 0.03


@pytest.mark.parametrize("cohort", COHORTS)
def test_no_person_is_replayed(cohort: str) -> None:
    table, schema = real(cohort)
    table = table.dropna(subset=["age", "sex"])
    ratios = []
    for seed in range(6):
        train, held_out = halves(table, seed)
        drawn = fit_distribution(train, schema, cohort).draw(len(held_out) * 4, seed=seed)
        for name in CONTINUOUS:
            assert not np.isin(drawn[name], train[name]).any()
        ratios.append(np.median(nearest(drawn, train)) / np.median(nearest(held_out, train)))
    assert np.mean(ratios) > 0.93, "drawn rows sit closer to the fitted people than other real people do"


def test_no_fitted_value_can_be_drawn_even_from_a_dense_cohort() -> None:
    """50,000 people with rounded values leave narrow gaps; the lattice still misses every one of them."""
    table = made_up(50_000).round({"age": 2, "vent_ml": 3, "brain_ml": 3})
    distribution = fit_distribution(table, SCHEMA, "dense")
    drawn = distribution.draw(50_000, seed=2)
    for marginal in distribution.marginals:
        value = drawn[marginal.name].to_numpy()
        assert not np.isin(value, table[marginal.name]).any()
        assert np.unique(value).size > 40_000
        steps = (table[marginal.name] - marginal.lattice_offset) / marginal.lattice_step
        assert np.abs(steps - np.rint(steps)).min() > 1e-7


def test_same_seed_same_rows_and_longer_draws_extend_shorter_ones(fitted: CovariateDistribution) -> None:
    longer = fitted.draw(9000, seed=5)
    for n in (0, 1, 4096, 4097):
        pd.testing.assert_frame_equal(fitted.draw(n, seed=5), longer.head(n))
    assert not fitted.draw(100, seed=6).equals(longer.head(100))
    old = (Constraint(name="age", low=70),)
    pd.testing.assert_frame_equal(fitted.draw(50, 5, old), fitted.draw(900, 5, old).head(50))


def test_draw_has_the_schemas_columns_and_types(fitted: CovariateDistribution) -> None:
    drawn = fitted.draw(500, seed=5)
    assert tuple(drawn.columns) == SCHEMA.names
    pd.testing.assert_frame_equal(drawn, SCHEMA.validate(drawn, "drawn"))
    assert len(drawn.drop_duplicates()) == 500


def test_women_of_70_to_80_with_upper_decile_ventricles(fitted: CovariateDistribution) -> None:
    asked = (
        Constraint(name="sex", categories=("F",)),
        Constraint(name="age", low=70, high=80),
        Constraint(name="vent_ml", low_quantile=0.9),
    )
    drawn = fitted.draw(300, seed=1, constraints=asked)
    assert len(drawn) == 300
    assert set(drawn.sex) == {"F"}
    assert drawn.age.between(70, 80).all()
    decile = fitted.quantile("vent_ml", 0.9)
    assert decile == pytest.approx(made_up(400).vent_ml.quantile(0.9), rel=0.1)
    assert (drawn.vent_ml >= decile).all()
    everyone = fitted.draw(40_000, seed=8)
    expected = ((everyone.sex == "F") & everyone.age.between(70, 80) & (everyone.vent_ml >= decile)).mean()
    assert fitted.share(asked) == pytest.approx(expected, rel=0.15)


def test_constrained_rows_are_distributed_as_the_matching_part(fitted: CovariateDistribution) -> None:
    drawn = fitted.draw(2000, seed=1, constraints=[Constraint(name="age", low=70, high=80)])
    part = fitted.draw(20_000, seed=2)
    part = part[part.age.between(70, 80)]
    assert stats.ks_2samp(drawn.brain_ml, part.brain_ml).pvalue > 0.001


def test_a_nearly_impossible_request_says_what_costs_most(fitted: CovariateDistribution) -> None:
    asked = [
        Constraint(name="age", high=22),
        Constraint(name="vent_ml", low=120),
        Constraint(name="sex", categories=("F",)),
    ]
    with pytest.raises(UserError) as error:
        fitted.draw(10, seed=0, constraints=asked)
    message = str(error.value)
    assert "0.05% is needed" in message
    assert "vent_ml in [120, inf]" in message
    assert "without it" in message
    assert "sex is F" in message


def test_all_wrong_constraints_are_reported_at_once(fitted: CovariateDistribution) -> None:
    asked = [
        Constraint(name="ventricle", low=1),
        Constraint(name="age", low=80, high=70),
        Constraint(name="age", low=96),
        Constraint(name="sex", categories=("X",)),
        Constraint(name="sex", low=0.0),
        Constraint(name="age", categories=("F",)),
        Constraint(name="brain_ml"),
        Constraint(name="vent_ml", low_quantile=1.5),
        Constraint(name="vent_ml", low=float("nan")),
    ]
    with pytest.raises(UserError, match=r"9 problems") as error:
        fitted.draw(1, seed=0, constraints=asked)
    assert "the distribution has age, sex, vent_ml, brain_ml" in str(error.value)
    for n, seed in ((-1, 0), (1, -1)):
        with pytest.raises(UserError, match="0 or more"):
            fitted.draw(n, seed)
    with pytest.raises(UserError, match="quantile"):
        fitted.quantile("sex", 0.5)


def test_guard_sees_impossible_people_that_pass_every_single_range(fitted: CovariateDistribution) -> None:
    people = pd.DataFrame(
        [
            {"age": 50.0, "sex": "F", "vent_ml": 20.0, "brain_ml": 1250.0},
            {"age": 21.0, "sex": "F", "vent_ml": 130.0, "brain_ml": 1000.0},  # each value is common, the mix is not
            {"age": 96.0, "sex": "F", "vent_ml": 40.0, "brain_ml": 1100.0},  # beyond the schema's support
            {"age": 50.0, "sex": None, "vent_ml": np.nan, "brain_ml": 1300.0},  # what is known is ordinary
            {"age": 50.0, "sex": "F", "vent_ml": np.nan, "brain_ml": 1890.0},  # what is known is not
            {"age": np.nan, "sex": None, "vent_ml": np.nan, "brain_ml": np.nan},  # nothing known, nothing to flag
        ]
    )
    assert fitted.in_support(people).tolist() == [True, False, False, True, False, True]
    distance = fitted._distance(*to_arrays(SCHEMA, people))
    assert distance[0] < distance[1]
    assert distance[5] == 0
    assert np.isfinite(distance).all()
    with pytest.raises(UserError, match="not one of F, M"):
        SCHEMA.validate(people.assign(sex="X"), "people")


def test_distances_of_partly_known_rows_are_on_the_scale_of_complete_rows() -> None:
    distribution = fit_distribution(made_up(2000), SCHEMA, "made up")
    others = made_up(2000, seed=5)
    partly = others.assign(vent_ml=np.nan)
    for table in (others, partly):
        assert np.median(distribution._distance(*to_arrays(SCHEMA, table))) == pytest.approx(
            stats.chi(3).median(), rel=0.1
        )
        assert 0 < 1 - distribution.in_support(table).mean() < 0.02 or distribution.in_support(table).all()


def test_json_round_trip_draws_the_same_rows_and_holds_no_row(fitted: CovariateDistribution) -> None:
    text = canonical_json(to_dict(fitted))
    again = from_dict(CovariateDistribution, to_dict(fitted), "distribution.json")
    assert again == fitted
    assert unseal(CovariateDistribution, seal(fitted), "distribution.json") == fitted
    pd.testing.assert_frame_equal(again.draw(200, 3), fitted.draw(200, 3))
    numbers = {repr(v) for v in made_up(400)[list(CONTINUOUS)].to_numpy().ravel()}
    assert not numbers & set(text.decode().replace("[", ",").replace("]", ",").split(","))
    assert from_dict(Constraint, to_dict(Constraint(name="age", low=3.0)), "constraint").low == 3.0


def test_missing_values_are_used_for_what_they_have() -> None:
    table = made_up(600)
    rng = np.random.default_rng(1)
    for name in ("age", "vent_ml", "sex"):
        table.loc[rng.random(600) < 0.2, name] = np.nan
    table.loc[5, :] = np.nan
    distribution = fit_distribution(table, SCHEMA, "gappy")
    assert distribution.n_rows == 599
    drawn = distribution.draw(3000, seed=1)
    assert drawn.notna().all(axis=None)
    assert rank_correlations(drawn) == pytest.approx(rank_correlations(made_up(600)), abs=0.1)
    assert sex_effect(drawn) == pytest.approx(sex_effect(made_up(600)), rel=0.15)
    strict = CovariateSchema(covariates=SCHEMA.covariates, missing="refuse")
    with pytest.raises(UserError, match="is missing, and this model needs every covariate"):
        fit_distribution(table, strict, "gappy")


def test_categorical_levels_and_their_rare_combinations() -> None:
    table = made_up(150)
    distribution = fit_distribution(table, SITE_SCHEMA, "three sites")
    drawn = distribution.draw(6000, seed=1)
    assert set(drawn.site) == {"a", "b", "c"}
    counts = [int((table.site == name).sum()) for name in "abc"]
    shares = [(drawn.site == name).mean() for name in "abc"]
    assert stats.chisquare(counts, 150 * np.array(shares)).pvalue > 0.5
    with pytest.raises(UserError, match="nobody is not in the cohort, which has a, b, c"):
        distribution.draw(1, 0, [Constraint(name="site", categories=("nobody",))])
    stranger = table.head(1).assign(site="nobody")
    assert distribution._distance(*to_arrays(SITE_SCHEMA, stranger))[0] == np.inf
    assert not distribution.in_support(stranger)[0]


@pytest.mark.parametrize("kept", [("age",), ("sex",), ("age", "vent_ml"), ("sex", "site")])
def test_any_selection_of_covariates_works(kept: tuple[str, ...]) -> None:
    schema = CovariateSchema(covariates=tuple(c for c in SITE_SCHEMA.covariates if c.name in kept))
    distribution = fit_distribution(made_up(100), schema, "some columns")
    drawn = distribution.draw(2000, seed=1)
    assert tuple(drawn.columns) == schema.names
    assert distribution.in_support(drawn).all()
    assert from_dict(CovariateDistribution, to_dict(distribution), "json") == distribution


def test_exactly_collinear_and_heaped_covariates_stay_usable() -> None:
    """Grey + white = brain makes the correlation singular; zeros of a lesion volume leave no interquartile range."""
    table = made_up(200)
    table["brain_ml"] = table["brain_ml"].round()
    table["copy"] = table["brain_ml"] * 0.5
    table["lesion"] = np.where(np.arange(200) % 5 == 0, 4.0, 0.0)
    table["by_sex"] = np.where(table.sex == "F", 1.0, 2.0)
    extra = (continuous("copy", 300, 1000), continuous("lesion", -1, 10), continuous("by_sex", 0, 3))
    distribution = fit_distribution(table, CovariateSchema(covariates=(*SCHEMA.covariates, *extra)), "collinear")
    drawn = distribution.draw(2000, seed=1)
    assert stats.spearmanr(drawn["copy"], drawn.brain_ml)[0] > 0.98
    assert (drawn.lesion < 2).mean() == pytest.approx(0.8, abs=0.1)
    assert drawn.by_sex[drawn.sex == "M"].median() == pytest.approx(2.0, abs=0.2)
    assert np.linalg.eigvalsh(np.array(distribution.correlation)).min() > 0


def test_values_at_the_edge_of_the_support_neither_leak_nor_pile_up() -> None:
    """A cohort recruited from 18 years on: no one younger is drawn, and 18 itself is not crowded."""
    table = made_up(500).assign(age=18 + 30 * np.random.default_rng(0).random(500) ** 2)
    drawn = fit_distribution(table, SCHEMA, "from 18").draw(10_000, seed=1)
    assert drawn.age.min() >= 18
    assert drawn.age.value_counts().max() <= 3
    assert (drawn.age < 19).mean() == pytest.approx((table.age < 19).mean(), abs=0.04)


def test_people_at_a_bound_of_the_schema_do_not_widen_the_support() -> None:
    """The age at which a cohort begins is nothing unusual, and does not make small ventricles in the old usual."""
    table = made_up(300).sort_values("age", ignore_index=True)
    table.loc[:2, "age"], table.loc[298:, "age"] = 18.0, 95.0
    fitted = fit_distribution(table, SCHEMA, "with people at the bounds")
    assert fitted.support_threshold < 6  # 11 and more with scores of 8 at the bounds
    youngest = table[:1].assign(sex="F", **table[:20][["vent_ml", "brain_ml"]].median())
    assert youngest.age[0] == 18.0
    assert fitted.in_support(youngest)[0]
    strange = table[:1].assign(age=75.0, sex="F", vent_ml=3.0, brain_ml=1175.0)
    assert not fitted.in_support(strange)[0]
    assert fitted.in_support(strange.assign(vent_ml=30.0))[0]
    assert fitted.quantile("age", 0.0) == 18.0
    assert fitted.quantile("age", 1.0) == 95.0


def test_thin_and_wrong_cohorts_are_refused_with_all_reasons() -> None:
    with pytest.raises(UserError, match=r"age: 19 known values, at least 20"):
        fit_distribution(made_up(19), SCHEMA, "tiny")
    constant = made_up(60).assign(age=50.0, sex="F")
    with pytest.raises(UserError, match=r"2 problems") as error:
        fit_distribution(constant, SCHEMA, "constant")
    assert "age is constant in the cohort" in str(error.value)
    assert "sex is constant in the cohort" in str(error.value)
    apart = made_up(60)
    apart.loc[:29, "age"] = np.nan
    apart.loc[30:, "vent_ml"] = np.nan
    with pytest.raises(UserError, match="age and vent_ml: only 0 rows know both"):
        fit_distribution(apart, SCHEMA, "apart")
    with pytest.raises(UserError, match="outside the training support"):
        fit_distribution(made_up(60).assign(age=120.0), SCHEMA, "old")
    many = tuple(str(i) for i in range(600))
    schema = CovariateSchema(covariates=(Covariate(name="clinic", kind="categorical", categories=many),))
    with pytest.raises(UserError, match="600 combinations of categories, at most 512"):
        fit_distribution(pd.DataFrame({"clinic": many * 2}), schema, "clinics")


def test_fit_is_deterministic_and_does_not_touch_the_table() -> None:
    table = made_up(120)
    before = table.copy()
    assert fit_distribution(table, SCHEMA, "x") == fit_distribution(table, SCHEMA, "x")
    pd.testing.assert_frame_equal(table, before)


def test_a_cohort_of_one_category_may_be_fitted_where_a_model_knows_more() -> None:
    rng = np.random.default_rng(0)
    schema = CovariateSchema(
        covariates=(
            Covariate(name="age", kind="continuous", unit="years", low=18.0, high=95.0),
            Covariate(name="site", kind="binary", categories=("a", "b")),
        )
    )
    table = pd.DataFrame({"age": rng.uniform(20, 90, 40), "site": "b"})
    with pytest.raises(UserError, match="site is constant in the cohort"):
        fit_distribution(table, schema, "one site")
    drawn = fit_distribution(table, schema, "one site", one_category=True).draw(50, 0)
    assert set(drawn["site"]) == {"b"}
    with pytest.raises(UserError, match="age is constant in the cohort"):
        fit_distribution(table.assign(age=50.0), schema, "one age", one_category=True)


def with_gaps(table: pd.DataFrame, names: tuple[str, ...]) -> pd.DataFrame:
    return table.assign(**dict.fromkeys(names, np.nan)).astype({n: object for n in names if n in ("sex", "site")})


def test_gaps_are_filled_as_the_cohort_has_them() -> None:
    fitted = fit_distribution(made_up(2000), SITE_SCHEMA, "made up")
    people = fitted.draw(3000, 1)
    for hidden in (("brain_ml",), ("vent_ml", "brain_ml"), ("sex",), ("age", "sex"), tuple(SITE_SCHEMA.names)):
        filled = fitted.completed(with_gaps(people, hidden), range(len(people)))
        for name in set(SITE_SCHEMA.names) - set(hidden):
            assert filled[name].tolist() == people[name].tolist()
        for (man, drawn), (_, real) in zip(filled.groupby("sex"), people.groupby("sex"), strict=True):
            assert len(drawn) == pytest.approx(len(real), rel=0.1), man
            for name in CONTINUOUS:
                assert stats.ks_2samp(drawn[name], real[name]).statistic < 0.06, (hidden, man, name)
            apart = drawn[list(CONTINUOUS)].corr("spearman") - real[list(CONTINUOUS)].corr("spearman")
            assert np.abs(apart.to_numpy()).max() < 0.08, (hidden, man)
        assert fitted.in_support(filled).all()


def test_a_row_is_filled_from_itself_and_its_seed_alone() -> None:
    fitted = fit_distribution(made_up(500), SITE_SCHEMA, "made up")
    people = with_gaps(fitted.draw(6, 2), ("brain_ml", "sex"))
    people.loc[0, "brain_ml"] = 1234.5
    filled = fitted.completed(people, [7, 8, 9, 10, 11, 12])
    assert filled.loc[0, "brain_ml"] == 1234.5
    backwards = fitted.completed(people[::-1].reset_index(drop=True), [12, 11, 10, 9, 8, 7])
    pd.testing.assert_frame_equal(filled, backwards[::-1].reset_index(drop=True))
    other = fitted.completed(people, [7, 8, 9, 10, 11, 13])
    assert other.loc[5, "brain_ml"] != filled.loc[5, "brain_ml"]
    pd.testing.assert_frame_equal(other[:5], filled[:5])
    pd.testing.assert_frame_equal(fitted.completed(filled, range(6)), filled)


def test_what_is_known_may_be_unlike_the_cohort() -> None:
    fitted = fit_distribution(made_up(500), SITE_SCHEMA, "made up")
    odd = with_gaps(fitted.draw(2, 3), ("vent_ml",)).assign(site=["nobody", "a"], brain_ml=[1200.0, 1890.0])
    filled = fitted.completed(odd, [1, 2])
    assert filled["site"].tolist() == ["nobody", "a"]
    assert filled["vent_ml"].between(2, 250).all()
    assert not fitted.in_support(filled).any()


def test_the_end_of_a_range_is_not_eight_standard_deviations_out() -> None:
    fitted = fit_distribution(made_up(500), SCHEMA, "made up")
    ends = pd.DataFrame({"age": [18.0, 95.0] * 200, "sex": None, "vent_ml": np.nan, "brain_ml": np.nan})
    filled = fitted.completed(SCHEMA.validate(ends, "ends"), range(400))
    people = fitted.draw(20000, 4)
    for age, near in ((18.0, people[people["age"] < 22]), (95.0, people[people["age"] > 83])):
        for name in ("vent_ml", "brain_ml"):
            mine, theirs = filled.loc[filled["age"] == age, name], near[name]
            assert abs(mine.median() - theirs.median()) < 1.5 * theirs.std(), (age, name)
            assert theirs.min() <= mine.median() <= theirs.max(), (age, name)
