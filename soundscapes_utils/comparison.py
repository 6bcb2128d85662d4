"""Reading a study's results: intervals, paired tests, classes, and the published figures beside.

All functions take the tables that :func:`esc.run_arms` leaves. No claim about arms should be made
without its row of :func:`compare_all`.
"""

import numpy as np
import pandas as pd

from soundscapes_utils import stats

RESULT_COLUMNS = [
    *("arm", "model", "backend", "prompt_family", "ratio", "fold", "run", "seed", "n_real"),
    *("n_synthetic", "accuracy", "macro_f1", "epochs", "seconds"),
    *("steps", "note"),
]


def summarise(results):
    """Mean accuracy of each arm and model with two intervals.

    Parameters
    ----------
    results : pandas.DataFrame
        Table *results* of :func:`run_arms`.

    Returns
    -------
    pandas.DataFrame
        `arm, ratio, model, backend, prompt_family, n, n_runs, accuracy, half_width, ci_low, ci_high,
        macro_f1, n_real, n_synthetic, steps`. `n` counts trained classifiers (folds × runs);
        `half_width`, 1.96·SD/√runs of the runs' means over the folds, as the paper draws its error
        bars: how training scatters (NaN of one run); `ci_low` and `ci_high` are a 95 % bootstrap
        interval of the mean over all classifiers (NaN of one); clips and optimiser steps are means.

    Notes
    -----
    With few folds, both intervals tell how results scatter over seeds and these folds, not over
    all recordings that could have been tested, see :func:`intervals`.

    Examples
    --------
    >>> one = dict.fromkeys(RESULT_COLUMNS, 0) | {"accuracy": 0.5}
    >>> summarise(pd.DataFrame([one, one | {"run": 1}]))[["n", "half_width"]].to_numpy().tolist()
    [[2.0, 0.0]]
    """
    rows = []
    keys = ["arm", "ratio", "model", "backend", "prompt_family"]
    for group, part in results.fillna({"backend": "", "prompt_family": ""}).groupby(
        keys, sort=False
    ):
        values = part["accuracy"].to_numpy()
        runs = part.groupby("run")["accuracy"].mean()
        low, high = stats.bootstrap_ci(values) if len(values) > 1 else (np.nan, np.nan)
        rows.append(
            dict(zip(keys, group, strict=True))
            | {"n": len(values), "n_runs": len(runs), "accuracy": values.mean()}
            | {"half_width": _half_width(runs), "ci_low": low, "ci_high": high}
            | {"macro_f1": part["macro_f1"].mean()}
            | {name: round(part[name].mean()) for name in ("n_real", "n_synthetic", "steps")}
        )
    return pd.DataFrame(rows)


def _half_width(runs):
    return stats.mean_interval(runs)[1] if len(runs) > 1 else np.nan


def intervals(predictions, clips=None):
    """Accuracy of each arm and model with the paper's interval and with one for other recordings.

    Parameters
    ----------
    predictions : pandas.DataFrame
        ``predictions.csv`` of :func:`run_arms`.
    clips : pandas.DataFrame, optional
        Table *clips*: clips of one `source_id` are then drawn together. Without it each clip counts
        as a recording of its own.

    Returns
    -------
    pandas.DataFrame
        `arm, ratio, model, n_folds, n_runs, n_clips, n_sources, accuracy` (mean over folds, then
        runs); `half_width`, 1.96·SD/√runs of the runs' means, as the paper has it: how training
        scatters (NaN of one run); `ci_low, ci_high`, 95 % bootstrap over folds and, within them,
        sources: what other recordings could give.

    Raises
    ------
    ValueError
        A clip of `predictions` is not in `clips`.

    Examples
    --------
    >>> one = pd.DataFrame({"clip_id": list("abcd"), "fold": [4, 4, 5, 5], "label": "dog"})
    >>> one = one.assign(predicted=["dog", "rain", "dog", "dog"], arm="real", ratio=0.0, model="svm")
    >>> intervals(one.assign(run=0))[["n_folds", "n_runs", "accuracy"]].values.tolist()
    [[2.0, 1.0, 0.75]]
    """
    table = _recognised(predictions, clips)
    rows = []
    keys = ["arm", "ratio", "model"]
    for group, part in table.groupby(keys, sort=False):
        runs = part.groupby(["run", "fold"])["right"].mean().groupby("run").mean()
        each = part.groupby(["fold", "source_id", "clip_id"], sort=False)["right"].mean()
        each = each.reset_index()
        low, high = stats.nested_bootstrap_ci(each["right"], each["fold"], each["source_id"])
        rows.append(
            dict(zip(keys, group, strict=True))
            | {"n_folds": each["fold"].nunique(), "n_runs": len(runs), "n_clips": len(each)}
            | {"n_sources": each["source_id"].nunique(), "accuracy": runs.mean()}
            | {"half_width": _half_width(runs), "ci_low": low, "ci_high": high}
        )
    return pd.DataFrame(rows)


