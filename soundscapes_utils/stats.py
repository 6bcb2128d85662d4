"""Intervals, paired tests and their correction; and with them the reading of a study's results.

The first half takes plain numbers, the second the tables that :func:`esc.run_study` leaves. An arm is
named by its text, such as ``"real"`` or ``"both:1"``. No claim about arms should be made without its
row of :func:`compare`.
"""

import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from soundscapes_utils import store

_EXACT_PAIRS = 14  # 2^14 = 16,384 sign patterns are enumerated faster than 10,000 are drawn well
_AT_ONCE = 10_000_000  # numbers drawn at a time: thousands of clips would else fill gigabytes


def _vector(values, name, least):
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) < least:
        raise ValueError(f"{name}: expected one row of at least {least} numbers, got {values.shape}")
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise ValueError(f"{name}: {bad} of {len(values)} values are not finite; drop them first")
    return values


def _pair(a, b, name, least):
    a, b = _vector(a, f"{name}, first row", least), _vector(b, f"{name}, second row", least)
    if len(a) != len(b):
        raise ValueError(f"{name}: {len(a)} values against {len(b)}; pair them first")
    return a, b


# --- intervals -----------------------------------------------------------------------------------


def bootstrap_ci(values, statistic=np.mean, n=2000, confidence=0.95, seed=0):
    """Bootstrap interval of a statistic, bias-corrected and accelerated (BCa; Efron, JASA 82, 1987).

    Parameters
    ----------
    values : array_like, shape (samples,)
        At least two independent observations; where several come from one source, average them first.
    statistic : callable, default np.mean
        Maps an array to a number; with an ``axis`` argument it is evaluated in one go.
    n, confidence, seed : int, float, int
        Resamples, between 0 and 1, and what the interval follows from.

    Returns
    -------
    tuple of float
        Lower and upper end; the percentile interval where BCa is undefined (few tied values).

    Examples
    --------
    >>> low, high = bootstrap_ci([0.61, 0.64, 0.66, 0.60, 0.65])
    >>> low < 0.632 < high
    True
    """
    values = _vector(values, "bootstrap_ci", 2)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    if np.ptp(values) == 0:
        return float(statistic(values)), float(statistic(values))
    return _bias_corrected((values,), statistic, n, confidence, seed)


