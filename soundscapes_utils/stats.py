"""Intervals, paired tests and their correction, seeded and defined for a quick run's small samples."""

import warnings

import numpy as np

_EXACT_PAIRS = 14  # 2^14 = 16,384 sign patterns are enumerated faster than 10,000 are drawn well
_AT_ONCE = 10_000_000  # numbers drawn at a time: thousands of clips would else fill gigabytes


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


def _check_confidence(confidence):
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")


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
    values = _vector(values, "bootstrap_ci", 2)
    _check_confidence(confidence)
    if np.ptp(values) == 0:
        return float(statistic(values)), float(statistic(values))

    return _bias_corrected((values,), statistic, False, n, confidence, seed)


def _bias_corrected(samples, statistic, paired, n, confidence, seed):
    from scipy.stats import bootstrap

    def interval(method):
        return bootstrap(
            samples,
            statistic,
            paired=paired,
            n_resamples=n,
            confidence_level=confidence,
            batch=max(1, _AT_ONCE // len(samples[0])),
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


def nested_bootstrap_ci(values, groups, clusters, n=2000, confidence=0.95, seed=0):
    """Bootstrap interval of a mean over clips that hang together: in folds, and in sources.

    Folds are drawn with replacement, then, within each drawn fold, sources with all their clips.

    Parameters
    ----------
    values : array_like, shape (clips,)
        One number a clip, such as how often it was recognised.
    groups : array_like, shape (clips,)
        The fold of each clip. With one fold only sources are drawn: the interval then says nothing
        about other folds.
    clusters : array_like, shape (clips,)
        The recording that each clip was cut from.
    n : int, default 2000
        Number of resamples.
    confidence : float, default 0.95
        Between 0 and 1.
    seed : int, default 0
        The same seed gives the same interval.

    Returns
    -------
    tuple of float
        Lower and upper end (percentiles of the resampled means).

    Raises
    ------
    ValueError
        Lengths that differ, fewer than two values or clusters, values that are not finite.

    Notes
    -----
    Davison and Hinkley, "Bootstrap Methods and their Application" (1997), section 3.8. Clips of one
    recording resemble each other; drawn one by one they would make the interval too narrow.

    Examples
    --------
    >>> low, high = nested_bootstrap_ci([1, 1, 0, 1], [1, 1, 2, 2], list("abcd"))
    >>> low <= 0.75 <= high
    True
    """
    values = _vector(values, "nested_bootstrap_ci", 2)
    _check_confidence(confidence)
    if not len(values) == len(groups) == len(clusters):
        raise ValueError(
            f"nested_bootstrap_ci: {len(values)} values, {len(groups)} groups, "
            f"{len(clusters)} clusters; each value needs one of either"
        )
    group = np.unique(np.asarray(groups), return_inverse=True)[1]
    cluster = np.unique(np.asarray(clusters), return_inverse=True)[1]
    pairs, place = np.unique(group * (cluster.max() + 1) + cluster, return_inverse=True)
    if len(pairs) < 2:
        raise ValueError("nested_bootstrap_ci: all values are of one cluster; it needs two")
    sums, sizes = np.bincount(place, values), np.bincount(place)
    owner = pairs // (cluster.max() + 1)
    rng = np.random.default_rng(seed)
    n_groups = group.max() + 1
    drawn = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n)
    total, count = np.zeros(n), np.zeros(n)
    for i in range(n_groups):
        mine = np.flatnonzero(owner == i)
        # a fold drawn twice draws its sources twice, which is one multinomial of twice as many
        times = rng.multinomial(drawn[:, i] * len(mine), np.full(len(mine), 1 / len(mine)))
        total += times @ sums[mine]
        count += times @ sizes[mine]
    tail = (1 - confidence) / 2
    low, high = np.quantile(total / count, [tail, 1 - tail])
    return float(low), float(high)


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
    # the slack keeps sums that are equal on paper from being told apart by rounding
    least = abs(differences.sum()) - 1e-12 * np.abs(differences).sum()
    if exact:
        bits = np.arange(2**pairs)[:, None] >> np.arange(pairs) & 1
        return float(np.mean(np.abs((1 - 2 * bits) @ differences) >= least))
    rng, as_extreme, step = np.random.default_rng(seed), 0, max(1, _AT_ONCE // pairs)
    for start in range(0, n, step):
        bits = rng.integers(0, 2, (min(step, n - start), pairs))
        as_extreme += int((np.abs((1 - 2 * bits) @ differences) >= least).sum())
    # the observed pattern is one of those possible (Phipson and Smyth 2010)
    return (as_extreme + 1) / (n + 1)


def mcnemar(a, b):
    """McNemar's exact test: do two classifiers err equally often on the same clips?

    Only clips that one recognises and the other does not tell them apart; under the null hypothesis
    each of these is a fair coin.

    Parameters
    ----------
    a, b : array_like of bool, shape (clips,)
        Whether each classifier recognised each clip, in the same order.

    Returns
    -------
    dict
        ``n`` clips; ``only_a`` and ``only_b``, recognised by that one alone; ``difference`` of the
        accuracies, a − b; ``odds_ratio``, only_a over only_b (1 where they agree everywhere), with
        its exact 95 % interval ``odds_low, odds_high``; ``p_value``, two-sided.

    Raises
    ------
    ValueError
        Lengths that differ, no clip, or values that are neither true nor false.

    Notes
    -----
    McNemar, Psychometrika 12 (1947); the binomial test in place of χ², which needs about 25 such
    clips. Interval: Clopper and Pearson's, of the share of ``only_a``.

    Examples
    --------
    >>> result = mcnemar([1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0])
    >>> result["only_a"], result["p_value"]
    (6, 0.03125)
    """
    from scipy.stats import binomtest

    a, b = _vector(a, "mcnemar a", 1), _vector(b, "mcnemar b", 1)
    if len(a) != len(b):
        raise ValueError(f"mcnemar: {len(a)} values against {len(b)}; pair them first")
    if not np.isin(np.concatenate([a, b]), (0, 1)).all():
        raise ValueError("mcnemar: values must be true or false; take one run, not a mean of runs")
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    found = {"n": len(a), "only_a": only_a, "only_b": only_b}
    found["difference"] = float((a - b).mean())
    if only_a + only_b == 0:
        return found | {"odds_ratio": 1.0, "odds_low": 0.0, "odds_high": np.inf, "p_value": 1.0}
    test = binomtest(only_a, only_a + only_b)
    interval = test.proportion_ci(method="exact")
    shares = (only_a / (only_a + only_b), interval.low, interval.high)
    odds = [float(share / (1 - share)) if share < 1 else np.inf for share in shares]
    names = ("odds_ratio", "odds_low", "odds_high")
    return found | dict(zip(names, odds, strict=True)) | {"p_value": float(test.pvalue)}


def holm(p_values):
    """Correct the p-values of several tests so that all of them together err rarely.

    Parameters
    ----------
    p_values : array_like, shape (tests,)
        From 0 to 1.

    Returns
    -------
    np.ndarray of float, shape (tests,)
        Adjusted p-values, at most 1, in the same order: those below 0.05 hold together with at most
        5 % risk that any of them is false, however the tests depend on each other.

    Raises
    ------
    ValueError
        A value outside 0 to 1, or not finite.

    Notes
    -----
    Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of
    Statistics 6 (1979); never less powerful than Bonferroni's.

    Examples
    --------
    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    p = _vector(p_values, "holm", 1)
    if (p < 0).any() or (p > 1).any():
        raise ValueError(f"holm: p-values lie between 0 and 1, got {p.min():g} to {p.max():g}")
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(steps, 1.0)
    return adjusted


def correlation(x, y, method="spearman", n=10_000, seed=0):
    """Correlation of two columns with its interval and a permutation test.

    Parameters
    ----------
    x, y : array_like, shape (items,)
        Two numbers an item, such as a class's distance and its gain in accuracy.
    method : {"spearman", "pearson"}
        Of the ranks, or of the values.
    n : int, default 10000
        Random pairings of the test, and resamples of the interval.
    seed : int, default 0
        Of both.

    Returns
    -------
    dict
        ``n`` items; ``r``; ``ci_low`` and ``ci_high``, its 95 % bootstrap interval over items
        (BCa); ``p_value``, two-sided, of no association. With ten classes an interval is wide:
        |r| below 0.6 does not exclude 0.

    Raises
    ------
    ValueError
        Unknown method, lengths that differ, fewer than four items, a constant column, values that
        are not finite.

    Examples
    --------
    >>> correlation([1, 2, 3, 4, 5], [1, 3, 2, 5, 9])["r"]
    0.9
    """
    x, y = _vector(x, "correlation x", 4), _vector(y, "correlation y", 4)
    if len(x) != len(y):
        raise ValueError(f"correlation: {len(x)} values against {len(y)}; pair them first")
    if method not in ("spearman", "pearson"):
        raise ValueError(f"method must be 'spearman' or 'pearson', got {method!r}")
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        raise ValueError("correlation: a column is constant, nothing can go with it")

    def statistic(a, b, axis=-1):
        return _row_correlation(a, b, method == "spearman")

    low, high = _bias_corrected((x, y), statistic, True, n, 0.95, seed)
    r = float(statistic(x, y))
    shuffled = np.random.default_rng(seed).permuted(np.tile(y, (n, 1)), axis=1)
    # the slack keeps pairings that are equal on paper from being told apart by rounding
    as_extreme = int((np.abs(statistic(x, shuffled)) >= abs(r) - 1e-12).sum())
    return {
        "n": len(x),
        "r": round(r, 12),
        "ci_low": low,
        "ci_high": high,
        "p_value": (as_extreme + 1) / (n + 1),
    }


def _row_correlation(a, b, ranked):
    if ranked:
        from scipy.stats import rankdata

        a, b = rankdata(a, axis=-1), rankdata(b, axis=-1)
    a = a - a.mean(axis=-1, keepdims=True)
    b = b - b.mean(axis=-1, keepdims=True)
    spread = np.sqrt((a**2).sum(axis=-1) * (b**2).sum(axis=-1))
    # a resample that drew one item over and over shows no association
    safe = np.where(spread > 1e-300, spread, 1.0)
    return np.where(spread > 1e-300, (a * b).sum(axis=-1) / safe, 0.0)


def linear_probe(seed=0):
    """Logistic regression on standardised features: the classifier that judges an embedding.

    Returns
    -------
    sklearn.pipeline.Pipeline
        Not yet fitted; ``fit(x, y)``, ``predict(x)``, ``predict_proba(x)``.

    Examples
    --------
    >>> linear_probe().fit([[0.0], [1.0]], ["a", "b"]).predict([[0.9]]).tolist()
    ['b']
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, random_state=seed))