def _recognised(predictions, clips):
    """Predictions with `right` (1.0 or 0.0) and the recording that each clip was cut from."""
    names = predictions["clip_id"].astype(str)
    right = (predictions["label"] == predictions["predicted"]).astype(float)
    source = names
    if clips is not None:
        source = names.map(dict(zip(clips["clip_id"].astype(str), clips["source_id"], strict=True)))
        if source.isna().any():
            raise ValueError(
                f"{source.isna().sum()} tested clips are not in the table of clips, such as "
                f"{names[source.isna()].iloc[0]!r}; give the table that the arms were run on"
            )
    return predictions.assign(clip_id=names, right=right, source_id=source)


_PAIRS = {
    "clip": ["fold", "clip_id"],
    "source": ["fold", "source_id"],
    "fold": ["fold"],
    "run": ["fold", "run"],
}


def compare(predictions, arm, ratio, against=("real", 0.0), by="clip", clips=None):
    """Test one arm against another on the same recordings, model by model.

    Each test clip gives one pair: how often it was recognised, over the runs, in either arm.

    Parameters
    ----------
    predictions : pandas.DataFrame
        ``predictions.csv`` of :func:`run_arms`.
    arm : str
        Arm to test.
    ratio : float
        Its ratio or number of folds.
    against : tuple of (str, float), default ("real", 0.0)
        The arm to compare with.
    by : {"clip", "source", "fold", "run"}
        What makes a pair: a test clip; a recording with all clips cut from it (needs `clips`); a
        fold; each training of a fold.
    clips : pandas.DataFrame, optional
        Table *clips*, for its `source_id`.

    Returns
    -------
    pandas.DataFrame
        One row a model: `arm, ratio, model` and what :func:`stats.paired_test` says: `n` pairs,
        `difference` of the accuracies (`arm` minus `against`), its interval, `effect`, `p_value`, …

    Raises
    ------
    ValueError
        The two arms share no test clip; unknown `by`; sources wanted without `clips`.

    Notes
    -----
    Clips and sources answer for other recordings and these trained classifiers; folds answer for
    other recordings and trainings, but five of them reach no p-value below 0.06; runs answer for
    other seeds on these recordings. Several comparisons at once need a correction, see
    :func:`compare_all`.

    Examples
    --------
    >>> one = pd.DataFrame({"clip_id": list("abcd"), "fold": 5, "run": 0, "model": "sbcnn"})
    >>> one = one.assign(label="dog", predicted=["dog", "dog", "rain", "dog"])
    >>> real, both = one.assign(arm="real", ratio=0.0), one.assign(arm="both", ratio=1.0)
    >>> compare(pd.concat([real, both]), "both", 1.0)["difference"].tolist()
    [0.0]
    """
    if by not in _PAIRS or (by == "source" and clips is None):
        raise ValueError(f"by is one of {', '.join(_PAIRS)}, got {by!r}; 'source' needs clips")
    table = _recognised(predictions, clips)
    pairs = _paired(table, (arm, ratio), against, ["model", *_PAIRS[by]])
    return pd.DataFrame(
        {"arm": arm, "ratio": ratio, "model": model} | stats.paired_test(part["a"], part["b"])
        for model, part in pairs.groupby("model", sort=False)
    )


