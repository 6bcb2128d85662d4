"""Intervals against closed forms and simulation, the paired test against scipy."""

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


def test_effect_of_equal_and_of_constant_differences():
    assert stats.paired_test([1, 2, 3], [1, 2, 3])["effect"] == 0.0
    assert stats.paired_test([1, 2, 3], [1, 2, 3])["p_value"] == 1.0
    assert stats.paired_test([1.1, 2.1, 3.1], [1.0, 2.0, 3.0])["effect"] == np.inf


def test_unpaired_lengths_are_refused():
    with pytest.raises(ValueError, match="3 values against 2"):
        stats.paired_test([1, 2, 3], [1, 2])
