"""Intervals against closed forms and simulation, the tests against scipy and enumeration."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as reference

from soundscapes_utils import stats

numbers = st.floats(-100, 100).map(lambda v: round(v, 3))


def test_bootstrap_ci_covers_the_true_mean():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        low, high = stats.bootstrap_ci(rng.normal(3.0, 1.0, 30), n=400, seed=seed)
        hits += low <= 3.0 <= high
    # 95 % nominal; a binomial of 200 stays above 175 with probability > .999 at 92 %
    assert 175 <= hits <= 199


def test_bootstrap_ci_of_the_mean_is_close_to_students_t():
    values = np.random.default_rng(1).normal(0.0, 2.0, 200)
    low, high = stats.bootstrap_ci(values, n=4000)
    t_low, t_high = reference.t.interval(
        0.95, 199, loc=values.mean(), scale=values.std(ddof=1) / np.sqrt(200)
    )
    assert low == pytest.approx(t_low, abs=0.05)
    assert high == pytest.approx(t_high, abs=0.05)


def test_bootstrap_ci_takes_statistics_without_axis():
    values = np.random.default_rng(2).normal(5.0, 1.0, 60)
    low, high = stats.bootstrap_ci(values, statistic=lambda v: float(sorted(v)[len(v) // 2]), n=300)
    assert low <= np.median(values) + 0.2
    assert high >= np.median(values) - 0.2


def test_bootstrap_ci_is_seeded():
    values = np.random.default_rng(3).normal(size=20)
    assert stats.bootstrap_ci(values, seed=4) == stats.bootstrap_ci(values, seed=4)
    assert stats.bootstrap_ci(values, seed=4) != stats.bootstrap_ci(values, seed=5)


@pytest.mark.parametrize("values", [[2.0, 2.0, 2.0], [0.0, 0.0, 1.0], [1.0, 2.0]])
def test_bootstrap_ci_is_finite_on_degenerate_values(values):
    low, high = stats.bootstrap_ci(values, n=200)
    assert np.isfinite([low, high]).all()
    assert low <= np.mean(values) <= high


@pytest.mark.parametrize(
    ("values", "message"), [([1.0], "at least 2"), ([1.0, np.nan], "not finite"), ([], "at least")]
)
def test_bad_values_are_named(values, message):
    for function in (stats.bootstrap_ci, stats.mean_interval):
        with pytest.raises(ValueError, match=message):
            function(values)


def test_confidence_outside_its_range():
    with pytest.raises(ValueError, match="confidence"):
        stats.bootstrap_ci([1.0, 2.0], confidence=95)


def test_mean_interval_by_hand():
    # SD of 1, 2, 3, 4, 5 is √2.5
    mean, half = stats.mean_interval([1, 2, 3, 4, 5])
    assert mean == 3.0
    assert half == pytest.approx(1.96 * np.sqrt(2.5) / np.sqrt(5))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=10))
def test_exact_paired_test_equals_scipy(pairs):
    a, b = np.array(pairs).T
    expected = reference.permutation_test(
        (a, b),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        n_resamples=np.inf,
    ).pvalue
    result = stats.paired_test(a, b)
    assert result["exact"]
    assert result["p_value"] == pytest.approx(expected, abs=1e-12)


def test_random_paired_test_is_calibrated():
    rng = np.random.default_rng(0)
    p = [stats._sign_flip_p(rng.normal(size=30), False, 500, seed) for seed in range(300)]
    assert reference.kstest(p, "uniform").pvalue > 0.01


def test_paired_test_is_antisymmetric_and_seeded():
    rng = np.random.default_rng(5)
    a, b = rng.normal(0.3, 1, 25), rng.normal(0, 1, 25)
    forward, backward = stats.paired_test(a, b, seed=1), stats.paired_test(b, a, seed=1)
    assert not forward["exact"]
    assert forward["p_value"] == backward["p_value"]
    assert forward["effect"] == pytest.approx(-backward["effect"])
    assert forward["difference"] == pytest.approx((a - b).mean())
    assert forward["ci_low"] <= forward["difference"] <= forward["ci_high"]


def test_effect_is_cohens_d_of_the_differences():
    # differences 1, 2, 3: mean 2, SD 1
    assert stats.paired_test([2, 4, 6], [1, 2, 3])["effect"] == pytest.approx(2.0)
    # t of the paired test is √n times as large
    a, b = np.random.default_rng(0).normal(size=(2, 9))
    expected = reference.ttest_rel(a, b).statistic / 3
    assert stats.paired_test(a, b)["effect"] == pytest.approx(expected)


def test_effect_of_equal_and_of_constant_differences():
    assert stats.paired_test([1, 2, 3], [1, 2, 3])["effect"] == 0.0
    assert stats.paired_test([1, 2, 3], [1, 2, 3])["p_value"] == 1.0
    assert stats.paired_test([1.1, 2.1, 3.1], [1.0, 2.0, 3.0])["effect"] == np.inf


def test_unpaired_lengths_are_refused():
    with pytest.raises(ValueError, match="3 values against 2"):
        stats.paired_test([1, 2, 3], [1, 2])


def test_nested_bootstrap_of_single_clips_equals_the_plain_one():
    values = np.random.default_rng(0).normal(size=80)
    low, high = stats.nested_bootstrap_ci(values, np.ones(80), np.arange(80), n=4000)
    plain = stats.bootstrap_ci(values, n=4000)
    assert (low, high) == pytest.approx(plain, abs=0.04)


def test_nested_bootstrap_keeps_the_clips_of_a_source_together():
    # eight copies of one clip say no more than the clip: the interval must be that of 20 values
    values = np.random.default_rng(1).normal(size=20)
    copies = np.repeat(values, 8)
    low, high = stats.nested_bootstrap_ci(copies, np.ones(160), np.repeat(np.arange(20), 8))
    alone = stats.nested_bootstrap_ci(values, np.ones(20), np.arange(20))
    naive = stats.nested_bootstrap_ci(copies, np.ones(160), np.arange(160))
    assert high - low == pytest.approx(alone[1] - alone[0], rel=0.1)
    assert naive[1] - naive[0] < 0.5 * (high - low)


def test_nested_bootstrap_counts_the_spread_over_folds():
    rng = np.random.default_rng(2)
    folds = np.repeat(np.arange(5), 40)
    values = np.repeat(rng.normal(0, 1, 5), 40) + rng.normal(0, 0.1, 200)
    low, high = stats.nested_bootstrap_ci(values, folds, np.arange(200), n=4000)
    # closed form: folds are drawn from five means, what happens inside them hardly matters
    means = [values[folds == i].mean() for i in range(5)]
    half = 1.96 * np.std(means) / np.sqrt(5)
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)
    assert stats.nested_bootstrap_ci(values, folds, np.arange(200), n=4000) == (low, high)


@pytest.mark.parametrize(
    ("groups", "clusters", "message"),
    [([1, 1], [1, 2, 3], "3 values, 2 groups"), ([1, 1, 1], [5, 5, 5], "one cluster")],
)
def test_nested_bootstrap_says_what_is_missing(groups, clusters, message):
    with pytest.raises(ValueError, match=message):
        stats.nested_bootstrap_ci([1.0, 2.0, 3.0], groups, clusters)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=9))
def test_mcnemar_equals_the_sign_flips_of_the_pairs(pairs):
    a, b = np.array(pairs).T
    result = stats.mcnemar(a, b)
    # swapping the two classifiers clip by clip is the same null hypothesis
    assert result["p_value"] == pytest.approx(stats.paired_test(a, b)["p_value"], abs=1e-12)
    assert result["difference"] == pytest.approx(a.mean() - b.mean())
    assert result["odds_low"] <= result["odds_ratio"] <= result["odds_high"]


def test_mcnemar_of_a_published_table():
    # Agresti, Categorical Data Analysis, table 10.1: 150 against 86 of 1600 changed their mind
    a = np.r_[np.ones(150), np.zeros(86), np.ones(794), np.zeros(570)]
    b = np.r_[np.zeros(150), np.ones(86), np.ones(794), np.zeros(570)]
    result = stats.mcnemar(a, b)
    assert (result["only_a"], result["only_b"], result["n"]) == (150, 86, 1600)
    assert result["difference"] == pytest.approx(0.04)
    # z² = 17.36 there; the exact test agrees in its order of magnitude
    assert result["p_value"] == pytest.approx(reference.chi2.sf(17.36, 1), rel=0.3)


def test_mcnemar_takes_single_runs_only():
    with pytest.raises(ValueError, match="mean of runs"):
        stats.mcnemar([1, 0.5], [0, 1])
    with pytest.raises(ValueError, match="2 values against 3"):
        stats.mcnemar([1, 0], [0, 1, 1])
    assert stats.mcnemar([1, 0], [1, 0])["p_value"] == 1.0


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.999))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values, level):
    adjusted = stats.holm(p_values)
    rejected = np.zeros(len(p_values), bool)
    for step, place in enumerate(np.argsort(p_values, kind="stable")):
        if p_values[place] * (len(p_values) - step) > level:
            break
        rejected[place] = True
    np.testing.assert_array_equal(adjusted <= level, rejected)
    assert (adjusted >= np.array(p_values)).all() and adjusted.max() <= 1
    assert (adjusted <= np.minimum(1, np.array(p_values) * len(p_values)) + 1e-12).all()


def test_holm_refuses_what_is_no_p_value():
    with pytest.raises(ValueError, match="between 0 and 1"):
        stats.holm([0.2, 1.2])


@pytest.mark.parametrize("method", ["spearman", "pearson"])
def test_correlation_equals_scipy(method):
    rng = np.random.default_rng(0)
    x = rng.normal(size=12).round(1)
    y = 0.8 * x + rng.normal(size=12).round(1)
    found = stats.correlation(x, y, method, n=2000)
    whole = getattr(reference, f"{method}r")(x, y)
    assert found["r"] == pytest.approx(whole.statistic, abs=1e-9)
    assert found["p_value"] == pytest.approx(whole.pvalue, abs=0.02)
    assert found["ci_low"] < found["r"] < found["ci_high"]


def test_correlations_interval_is_close_to_fishers():
    rng = np.random.default_rng(3)
    x = rng.normal(size=150)
    y = x + rng.normal(size=150)
    found = stats.correlation(x, y, "pearson", n=3000)
    fisher = reference.pearsonr(x, y).confidence_interval()
    assert (found["ci_low"], found["ci_high"]) == pytest.approx(tuple(fisher), abs=0.04)


def test_correlation_of_few_or_constant_items():
    assert np.isfinite(list(stats.correlation([1, 2, 3, 4], [4, 3, 2, 1], n=200).values())).all()
    with pytest.raises(ValueError, match="at least 4"):
        stats.correlation([1, 2, 3], [1, 2, 3])
    with pytest.raises(ValueError, match="constant"):
        stats.correlation([1, 2, 3, 4], [5, 5, 5, 5])
    with pytest.raises(ValueError, match="spearman"):
        stats.correlation([1, 2, 3, 4], [1, 2, 3, 5], "kendall")


def test_as_many_clips_as_urbansound8k_has_fit_into_memory():
    rng = np.random.default_rng(0)
    a, b = rng.random(8732), rng.random(8732)
    tracemalloc.start()
    result = stats.paired_test(a, b)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.5e9
    # with so many clips both agree with the normal approximation
    low, high = result["difference"] + np.array([-1.96, 1.96]) * (a - b).std() / np.sqrt(8732)
    assert (result["ci_low"], result["ci_high"]) == pytest.approx((low, high), abs=6e-4)
    z = (a - b).mean() / (a - b).std() * np.sqrt(8732)
    assert result["p_value"] == pytest.approx(2 * reference.norm.sf(abs(z)), abs=0.02)


def test_drawing_in_parts_changes_no_number(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = rng.random(50), rng.random(50)
    whole = stats.paired_test(a, b)
    monkeypatch.setattr(stats, "_AT_ONCE", 1001)
    assert stats.paired_test(a, b) == whole