def _paired(table, arm, against, keys):
    """Mean of `right` of two arms, side by side on what both have; columns a and b."""
    # only what both were tested on with the same training counts on either side
    each = list(dict.fromkeys([*keys, "fold", "run", "clip_id"]))
    sides = []
    for name, amount in (arm, against):
        found = table[(table["arm"] == name) & (table["ratio"] == amount)]
        sides.append(found.groupby(each, sort=False)["right"].mean())
    pairs = pd.concat(sides, axis=1, join="inner", keys=["a", "b"])
    if pairs.empty:
        raise ValueError(
            f"{_named(*arm)} and {_named(*against)} share no test clip; were both run?"
        )
    return pairs.groupby(keys, sort=False).mean()


def _named(arm, amount):
    return f"{arm}:{amount:g}" if amount else arm


def compare_pairs(predictions, pairs, by="clip", clips=None):
    """Test each of several arms against its own control, and correct for their number.

    Parameters
    ----------
    predictions, by, clips
        See :func:`compare`.
    pairs : list of ((str, float), (str, float))
        Arm and ratio, then arm and ratio of what it is compared with.

    Returns
    -------
    pandas.DataFrame
        Rows of :func:`compare` with `against`, the name of the other arm; `p_holm`, the p-value after
        Holm's correction over all rows (:func:`stats.holm`), and `verdict`: "better", "worse" or
        "no difference shown" at 5 %.

    Raises
    ------
    ValueError
        See :func:`compare`; no pair.

    Examples
    --------
    >>> one = pd.DataFrame({"clip_id": list("abcd"), "fold": 5, "run": 0, "model": "sbcnn"})
    >>> one = one.assign(label="dog", predicted=["dog", "dog", "rain", "dog"])
    >>> mixed, dropped = one.assign(arm="mixed", ratio=1.0), one.assign(arm="dropped", ratio=1.0)
    >>> pair = (("mixed", 1.0), ("dropped", 1.0))
    >>> compare_pairs(pd.concat([mixed, dropped]), [pair])["against"].tolist()
    ['dropped:1']
    """
    if not pairs:
        raise ValueError("no pair of arms, nothing to compare")
    rows = []
    for arm, (name, amount) in pairs:
        table = compare(predictions, *arm, against=(name, amount), by=by, clips=clips)
        table.insert(3, "against", _named(name, amount))
        rows.append(table)
    table = pd.concat(rows, ignore_index=True)
    table["p_holm"] = stats.holm(table["p_value"])
    direction = np.where(table["difference"] > 0, "better", "worse")
    table["verdict"] = np.where(table["p_holm"] < 0.05, direction, "no difference shown")
    return table


def compare_models(predictions, pairs, by="clip", clips=None):
    """Test one model against another in every arm that both were trained in.

    Parameters
    ----------
    predictions, by, clips
        See :func:`compare`.
    pairs : list of (str, str)
        A model and what it is compared with, such as ``("sbcnn:faithful", "sbcnn")``. Only folds and
        runs that both have count.

    Returns
    -------
    pandas.DataFrame
        One row a pair, arm and ratio: columns of :func:`compare_pairs`, where `against` is the other
        model and `difference` is `model` minus `against`; `p_holm` is corrected over all rows.

    Raises
    ------
    ValueError
        See :func:`compare_pairs`; a pair has no arm in common.

    Examples
    --------
    >>> one = pd.DataFrame({"clip_id": list("abcd"), "fold": 5, "run": 0, "arm": "real"})
    >>> one = one.assign(ratio=0.0, label="dog", predicted=["dog", "dog", "rain", "dog"])
    >>> both = pd.concat([one.assign(model="svm"), one.assign(model="knn", predicted="dog")])
    >>> compare_models(both, [("svm", "knn")])[["model", "against", "difference"]].values.tolist()
    [['svm', 'knn', -0.25]]
    """
    # arms and models change places: what is compared "model by model" is then compared arm by arm
    arms = ["arm", "ratio"]
    number = predictions.groupby(arms, sort=False).ngroup()
    swapped = predictions.assign(arm=predictions["model"], ratio=0.0, model=number)
    wanted = [((model, 0.0), (other, 0.0)) for model, other in pairs]
    table = compare_pairs(swapped, wanted, by, clips)
    named = predictions[arms].drop_duplicates().iloc[table["model"]]
    table["model"] = table["arm"]
    table[arms] = named.to_numpy()
    return table.astype({"ratio": float})