def _bias_corrected(samples, statistic, n, confidence, seed):
    from scipy.stats import bootstrap

    with warnings.catch_warnings():
        # scipy warns where BCa degenerates
        warnings.simplefilter("ignore")
        for method in ("BCa", "percentile"):
            interval = bootstrap(
                samples,
                statistic,
                paired=len(samples) > 1,
                n_resamples=n,
                confidence_level=confidence,
                batch=max(1, _AT_ONCE // len(samples[0])),
                method=method,
                rng=np.random.default_rng(seed),
            ).confidence_interval
            if np.isfinite(interval).all():
                break
    return float(interval.low), float(interval.high)


def nested_bootstrap_ci(values, folds, sources, n=2000, confidence=0.95, seed=0):
    """Bootstrap interval of a mean over clips that hang together: in folds, and in sources.

    Folds are drawn with replacement, then, within each drawn fold, sources with all their clips
    (Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8): drawn one by
    one, clips of one recording would make the interval too narrow. `values`, `folds` and `sources`
    have one entry per clip. With one fold the interval says nothing about other folds.
    """
    values = _vector(values, "nested_bootstrap_ci", 2)
    if not len(values) == len(folds) == len(sources):
        raise ValueError(
            f"nested_bootstrap_ci: {len(values)} values, {len(folds)} folds, {len(sources)} "
            "sources; each value needs one of either"
        )
    fold = np.unique(np.asarray(folds), return_inverse=True)[1]
    source = np.unique(np.asarray(sources), return_inverse=True)[1]
    pairs, place = np.unique(fold * (source.max() + 1) + source, return_inverse=True)
    if len(pairs) < 2:
        raise ValueError("nested_bootstrap_ci: all values are of one source; it needs two")
    sums, sizes = np.bincount(place, values), np.bincount(place)
    owner = pairs // (source.max() + 1)
    rng, n_folds = np.random.default_rng(seed), fold.max() + 1
    drawn = rng.multinomial(n_folds, np.full(n_folds, 1 / n_folds), size=n)
    total, count = np.zeros(n), np.zeros(n)
    for i in range(n_folds):
        mine = np.flatnonzero(owner == i)
        # a fold drawn twice draws its sources twice, which is one multinomial of twice as many
        times = rng.multinomial(drawn[:, i] * len(mine), np.full(len(mine), 1 / len(mine)))
        total += times @ sums[mine]
        count += times @ sizes[mine]
    tail = (1 - confidence) / 2
    low, high = np.quantile(total / count, [tail, 1 - tail])
    return float(low), float(high)


# --- tests ---------------------------------------------------------------------------------------


def paired_test(a, b, n=10_000, seed=0):
    """Paired permutation test of mean(a − b), exact up to 14 pairs.

    Under the null hypothesis each pair could be swapped: the signs of the differences are
    enumerated, or drawn at random (`n` patterns from `seed`) where there are too many pairs.

    Parameters
    ----------
    a, b : array_like, shape (pairs,)
        Scores of two systems on the same folds, runs or clips, in the same order; at least two.

    Returns
    -------
    dict
        ``n`` pairs; ``difference``, the mean of a − b; ``ci_low`` and ``ci_high``, its 95 %
        bootstrap interval; ``effect``, difference over the differences' SD (Cohen's d_z; infinite
        where all differences agree); ``p_value``, two-sided; ``exact``. With k pairs no p-value
        can be below 2^(1−k): five folds never reach .05.

    Examples
    --------
    >>> result = paired_test([0.7, 0.8, 0.9, 0.8, 0.7], [0.6, 0.7, 0.7, 0.7, 0.6])
    >>> result["p_value"], result["exact"]
    (0.0625, True)
    """
    a, b = _pair(a, b, "paired_test", 2)
    differences = a - b
    mean, spread = differences.mean(), differences.std(ddof=1)
    # differences that agree up to rounding have no spread to divide by
    agree = spread <= 1e-12 * abs(mean)
    low, high = bootstrap_ci(differences, seed=seed)
    return {
        "n": len(a),
        "difference": float(mean),
        "ci_low": low,
        "ci_high": high,
        "effect": float((np.sign(mean) * np.inf if mean else 0) if agree else mean / spread),
        "p_value": _sign_flip_p(differences, n, seed),
        "exact": len(a) <= _EXACT_PAIRS,
    }


def _sign_flip_p(differences, n, seed):
    """As scipy.stats.permutation_test where exact; its drawn signs would take more memory."""
    pairs = len(differences)
    # the slack keeps sums that are equal on paper from being told apart by rounding
    least = abs(differences.sum()) - 1e-12 * np.abs(differences).sum()
    if pairs <= _EXACT_PAIRS:
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

    `a` and `b` say whether each classifier recognised each clip. Only clips that one of them alone
    recognised tell them apart (``only_a, only_b``); under the null hypothesis each is a fair coin.
    ``odds_ratio`` is only_a over only_b, with Clopper and Pearson's 95 % interval.
    """
    from scipy.stats import binomtest

    a, b = _pair(a, b, "mcnemar", 1)
    if not np.isin(np.concatenate([a, b]), (0, 1)).all():
        raise ValueError("mcnemar: values must be true or false; take one run, not a mean of runs")
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    counts = {"n": len(a), "only_a": only_a, "only_b": only_b}
    counts["difference"] = float((a - b).mean())
    if only_a + only_b == 0:
        return counts | {"odds_ratio": 1.0, "odds_low": 0.0, "odds_high": np.inf, "p_value": 1.0}
    test = binomtest(only_a, only_a + only_b)
    interval = test.proportion_ci(method="exact")
    shares = {"odds_ratio": only_a / (only_a + only_b)}
    shares |= {"odds_low": interval.low, "odds_high": interval.high}
    odds = {name: float(p / (1 - p)) if p < 1 else np.inf for name, p in shares.items()}
    return counts | odds | {"p_value": float(test.pvalue)}


def holm(p_values):
    """Correct the p-values of several tests so that all of them together err rarely.

    Those below 0.05 hold together with at most 5 % risk that any of them is false, however the tests
    depend on each other (Holm, Scandinavian Journal of Statistics 6, 1979).
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
    """Correlation ("spearman" or "pearson") of two columns of at least four items.

    Gives ``n, r``, its 95 % bootstrap interval over items ``ci_low, ci_high`` (BCa), and ``p_value`` of
    `n` random pairings, two-sided. With ten classes |r| below 0.6 does not exclude 0.
    """
    x, y = _pair(x, y, "correlation", 4)
    if method not in ("spearman", "pearson"):
        raise ValueError(f"method must be 'spearman' or 'pearson', got {method!r}")
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        raise ValueError("correlation: a column is constant, nothing can go with it")

    def statistic(a, b, axis=-1):
        return _row_correlation(a, b, method == "spearman")

    low, high = _bias_corrected((x, y), statistic, n, 0.95, seed)
    r = float(statistic(x, y))
    shuffled = np.random.default_rng(seed).permuted(np.tile(y, (n, 1)), axis=1)
    # the slack keeps pairings that are equal on paper from being told apart by rounding
    as_extreme = int((np.abs(statistic(x, shuffled)) >= abs(r) - 1e-12).sum())
    p_value = (as_extreme + 1) / (n + 1)
    return {"n": len(x), "r": round(r, 12), "ci_low": low, "ci_high": high, "p_value": p_value}


def _row_correlation(a, b, ranked):
    """Of all resamples at once, which scipy's own functions would take one by one."""
    if ranked:
        from scipy.stats import rankdata

        a, b = rankdata(a, axis=-1), rankdata(b, axis=-1)
    a = a - a.mean(axis=-1, keepdims=True)
    b = b - b.mean(axis=-1, keepdims=True)
    spread = np.sqrt((a**2).sum(axis=-1) * (b**2).sum(axis=-1))
    # a resample that drew one item over and over shows no association
    safe = np.where(spread > 1e-300, spread, 1.0)
    return np.where(spread > 1e-300, (a * b).sum(axis=-1) / safe, 0.0)


# --- reading a study -----------------------------------------------------------------------------


def arm_name(arm, ratio):
    """Text of an arm from the columns `arm` and `ratio` of a table, such as ``both@ps1:4``."""
    return f"{arm}:{ratio:g}" if ratio else arm


def summarise(results):
    """Mean accuracy of each arm and model of a table *results*, with two intervals.

    `n` counts trained classifiers (folds × runs). `half_width`, 1.96·SD/√runs of the runs' means over
    the folds, is how the paper draws its error bars (NaN of one run); `ci_low, ci_high` are a 95 %
    bootstrap interval over all classifiers (NaN of one). Both tell how training scatters; what other
    recordings could give say :func:`intervals`. Clips and optimiser steps are means.
    """
    rows = []
    keys = ["arm", "ratio", "model", "backend", "prompt_family"]
    for group, part in results.groupby(keys, sort=False, dropna=False):
        values = part["accuracy"].to_numpy()
        runs = part.groupby("run")["accuracy"].mean()
        low, high = bootstrap_ci(values) if len(values) > 1 else (np.nan, np.nan)
        rows.append(
            dict(zip(keys, group, strict=True))
            | {"n": len(values), "n_runs": len(runs), "accuracy": values.mean()}
            | {"half_width": _half_width(runs), "ci_low": low, "ci_high": high}
            | {"macro_f1": part["macro_f1"].mean()}
            | {name: round(part[name].mean()) for name in ("n_real", "n_synthetic", "steps")}
        )
    return pd.DataFrame(rows)


def _half_width(runs):
    # the paper's formula for five runs; Student's t would be 2.78 in place of 1.96
    return 1.96 * runs.std(ddof=1) / np.sqrt(len(runs)) if len(runs) > 1 else np.nan


def intervals(predictions, clips=None):
    """Accuracy of each arm and model, with the paper's interval and with one for other recordings.

    Of ``predictions.csv``; with `clips`, clips of one `source_id` are drawn together. `accuracy` is the
    mean over folds, then runs; `half_width` as in :func:`summarise`; `ci_low, ci_high`, 95 % bootstrap
    over folds and, within them, sources.
    """
    table = _recognised(predictions, clips)
    rows = []
    keys = ["arm", "ratio", "model"]
    for group, part in table.groupby(keys, sort=False):
        runs = part.groupby(["run", "fold"])["right"].mean().groupby("run").mean()
        each = part.groupby(["fold", "source_id", "clip_id"], sort=False)["right"].mean()
        each = each.reset_index()
        low, high = nested_bootstrap_ci(each["right"], each["fold"], each["source_id"])
        rows.append(
            dict(zip(keys, group, strict=True))
            | {"n_folds": each["fold"].nunique(), "n_runs": len(runs), "n_clips": len(each)}
            | {"n_sources": each["source_id"].nunique(), "accuracy": runs.mean()}
            | {"half_width": _half_width(runs), "ci_low": low, "ci_high": high}
        )
    return pd.DataFrame(rows)


def _recognised(predictions, clips):
    """Predictions with `right` (1.0 or 0.0), `name` of the arm and each clip's recording."""
    ids = predictions["clip_id"].astype(str)
    right = (predictions["label"] == predictions["predicted"]).astype(float)
    names = [arm_name(*row) for row in zip(predictions["arm"], predictions["ratio"], strict=True)]
    source = ids
    if clips is not None:
        source = ids.map(dict(zip(clips["clip_id"].astype(str), clips["source_id"], strict=True)))
        if source.isna().any():
            raise ValueError(
                f"{source.isna().sum()} tested clips are not in the table of clips, such as "
                f"{ids[source.isna()].iloc[0]!r}; give the table that the arms were run on"
            )
    return predictions.assign(clip_id=ids, right=right, name=names, source_id=source)


_PAIRS = {
    "clip": ["fold", "clip_id"],
    "source": ["fold", "source_id"],
    "fold": ["fold"],
    "run": ["fold", "run"],
}


def compare(predictions, pairs=None, *, of="arm", by="clip", clips=None):
    """Test arms (or models) against each other on the same recordings, corrected for their number.

    Parameters
    ----------
    predictions : pandas.DataFrame
        ``predictions.csv`` of :func:`esc.run_study`.
    pairs : list of (str, str), optional
        What is compared with what, such as ``[("both:1", "repeat:1")]``; by default every arm with
        ``"real"``.
    of : {"arm", "model"}
        Whether `pairs` names arms, tested model by model, or models, tested arm by arm.
    by : {"clip", "source", "fold", "run"}
        What makes a pair of scores. Clips, and recordings with all clips cut from them (which needs
        the table `clips`), answer for other recordings; folds also for other trainings, but five of
        them reach no p-value below 0.06; runs for other seeds on these recordings.

    Returns
    -------
    pandas.DataFrame
        `arm, ratio, model, against`, what :func:`paired_test` says (`difference` of the accuracies
        is the first minus the second), `p_holm` over all rows, and `verdict`: "better", "worse" or
        "no difference shown" at 5 %.
    """
    if by not in _PAIRS or (by == "source" and clips is None):
        raise ValueError(f"by is one of {', '.join(_PAIRS)}, got {by!r}; 'source' needs clips")
    table = _recognised(predictions, clips)
    column, within = {"arm": ("name", "model"), "model": ("model", "name")}[of]
    if pairs is None:
        pairs = [(name, "real") for name in table["name"].unique() if name != "real"]
    if not pairs:
        raise ValueError("no pair of arms or models, nothing to compare")
    arms = table.drop_duplicates("name").set_index("name")[["arm", "ratio"]]
    rows = []
    for one, other in pairs:
        scores = _paired(table, column, one, other, [within, *_PAIRS[by]])
        for value, part in scores.groupby(within, sort=False):
            name, model = (one, value) if of == "arm" else (value, one)
            place = arms.loc[str(name)].to_dict() | {"model": model, "against": str(other)}
            rows.append(place | paired_test(part["a"], part["b"]))
    table = pd.DataFrame(rows).assign(p_holm=holm([row["p_value"] for row in rows]))
    direction = np.where(table["difference"] > 0, "better", "worse")
    table["verdict"] = np.where(table["p_holm"] < 0.05, direction, "no difference shown")
    return table


def _paired(table, column, one, other, keys):
    """Mean of `right` of two arms or models on what both have; columns a and b."""
    # only what both were tested on with the same training counts on either side
    each = list(dict.fromkeys([*keys, "fold", "run", "clip_id"]))
    sides = [
        table[table[column] == str(value)].groupby(each, sort=False)["right"].mean()
        for value in (one, other)
    ]
    pairs = pd.concat(sides, axis=1, join="inner", keys=["a", "b"])
    if pairs.empty:
        raise ValueError(f"{one} and {other} share no test clip; were both run?")
    return pairs.groupby(keys, sort=False).mean()


def class_deltas(predictions, arm, model, against="real", clips=None):
    """How much each class gains or loses from one arm, such as ``"both:1"``, to another.

    `accuracy, accuracy_against` and their `difference` are means over sources, so that each recording
    counts once; `ci_low, ci_high`, a 95 % bootstrap interval over folds and sources; `p_value` over
    sources (NaN of a single one); `p_holm` over the classes.
    """
    table = _recognised(predictions[predictions["model"] == model], clips)
    keys = ["label", "fold", "source_id", "clip_id"]
    pairs = _paired(table, "name", arm, against, keys).reset_index()
    rows = []
    for label, part in pairs.groupby("label"):
        # clips of one recording resemble each other: they are one observation
        each = part.groupby(["fold", "source_id"])[["a", "b"]].mean().reset_index()
        change = each["a"] - each["b"]
        low = high = p_value = np.nan
        if len(each) > 1:
            low, high = nested_bootstrap_ci(change, each["fold"], each["source_id"])
            p_value = paired_test(each["a"], each["b"])["p_value"]
        rows.append(
            {"label": label, "n": len(part), "n_sources": len(each), "accuracy": each["a"].mean()}
            | {"accuracy_against": each["b"].mean(), "difference": change.mean()}
            | {"ci_low": low, "ci_high": high, "p_value": p_value}
        )
    table = pd.DataFrame(rows).assign(p_holm=np.nan)
    tested = table["p_value"].notna()
    if tested.any():
        table.loc[tested, "p_holm"] = holm(table.loc[tested, "p_value"])
    return table


def confusion(predictions, arm, model):
    """Count what each class (rows) was taken for (columns), over all folds and runs of one arm."""
    table = _recognised(predictions, None)
    part = table[(table["name"] == str(arm)) & (table["model"] == model)]
    if part.empty:
        raise ValueError(f"no predictions of arm {arm} with {model}; was it run?")
    classes = sorted(set(table["label"]))
    counts = pd.crosstab(part["label"], part["predicted"])
    return counts.reindex(index=classes, columns=classes, fill_value=0)


def confusion_difference(predictions, arm, model, against="real"):
    """What one arm takes each class for more often than another: difference of the shares, −1 to 1."""
    counts = [confusion(predictions, name, model) for name in (arm, against)]
    shares = [table.div(table.sum(axis=1).clip(lower=1), axis=0) for table in counts]
    return shares[0] - shares[1]


def choice_on_test(predictions, clips=None, n=2000, seed=0):
    """What it adds to an accuracy to have chosen the best classifier on the same test clips.

    The recordings are halved at random, `n` times. The classifier that is best on one half is scored
    there (`chosen_here`), as somebody does who chooses on the test clips, and on the other half
    (`elsewhere`), as is right; `bias` is the difference. Candidates are all arms, models and runs that
    were tested on all clips. After Cawley and Talbot, JMLR 11 (2010).
    """
    table = _recognised(predictions, clips)
    each = ["fold", "source_id", "clip_id"]
    right = table.pivot_table(
        index=each, columns=["arm", "ratio", "model", "run"], values="right"
    ).dropna(axis=1)
    # half of a recording would tell what the other half is
    source = right.groupby(each[:2], sort=False).ngroup().to_numpy()
    sources, candidates = source.max(initial=-1) + 1, right.shape[1]
    if min(sources, candidates) < 2:
        raise ValueError(f"{candidates} classifiers on {sources} recordings: a choice needs two of each")
    rng, scores = np.random.default_rng(seed), right.to_numpy()
    half = np.tile(np.arange(sources) < sources // 2, (n, 1))
    first = rng.permuted(half, axis=1)[:, source]
    here, there = (side @ scores / side.sum(axis=1, keepdims=True) for side in (first, ~first))
    best = here.argmax(axis=1)
    chosen, elsewhere = (part[np.arange(n), best].mean() for part in (here, there))
    return pd.Series(
        {"candidates": candidates, "clips": len(right), "sources": sources}
        | {"chosen_here": chosen, "elsewhere": elsewhere, "bias": chosen - elsewhere}
    )


def linear_probe(seed=0):
    """Logistic regression on standardised features, not yet fitted: the classifier on an embedding."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, random_state=seed))


def class_consistency(train, generated, held_out, seed=0):
    """Ask a classifier trained on real clips which class the generated clips belong to.

    Each set is (features [clips, dims], labels). The accuracy on `held_out` real clips, of a fold that
    neither classifier nor generator saw, is the ceiling against which the agreement with the generated
    clips' labels is read: columns `label, held_out, generated, n_held_out, n_generated`, last row "all".
    """
    widths = {np.shape(part[0])[1:] for part in (train, generated, held_out)}
    if len(widths) > 1 or min(len(part[1]) for part in (train, generated, held_out)) == 0:
        raise ValueError(f"the three sets need clips and equally wide features, got {widths}")
    probe = linear_probe(seed).fit(train[0], np.asarray(train[1], dtype=str))
    columns = {}
    for name, (x, labels) in (("held_out", held_out), ("generated", generated)):
        labels = np.asarray(labels, dtype=str)
        right = pd.Series(probe.predict(x) == labels)
        by_class = right.groupby(labels).agg(["mean", "size"])
        by_class.loc["all"] = right.mean(), len(right)
        columns |= {name: by_class["mean"], f"n_{name}": by_class["size"]}
    table = pd.DataFrame(columns).rename_axis("label")
    # "all" last, whatever the classes are called
    table = pd.concat([table.drop("all"), table.loc[["all"]]])
    counts = dict.fromkeys(["n_held_out", "n_generated"], "Int64")
    order = ["label", "held_out", "generated", *counts]
    return table.astype(counts).rename_axis("label").reset_index()[order]


def published():
    """Accuracies that Ronchini et al. (arXiv 2403.17864) print for UrbanSound8K, as in `summarise`.

    Ten folds, mean of five runs, measured with the released code; `half_width` is their 95 % margin
    (here for real clips only).
    """
    return store.read_table(Path(__file__).with_name("published.csv"))
