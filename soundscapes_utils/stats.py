"""Intervals, paired tests and their correction; and with them the reading of a study's results.

The first half takes plain numbers, the second the tables that :func:`esc.run_study` leaves. An arm is
named by its text, such as ``"real"`` or ``"both:1"``.
"""

import warnings

import numpy as np
import pandas as pd

_EXACT_PAIRS = 14  # 2^14 = 16,384 sign patterns are enumerated faster than 10,000 are drawn well
_AT_ONCE = 10_000_000  # numbers drawn at a time: thousands of clips would else fill gigabytes
_FEW = 30  # values of which the bootstrap's interval covers less than 93 % (benchmarks/calibration.py)


def real_rows(values, name, ndim=2, least=0):
    """float64 numbers or rows of them, of an array or tensor: real, finite, at least so many."""
    try:
        values = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
        if np.iscomplexobj(values):
            raise TypeError("they are complex")
        values = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected real numbers: {error}") from error
    if values.ndim != ndim or 0 in values.shape[1:] or len(values) < least:
        shape = "(rows, dim)" if ndim == 2 else "(numbers,)"
        raise ValueError(f"{name}: needs at least {least} of shape {shape}, got {values.shape}")
    if (wrong := ~np.isfinite(values).all(axis=tuple(range(1, ndim)))).any():
        which = f"{wrong.sum()} of {len(values)} are not finite, the first is row {wrong.argmax()}"
        raise ValueError(f"{name}: {which}; leave them out")
    return values


def _pair(a, b, name, least):
    a, b = (real_rows(v, f"{name}, {i} row", 1, least) for v, i in ((a, "first"), (b, "second")))
    if len(a) != len(b):
        raise ValueError(f"{name}: {len(a)} values against {len(b)}; pair them first")
    return a, b


# --- intervals -----------------------------------------------------------------------------------


def bootstrap_ci(values, statistic=np.mean, n=2000, confidence=0.95, seed=0):
    """Bootstrap interval of a statistic, bias-corrected and accelerated (BCa; Efron, JASA 82, 1987).

    `values` [samples] are at least two independent observations; where several come from one source,
    average them first. `statistic` maps an array to a number; with an ``axis`` argument it is evaluated
    in one go. `n` resamples follow from `seed`. Returns the lower and the upper end; the percentile
    interval where BCa is undefined (few tied values), and Student's t of the mean of fewer than 30
    values, where a bootstrap covers less (of three, 71 %).

    >>> low, high = bootstrap_ci([0.61, 0.64, 0.66, 0.60, 0.65])
    >>> low < 0.632 < high
    True
    """
    values = real_rows(values, "bootstrap_ci", 1, 2)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    if np.ptp(values) == 0:
        return float(statistic(values)), float(statistic(values))
    if statistic is np.mean and len(values) < _FEW:
        error = values.std(ddof=1) / np.sqrt(len(values))
        return _student(values.mean(), error, len(values) - 1, confidence)[:2]
    return _bias_corrected((values,), statistic, n, confidence, seed)


def _student(mean, error, freedom, confidence=0.95):
    """Ends of Student's t interval, and the two-sided p-value of a mean of zero."""
    from scipy.stats import t

    half = error * t.ppf((1 + confidence) / 2, freedom)
    return float(mean - half), float(mean + half), float(2 * t.sf(abs(mean) / error, freedom))


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
    values = real_rows(values, "nested_bootstrap_ci", 1, 2)
    if not len(values) == len(folds) == len(sources):
        sizes = f"{len(values)} values, {len(folds)} folds, {len(sources)} sources"
        raise ValueError(f"nested_bootstrap_ci: {sizes}; each value needs one of either")
    keys = [np.asarray(folds), np.asarray(sources)]
    sums = pd.Series(values).groupby(keys).agg(["sum", "size"])
    if len(sums) < 2:
        raise ValueError("nested_bootstrap_ci: all values are of one source; it needs two")
    parts = [part.to_numpy() for _, part in sums.groupby(level=0)]
    rng, totals = np.random.default_rng(seed), np.zeros((n, 2))
    drawn = rng.multinomial(len(parts), np.full(len(parts), 1 / len(parts)), size=n)
    for times, part in zip(drawn.T, parts, strict=True):
        # a fold drawn twice draws its sources twice, which is one multinomial of twice as many
        totals += rng.multinomial(times * len(part), np.full(len(part), 1 / len(part))) @ part
    tail = (1 - confidence) / 2
    low, high = np.quantile(totals[:, 0] / totals[:, 1], [tail, 1 - tail])
    return float(low), float(high)


# --- tests ---------------------------------------------------------------------------------------