def compare_all(predictions, against=("real", 0.0), by="clip", clips=None):
    """Test every arm against one, and correct for their number.

    Parameters
    ----------
    predictions, against, by, clips
        See :func:`compare`.

    Returns
    -------
    pandas.DataFrame
        Rows of :func:`compare` for all other arms, with `p_holm` and `verdict` of
        :func:`compare_pairs`.

    Raises
    ------
    ValueError
        See :func:`compare`; there is no other arm.

    Examples
    --------
    >>> one = pd.DataFrame({"clip_id": list("abcd"), "fold": 5, "run": 0, "model": "sbcnn"})
    >>> one = one.assign(label="dog", predicted=["dog", "dog", "rain", "dog"])
    >>> real, both = one.assign(arm="real", ratio=0.0), one.assign(arm="both", ratio=1.0)
    >>> compare_all(pd.concat([real, both]))["verdict"].tolist()
    ['no difference shown']
    """
    arms = predictions[["arm", "ratio"]].drop_duplicates().itertuples(index=False, name=None)
    others = [arm for arm in arms if arm != tuple(against)]
    if not others:
        raise ValueError(f"there is no arm but {against[0]}; nothing to compare")
    pairs = [(arm, against) for arm in others]
    return compare_pairs(predictions, pairs, by, clips).drop(columns="against")


def mcnemar_runs(predictions, arm, ratio, against=("real", 0.0)):
    """McNemar's test of two arms for each model and run: pairs of single classifiers.

    Parameters
    ----------
    predictions, arm, ratio, against
        See :func:`compare`.

    Returns
    -------
    pandas.DataFrame
        One row a model and run, over all folds: `arm, ratio, model, run`, what
        :func:`stats.mcnemar` says (clips that one arm alone recognises, `odds_ratio` with its
        interval, `p_value`), and `p_holm` over all rows.

    Raises
    ------
    ValueError
        The two arms share no test clip.

    Examples
    --------
    >>> one = pd.DataFrame({"clip_id": list("abcd"), "fold": 5, "run": 0, "model": "sbcnn"})
    >>> one = one.assign(label="dog", predicted=["dog", "dog", "rain", "rain"])
    >>> real, both = one.assign(arm="real", ratio=0.0), one.assign(arm="both", ratio=1.0)
    >>> both = both.assign(predicted="dog")
    >>> mcnemar_runs(pd.concat([real, both]), "both", 1.0)[["only_a", "only_b"]].values.tolist()
    [[2, 0]]
    """
    table = _recognised(predictions, None)
    pairs = _paired(table, (arm, ratio), against, ["model", "run", "fold", "clip_id"])
    tests = pd.DataFrame(
        {"arm": arm, "ratio": ratio, "model": model, "run": run}
        | stats.mcnemar(part["a"], part["b"])
        for (model, run), part in pairs.groupby(["model", "run"], sort=False)
    )
    return tests.assign(p_holm=stats.holm(tests["p_value"]))


