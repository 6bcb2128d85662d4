"""Intervals and paired tests, each seeded and defined for the small samples of a quick run."""

import warnings

import numpy as np

_EXACT_PAIRS = 14  # 2^14 = 16,384 sign patterns are enumerated faster than 10,000 are drawn well


def _vector(values, name, least):
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) < least:
        raise ValueError(
            f"{name}: expected one row of at least {least} numbers, got {values.shape}"
        )
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise ValueError(f"{name}: {bad} of {len(values)} values are not finite; drop them first")
    return values


def bootstrap_ci(values, statistic=np.mean, n=2000, confidence=0.95, seed=0):
    """Bootstrap interval of a statistic, bias-corrected and accelerated (BCa).

    Parameters
    ----------
    values : array_like, shape (samples,)
        Independent observations; where several come from one source, average them first.
    statistic : callable, default np.mean
        Maps an array to a number; with an ``axis`` argument it is evaluated in one go.
    n : int, default 2000
        Number of resamples.
    confidence : float, default 0.95
        Between 0 and 1.
    seed : int, default 0
        The same seed gives the same interval.

    Returns
    -------
    tuple of float
        Lower and upper end. Both equal the statistic where it does not vary over resamples.

    Raises
    ------
    ValueError
        Fewer than two values, values that are not finite, a confidence outside (0, 1).

    Notes
    -----
    Efron, "Better bootstrap confidence intervals", JASA 82 (1987); computed by
    `scipy.stats.bootstrap`. Where BCa is undefined (few tied values) the percentile interval
    is returned.

    Examples
    --------
    >>> low, high = bootstrap_ci([0.61, 0.64, 0.66, 0.60, 0.65])
    >>> low < 0.632 < high
    True
    """
    from scipy.stats import bootstrap

    values = _vector(values, "bootstrap_ci", 2)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    if np.ptp(values) == 0:
        return float(statistic(values)), float(statistic(values))

    def interval(method):
        return bootstrap(
            (values,),
            statistic,
            n_resamples=n,
            confidence_level=confidence,
            method=method,
            rng=np.random.default_rng(seed),
        ).confidence_interval

    with warnings.catch_warnings():
        # scipy warns where BCa degenerates, which the next lines handle
        warnings.simplefilter("ignore")
        found = interval("BCa")
        if not np.isfinite(found).all():
            found = interval("percentile")
    return float(found.low), float(found.high)


def mean_interval(values):
    """Mean and half-width 1.96·SD/√n: the error bars of repeated training runs.

    Parameters
    ----------
    values : array_like, shape (runs,)
        One score a run.

    Returns
    -------
    tuple of float
        Mean and half-width, in the unit of the values; SD is the sample's (n − 1).

    Raises
    ------
    ValueError
        Fewer than two values or values that are not finite.

    Notes
    -----
    The formula of Ronchini et al. (arXiv 2403.17864) for five runs. It describes the spread over
    *runs*, takes five of them for many (Student's t would be 2.78, not 1.96), and says nothing
    about other test recordings.

    Examples
    --------
    >>> mean, half = mean_interval([64.0, 65.0, 66.0])
    >>> round(mean, 1), round(half, 2)
    (65.0, 1.13)
    """
    values = _vector(values, "mean_interval", 2)
    return float(values.mean()), float(1.96 * values.std(ddof=1) / np.sqrt(len(values)))


def paired_test(a, b, n=10_000, seed=0):
    """Paired permutation test of mean(a − b), exact up to 14 pairs.

    Under the null hypothesis each pair could be swapped: the signs of the differences are
    enumerated, or drawn at random where there are too many pairs.

    Parameters
    ----------
    a, b : array_like, shape (pairs,)
        Scores of two systems on the same folds, runs or clips, in the same order.
    n : int, default 10000
        Random sign patterns where the test is not exact.
    seed : int, default 0
        Of the random patterns and of the interval.

    Returns
    -------
    dict
        ``n`` pairs; ``difference``, the mean of a − b; ``ci_low`` and ``ci_high``, its 95 %
        bootstrap interval; ``effect``, difference over the differences' SD (Cohen's d_z; infinite
        where all differences agree); ``p_value``, two-sided; ``exact``. With k pairs no p-value
        can be below 2^(1−k): five folds never reach .05.

    Raises
    ------
    ValueError
        Lengths that differ, fewer than two pairs, values that are not finite.

    Examples
    --------
    >>> result = paired_test([0.7, 0.8, 0.9, 0.8, 0.7], [0.6, 0.7, 0.7, 0.7, 0.6])
    >>> result["p_value"], result["exact"]
    (0.0625, True)
    """
    a, b = _vector(a, "paired_test a", 2), _vector(b, "paired_test b", 2)
    if len(a) != len(b):
        raise ValueError(f"paired_test: {len(a)} values against {len(b)}; pair them first")
    differences = a - b
    exact = len(a) <= _EXACT_PAIRS
    low, high = bootstrap_ci(differences, seed=seed)
    return {
        "n": len(a),
        "difference": float(differences.mean()),
        "ci_low": low,
        "ci_high": high,
        "effect": _effect(differences),
        "p_value": _sign_flip_p(differences, exact, n, seed),
        "exact": exact,
    }


def _effect(differences):
    mean, spread = differences.mean(), differences.std(ddof=1)
    # differences that agree up to rounding have no spread to divide by
    if spread <= 1e-12 * abs(mean):
        return float(np.sign(mean) * np.inf) if mean else 0.0
    return float(mean / spread)


def _sign_flip_p(differences, exact, n, seed):
    pairs = len(differences)
    if exact:
        bits = np.arange(2**pairs)[:, None] >> np.arange(pairs) & 1
    else:
        bits = np.random.default_rng(seed).integers(0, 2, (n, pairs))
    sums = np.abs((1 - 2 * bits) @ differences)
    # the slack keeps sums that are equal on paper from being told apart by rounding
    as_extreme = int((sums >= abs(differences.sum()) - 1e-12 * np.abs(differences).sum()).sum())
    if exact:
        return as_extreme / len(sums)
    # the observed pattern is one of those possible (Phipson and Smyth 2010)
    return (as_extreme + 1) / (n + 1)