def paired_test(a, b, n=10_000, seed=0):
    """Paired permutation test of mean(a − b), exact up to 14 pairs.

    Under the null hypothesis each pair could be swapped: the signs of the differences are
    enumerated, or drawn at random (`n` patterns from `seed`) where there are too many pairs.

    Parameters
    ----------
    a, b : array_like, shape (pairs,)
        Scores of two systems on the same independent things (recordings, folds), in the same
        order; at least two. Says nothing of other trainings, which :func:`compare` can.

    Returns
    -------
    dict
        ``n`` pairs; ``difference``, the mean of a − b; ``ci_low`` and ``ci_high``, its 95 %
        interval as of :func:`bootstrap_ci`; ``effect``, difference over the differences' SD (Cohen's
        d_z; infinite where all differences agree); ``p_value``, two-sided; ``exact``. With k pairs no
        p-value can be below 2^(1−k): five folds never reach .05.

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


def holm(p_values):
    """Correct the p-values of several tests so that all of them together err rarely.

    Those below 0.05 hold together with at most 5 % risk that any of them is false, however the tests
    depend on each other (Holm, Scandinavian Journal of Statistics 6, 1979). NaN is no test.
    """
    adjusted = np.array(p_values, dtype=np.float64)
    tested = np.flatnonzero(~np.isnan(adjusted))
    p = real_rows(adjusted[tested], "holm", 1)
    if (p < 0).any() or (p > 1).any():
        raise ValueError(f"holm: p-values lie between 0 and 1, got {p.min():g} to {p.max():g}")
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted[tested[order]] = np.minimum(steps, 1.0)
    return adjusted


# --- reading a study -----------------------------------------------------------------------------


def arm_name(arm, ratio):
    """Text of an arm from the columns `arm` and `ratio` of a table, such as ``both@ps1:4``."""
    return f"{arm}:{ratio:g}" if ratio else arm


def summarise(results):
    """Mean accuracy of each arm and model of a table *results*, with two intervals.

    `n` counts trained classifiers (folds × runs). `half_width`, 1.96·SD/√runs of the runs' means over
    the folds, is how the paper draws its error bars (NaN of one run; of three it covers 81 %, not 95);
    `ci_low, ci_high` are a 95 % interval over all classifiers (NaN of one), of fewer than 30 Student's.
    Both tell how training scatters, not what other recordings could give (:func:`intervals`).
    """
    rows = []
    keys = ["arm", "ratio", "model", "backend", "prompt_family"]
    for group, part in results.groupby(keys, sort=False, dropna=False):
        values = part["accuracy"].to_numpy()
        runs = part.groupby("run")["accuracy"].mean()
        low, high = bootstrap_ci(values) if len(values) > 1 else (np.nan, np.nan)
        low, high = np.clip([low, high], 0.0, 1.0)
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


def intervals(predictions):
    """Accuracy of each arm and model, with the paper's interval and with one for other recordings.

    Of ``predictions.csv``; clips of one `source_id` are drawn together.
    `accuracy` is the mean over folds, then runs; `half_width`, how training scatters, as in
    :func:`summarise`; `ci_low, ci_high`, 95 % over folds and, within, sources, given these trainings.
    """
    table = _recognised(predictions)
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


def _recognised(predictions):
    """Predictions with `right` (1.0 or 0.0), `name` of the arm and each clip's recording."""
    ids = predictions["clip_id"].astype(str)
    right = (predictions["label"] == predictions["predicted"]).astype(float)
    names = [arm_name(*row) for row in zip(predictions["arm"], predictions["ratio"], strict=True)]
    source = predictions.get("source_id", ids)
    if source.isna().any():
        raise ValueError(f"tested clip {ids[source.isna()].iloc[0]!r} names no source_id")
    return predictions.assign(clip_id=ids, right=right, name=names, source_id=source)


_PAIRS = {"clip": "clip_id", "source": "source_id", "fold": "fold", "run": "run"}


def compare(predictions, pairs=None, *, of="arm", by=None):
    """Test arms (or models) against each other on the same recordings, corrected for their number.

    `predictions` is ``predictions.csv`` of :func:`esc.run_study`; `pairs` such as ``[("both:1",
    "repeat:1")]``, by default every arm with ``"real"``, names arms, tested model by model, or (`of`
    "model") models, tested arm by arm. `by` makes the pairs of scores: "source", recordings with all
    clips cut from them, by default where the predictions tell the `source_id`; else "clip", which holds
    if each is a recording of its own (else 9 to 15 % false positives); "fold", of which five reach no p
    below 0.06; "run". Where every training was repeated, squared standard errors over recordings and
    over runs add, and p is the larger of this t test's and the permutation's. Three runs leave it two
    degrees of freedom: if training scatters more than recordings, only four standard errors are shown.

    Returns `arm, ratio, model, against`, what :func:`paired_test` says (`difference` of the accuracies
    is the first minus the second), `by`, what the answer is `given`, such as "these trainings", `p_holm`
    over all rows, and `verdict`: "better", "worse" or "no difference shown" at 5 %.
    """
    by = by or ("source" if "source_id" in predictions else "clip")
    if by not in _PAIRS or (by == "source" and "source_id" not in predictions):
        raise ValueError(f"by is one of {', '.join(_PAIRS)}, got {by!r}; 'source' needs source_id")
    table, unit = _recognised(predictions), list(dict.fromkeys(["fold", _PAIRS[by]]))
    column, within = {"arm": ("name", "model"), "model": ("model", "name")}[of]
    if pairs is None:
        pairs = [(name, "real") for name in table["name"].unique() if name != "real"]
    if not pairs:
        raise ValueError("no pair of arms or models, nothing to compare")
    arms = table.drop_duplicates("name").set_index("name")[["arm", "ratio"]]
    rows = []
    for one, other in pairs:
        scores = _paired(table, column, one, other, [within, *unit])
        for value, part in scores.groupby(within, sort=False):
            name, model = (one, value) if of == "arm" else (value, one)
            place = arms.loc[str(name)].to_dict() | {"model": model, "against": str(other)}
            rows.append(place | _tested(part, unit) | {"by": by})
    table = pd.DataFrame(rows).assign(p_holm=holm([row["p_value"] for row in rows]))
    direction = np.where(table["difference"] > 0, "better", "worse")
    table["verdict"] = np.where(table["p_holm"] < 0.05, direction, "no difference shown")
    return table