def class_deltas(predictions, arm, ratio, model, against=("real", 0.0), clips=None):
    """How much each class gains or loses from one arm to another.

    Parameters
    ----------
    predictions, arm, ratio, against, clips
        See :func:`compare`.
    model : str
        Which classifiers.

    Returns
    -------
    pandas.DataFrame
        `label, n` clips, `n_sources`; `accuracy` in `arm` and `accuracy_against`, means over sources,
        so that each recording counts once; their `difference` with a 95 % bootstrap interval `ci_low,
        ci_high` over folds and sources, and `p_value` over sources (NaN of a single one); `p_holm`
        over the classes. Without `clips` each clip is a source of its own.

    Raises
    ------
    ValueError
        The two arms share no test clip of `model`.

    Examples
    --------
    >>> one = pd.DataFrame({"clip_id": list("abcd"), "fold": 5, "run": 0, "model": "sbcnn"})
    >>> one = one.assign(label="dog", predicted=["dog", "dog", "rain", "rain"])
    >>> real, both = one.assign(arm="real", ratio=0.0), one.assign(arm="both", ratio=1.0)
    >>> both = both.assign(predicted="dog")
    >>> class_deltas(pd.concat([real, both]), "both", 1.0, "sbcnn")["difference"].tolist()
    [0.5]
    """
    table = _recognised(predictions[predictions["model"] == model], clips)
    keys = ["label", "fold", "source_id", "clip_id"]
    pairs = _paired(table, (arm, ratio), against, keys).reset_index()
    rows = []
    for label, part in pairs.groupby("label"):
        # clips of one recording resemble each other: they are one observation
        each = part.groupby(["fold", "source_id"])[["a", "b"]].mean().reset_index()
        change = each["a"] - each["b"]
        low = high = p_value = np.nan
        if len(each) > 1:
            low, high = stats.nested_bootstrap_ci(change, each["fold"], each["source_id"])
            p_value = stats.paired_test(each["a"], each["b"])["p_value"]
        rows.append(
            {"label": label, "n": len(part), "n_sources": len(each), "accuracy": each["a"].mean()}
            | {"accuracy_against": each["b"].mean(), "difference": change.mean()}
            | {"ci_low": low, "ci_high": high, "p_value": p_value}
        )
    return _with_holm(pd.DataFrame(rows))


def _with_holm(table):
    tested = table["p_value"].notna()
    table = table.assign(p_holm=np.nan)
    if tested.any():
        table.loc[tested, "p_holm"] = stats.holm(table.loc[tested, "p_value"])
    return table


def confusion_difference(predictions, arm, ratio, model, against=("real", 0.0)):
    """What one arm takes each class for more often than another: difference of the shares.

    Parameters
    ----------
    predictions, arm, ratio, against
        See :func:`compare`.
    model : str
        Which classifiers.

    Returns
    -------
    pandas.DataFrame of float
        Rows: true class; columns: predicted class; −1 to 1. Rows sum to 0; a gain stands on the
        diagonal.

    Raises
    ------
    ValueError
        There are no such predictions.

    Examples
    --------
    >>> one = {"label": ["a", "b"], "arm": ["real", "both"], "ratio": [0.0, 1.0], "model": "svm"}
    >>> table = pd.DataFrame(one | {"predicted": ["a", "a"]})
    >>> confusion_difference(table, "both", 1.0, "svm").loc["b"].tolist()
    [1.0, 0.0]
    """
    shares = []
    for name, amount in ((arm, ratio), against):
        counts = confusion(predictions, name, amount, model)
        shares.append(counts.div(counts.sum(axis=1).clip(lower=1), axis=0))
    return shares[0] - shares[1]


def choice_on_test(predictions, clips=None, n=2000, seed=0):
    """What it adds to an accuracy to have chosen the best classifier on the same test clips.

    The recordings are halved at random, again and again. The classifier that is best on one half is
    scored there, as somebody does who chooses on the test clips, and on the other half, as is right.

    Parameters
    ----------
    predictions : pandas.DataFrame
        ``predictions.csv`` of :func:`run_arms`. Candidates are all that it holds: every arm, ratio,
        model and run that was tested on all clips.
    clips : pandas.DataFrame, optional
        Table *clips*: clips of one `source_id` then stay in one half. Without it each clip counts as
        a recording of its own.
    n : int, default 2000
        Halvings.
    seed : int, default 0
        Of the halvings.

    Returns
    -------
    pandas.Series
        `candidates`, `clips`, `sources`; mean accuracies `chosen_here` (on the half of the choice),
        `elsewhere` (on the other) and their difference `bias`.

    Raises
    ------
    ValueError
        Fewer than two candidates or recordings: there is nothing to choose, or nothing to halve; a
        clip of `predictions` is not in `clips`.

    Notes
    -----
    Cawley and Talbot, "On over-fitting in model selection and subsequent selection bias in
    performance evaluation", Journal of Machine Learning Research 11 (2010).

    Examples
    --------
    >>> one = pd.DataFrame({"clip_id": list("abcd"), "fold": 5, "run": 0, "model": "sbcnn"})
    >>> one = one.assign(label="dog", predicted="dog", ratio=0.0)
    >>> choice_on_test(pd.concat([one.assign(arm="real"), one.assign(arm="both")]))["bias"]
    np.float64(0.0)
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
        raise ValueError(
            f"{candidates} classifiers on {sources} recordings: a choice needs two of each"
        )
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


def class_distances(real, generated, embedding="", candidate=""):
    """Distance of the synthetic clips of each class from its real clips.

    Parameters
    ----------
    real, generated : tuple of (np.ndarray (clips, dims), sequence of str (clips,))
        Any embedding, and labels. Take real *training* clips: a distance to the test clips would
        know the answer.
    embedding, candidate : str
        Names for the table.

    Returns
    -------
    pandas.DataFrame
        Rows of a table *scores*, two a class that both hold: `metric` ("KAD", "FAD"), `embedding`,
        `reference` (the class), `candidate`, `value`, `n_reference, n_candidate`. For
        :func:`class_correlation`.

    Raises
    ------
    ValueError
        A class with fewer than two clips on a side.

    Notes
    -----
    KAD (:func:`fad.kernel_distance`), as its expectation does not depend on the number of clips,
    which is small for a class; FAD (:func:`fad.frechet_distance`) beside it, as most print it: it
    ranks classes only where their clips are equally many.

    Examples
    --------
    >>> x, y = np.random.default_rng(0).normal(size=(8, 3)), ["dog"] * 8
    >>> table = class_distances((x, y), (x + 9, y)).set_index("metric")["value"]
    >>> table.round().tolist()  # FAD: 9² in each of three dimensions
    [117.0, 243.0]
    """
    from soundscapes_utils import fad

    sides = [(np.asarray(x), np.asarray(labels, dtype=str)) for x, labels in (real, generated)]
    rows = []
    for label in sorted(set(sides[0][1]) & set(sides[1][1])):
        pair = [x[labels == label] for x, labels in sides]
        if min(map(len, pair)) < 2:
            raise ValueError(
                f"{str(label)!r} has {len(pair[0])} real and {len(pair[1])} synthetic clips"
            )
        rows += [
            {"metric": metric, "embedding": embedding, "reference": label, "candidate": candidate}
            | {"value": float(distance(*pair))}
            | {"n_reference": len(pair[0]), "n_candidate": len(pair[1])}
            for metric, distance in (("KAD", fad.kernel_distance), ("FAD", fad.frechet_distance))
        ]
    return pd.DataFrame(rows)


def class_correlation(scores, deltas, method="spearman", n=10_000, seed=0):
    """Does a distance of the synthetic clips, class by class, foretell what they are worth?

    Parameters
    ----------
    scores : pandas.DataFrame
        Table *scores* with one row a class: `reference` is the class; `metric, embedding, candidate,
        value` (such as FAD or KAD of the class).
    deltas : pandas.DataFrame
        Of :func:`class_deltas`: `label, difference`.
    method, n, seed
        See :func:`stats.correlation`.

    Returns
    -------
    pandas.DataFrame
        `metric, embedding, candidate`, number of classes `n`, `r` with its 95 % interval `ci_low,
        ci_high`, `p_value` and `p_holm` over the rows. A useful distance has r below 0.

    Raises
    ------
    ValueError
        Fewer than four classes in common, or a column that does not vary.

    Examples
    --------
    >>> scores = pd.DataFrame({"reference": list("abcd"), "value": [4.0, 3.0, 2.0, 1.0]})
    >>> scores = scores.assign(metric="FAD", embedding="yamnet", candidate="mini")
    >>> deltas = pd.DataFrame({"label": list("abcd"), "difference": [0.0, 0.1, 0.2, 0.3]})
    >>> class_correlation(scores, deltas)["r"].tolist()
    [-1.0]
    """
    both = scores.merge(deltas, left_on="reference", right_on="label", suffixes=("_score", ""))
    keys = ["metric", "embedding", "candidate"]
    if both.empty:
        raise ValueError("scores and deltas have no class in common; scores need one row a class")
    rows = [
        dict(zip(keys, group, strict=True))
        | stats.correlation(part["value"], part["difference"], method, n, seed)
        for group, part in both.groupby(keys, sort=False)
    ]
    return _with_holm(pd.DataFrame(rows))


def confusion(predictions, arm, ratio, model):
    """Count what each class was taken for, over all folds and runs of one arm and model.

    Parameters
    ----------
    predictions : pandas.DataFrame
        ``predictions.csv`` of :func:`run_arms`.
    arm, ratio, model
        Which classifiers.

    Returns
    -------
    pandas.DataFrame of int
        Rows: true class; columns: predicted class; same order.

    Raises
    ------
    ValueError
        There are no such predictions.

    Examples
    --------
    >>> one = {"label": ["a", "b"], "predicted": ["a", "a"], "arm": "real", "ratio": 0.0}
    >>> confusion(pd.DataFrame(one | {"model": "sbcnn"}), "real", 0.0, "sbcnn").values.tolist()
    [[1, 0], [1, 0]]
    """
    names = sorted(set(predictions["label"]))
    part = predictions[
        (predictions["arm"] == arm)
        & (predictions["ratio"] == ratio)
        & (predictions["model"] == model)
    ]
    if part.empty:
        raise ValueError(f"no predictions of arm {arm}:{ratio:g} with {model}; was it run?")
    counts = pd.crosstab(part["label"], part["predicted"])
    return counts.reindex(index=names, columns=names, fill_value=0)


def class_consistency(train, generated, held_out, seed=0):
    """Ask a judge trained on real clips which class the generated clips belong to.

    The judge is a logistic regression on standardised features. Its accuracy on held-out real clips
    is the ceiling against which its agreement with the generated clips' labels is read.

    Parameters
    ----------
    train, generated, held_out : tuple of (np.ndarray (clips, dims), sequence of str (clips,))
        Features (any embedding) and labels: real training clips, generated clips, real clips of a
        fold that neither judge nor generator saw.
    seed : int, default 0
        Of the solver.

    Returns
    -------
    pandas.DataFrame
        Columns `label, held_out, generated, n_held_out, n_generated`: accuracy from 0 to 1 of each
        class, then of all clips (label ``"all"``).

    Raises
    ------
    ValueError
        A set is empty, or the features differ in width.

    Examples
    --------
    >>> x, y = np.eye(4), ["a", "a", "b", "b"]
    >>> class_consistency((x, y), (x, y), (x, y))["generated"].tolist()
    [1.0, 1.0, 1.0]
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    widths = {np.shape(part[0])[1:] for part in (train, generated, held_out)}
    if len(widths) > 1 or min(len(part[1]) for part in (train, generated, held_out)) == 0:
        raise ValueError(f"the three sets need clips and equally wide features, got {widths}")
    judge = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, random_state=seed))
    judge.fit(train[0], np.asarray(train[1], dtype=str))
    columns = {}
    for name, (x, labels) in (("held_out", held_out), ("generated", generated)):
        labels = np.asarray(labels, dtype=str)
        right = pd.Series(judge.predict(x) == labels)
        by_class = right.groupby(labels).agg(["mean", "size"])
        by_class.loc["all"] = right.mean(), len(right)
        columns |= {name: by_class["mean"], f"n_{name}": by_class["size"]}
    table = pd.DataFrame(columns).rename_axis("label").drop("all")
    table.loc["all"] = {name: column["all"] for name, column in columns.items()}
    counts = {name: "Int64" for name in table if name.startswith("n_")}
    order = ["label", "held_out", "generated", "n_held_out", "n_generated"]
    return table.astype(counts).reset_index()[order]