def _paired(table, column, one, other, keys):
    """Mean of `right` of two arms or models on what both have, by `keys` and run; columns a and b."""
    # only what both were tested on with the same training counts on either side
    each = list(dict.fromkeys([*keys, "fold", "run", "clip_id"]))
    sides = [
        table[table[column] == str(value)].groupby(each, sort=False)["right"].mean()
        for value in (one, other)
    ]
    pairs = pd.concat(sides, axis=1, join="inner", keys=["a", "b"])
    if pairs.empty:
        raise ValueError(f"{one} and {other} share no test clip; were both run?")
    return pairs.groupby(list(dict.fromkeys([*keys, "run"])), sort=False).mean()


def _tested(pairs, unit):
    """Paired test over `unit`, and over trainings where all of it was tested by each of several runs."""
    each = pairs.groupby(unit, sort=False).mean()
    found = paired_test(each["a"], each["b"])
    if unit[-1] in ("fold", "run"):
        return found | {"given": "" if unit[-1] == "fold" else "these recordings"}
    gain = pairs.assign(gain=pairs["a"] - pairs["b"]).pivot_table("gain", unit, "run")
    gain = gain.dropna(axis=1).to_numpy()
    n, runs = gain.shape
    if runs < 2:
        return found | {"given": "these trainings"}
    by_unit, by_run = gain.mean(axis=1), gain.mean(axis=0)
    parts = np.array([by_unit.var(ddof=1) / n, by_run.var(ddof=1) / runs])
    # both hold the scatter of single answers: half goes (without all of it, few runs err too often)
    double = gain - by_unit[:, None] - by_run + gain.mean()
    double = (double**2).sum() / ((n - 1) * (runs - 1) * n * runs)
    if (square := max(parts[0], parts.sum() - double / 2)) > 0:
        freedom = parts.sum() ** 2 / (parts**2 / [n - 1, runs - 1]).sum()
        low, high, p = _student(found["difference"], np.sqrt(square), freedom)
        found |= {"ci_low": low, "ci_high": high, "p_value": max(p, found["p_value"]), "exact": False}
    return found | {"given": ""}


def class_deltas(predictions, arm, model, against="real"):
    """How much each class gains or loses from one arm, such as ``"both:1"``, to another.

    `accuracy, accuracy_against` and their `difference` are means over sources, so that each recording
    counts once; `ci_low, ci_high`, their 95 % interval, `p_value` (NaN of a single one) and `given` as
    of :func:`compare`; `p_holm` over the classes.
    """
    table = _recognised(predictions[predictions["model"] == model])
    unit = ["fold", "source_id"]
    tested = ["ci_low", "ci_high", "p_value", "given"]
    pairs = _paired(table, "name", arm, against, ["label", *unit, "clip_id"])
    rows = []
    for label, part in pairs.groupby("label"):
        # clips of one recording resemble each other: they are one observation
        each, n = part.groupby(unit).mean(), part.groupby([*unit, "clip_id"]).ngroups
        row = {"label": label, "n": n, "n_sources": len(each), "accuracy": each["a"].mean()}
        row |= {"accuracy_against": each["b"].mean(), "difference": (each["a"] - each["b"]).mean()}
        found = _tested(part, unit) if len(each) > 1 else {}
        rows.append(row | {name: found.get(name, np.nan) for name in tested})
    table = pd.DataFrame(rows)
    return table.assign(p_holm=holm(table["p_value"]))


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
    probe, table = linear_probe(seed).fit(train[0], np.asarray(train[1], dtype=str)), pd.DataFrame()
    for name, (x, labels) in (("held_out", held_out), ("generated", generated)):
        labels = np.asarray(labels, dtype=str)
        right = pd.Series(probe.predict(x) == labels)
        by_class = right.groupby(labels).agg(["mean", "size"])
        by_class.loc["all"] = right.mean(), len(right)
        table = table.join(by_class.set_axis([name, f"n_{name}"], axis=1), how="outer")
    # "all" last, whatever the classes are called
    table = table.loc[[*table.index.drop("all"), "all"]].rename_axis("label").reset_index()
    counts = dict.fromkeys(["n_held_out", "n_generated"], "Int64")
    return table.astype(counts)[["label", "held_out", "generated", *counts]]