# Accuracy in per cent. Columns: SB-CNN at 1 2 3 4 (or 1 … 8 folds replaced), then CRNN.
_PUBLISHED = """
both AudioGen simple: 68.42 69.79 69.73 70.06 / 65.18 66.00 66.66 67.49
both AudioGen gpt: 68.88 68.36 68.16 68.74 / 65.39 66.16 66.54 66.86
both AudioLDM2 simple: 68.04 68.70 68.61 68.89 / 63.41 63.73 64.74 64.34
both AudioLDM2 gpt: 69.64 70.68 71.10 70.66 / 64.69 63.72 62.80 64.12
synthetic AudioGen simple: 40.32 48.14 49.28 49.72 / 38.79 45.02 45.31 47.32
synthetic AudioGen gpt: 46.04 48.13 49.62 49.33 / 43.96 44.66 46.24 46.89
synthetic AudioLDM2 simple: 38.81 41.34 42.60 42.98 / 36.11 38.58 38.97 39.27
synthetic AudioLDM2 gpt: 38.49 40.46 41.48 42.09 / 32.86 35.08 35.10 35.21
mixed AudioGen simple: 64.52 63.05 60.68 59.86 56.45 49.69 43.81 30.50 / \
62.34 61.04 58.93 56.98 55.49 51.82 47.90 39.85
mixed AudioGen gpt: 63.41 63.53 62.61 61.27 57.95 54.46 49.18 39.74 / \
62.39 61.57 59.94 59.58 56.34 53.92 51.31 44.92
mixed AudioLDM2 simple: 64.56 63.00 61.67 59.55 58.10 53.00 45.51 29.96 / \
60.22 59.62 58.23 57.13 53.69 50.47 46.58 35.69
mixed AudioLDM2 gpt: 64.34 63.38 63.46 61.87 59.85 58.05 51.05 36.91 / \
61.80 60.11 59.03 57.78 55.68 52.61 46.02 33.62
"""
_PUBLISHED_MODELS = ("sbcnn", "crnn")


def published():
    """Accuracies that the paper prints for UrbanSound8K (10 folds, mean of 5 runs).

    Returns
    -------
    pandas.DataFrame
        `arm, ratio, model, backend, prompt_family, accuracy` (0 to 1), as in the table of
        :func:`summarise`, and `half_width`, the margin (95 %), which the tables used here give for
        real clips only.

    Notes
    -----
    Source: Ronchini, Comanducci and Antonacci, arXiv 2403.17864. They were measured with the
    released code, see the top of this module.

    Examples
    --------
    >>> published().query("arm == 'real'").accuracy.tolist()
    [0.6468, 0.627]
    """
    rows = [("real", 0.0, "sbcnn", "", "", 0.6468, 0.0082)]
    rows += [("real", 0.0, "crnn", "", "", 0.6270, 0.0065)]
    for line in _PUBLISHED.strip().splitlines():
        about, values = line.split(":")
        arm, backend, family = about.split()
        for model, series in zip(_PUBLISHED_MODELS, values.split("/"), strict=True):
            for amount, value in enumerate(series.split(), start=1):
                accuracy = round(float(value) / 100, 4)
                rows.append((arm, float(amount), model, backend, family, accuracy, np.nan))
    columns = ["arm", "ratio", "model", "backend", "prompt_family", "accuracy", "half_width"]
    return pd.DataFrame(rows, columns=columns)
