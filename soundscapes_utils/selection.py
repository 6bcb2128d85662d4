"""Selection among generated clips: the best of several, filters with their control, and a probe.

Everything works on plain arrays (embeddings, labels, scores), whoever made them. Three rules hold:
a filter keeps a stated number of clips per class, next to a random choice of the same number; a
judge learns from real recordings of training folds; what is selected is selected on validation folds,
as in notebook A2. A *criterion* is one value per generated clip, more is better; a *filter* is a mask of
those to keep.
"""

import hashlib

import numpy as np
import pandas as pd

from . import stats

# --- criteria: one number per clip, more is better ------------------------------------------------


def text_embedder(name="mini-clap", path=""):
    """Open the text tower of an audio embedding: texts to float32 [texts, dim] of unit length.

    `name` and `path` are as for `embeddings.get_embedding`. A model that generated under the same
    CLAP's condition is flattered by it.
    """
    from . import ldm

    public = {"mini-clap": "builtin", "laion-clap": ldm.HUB_CLAP}
    if name not in public:
        raise ValueError(f"{name} has no text tower here: choose one of {', '.join(public)}")
    clap = ldm.load_clap(str(path or public[name]))
    return lambda texts: ldm.embed_text(clap, texts).numpy()


def clap_scores(audio, labels, text, classes, prompts=None):
    """Score clips by text and audio embeddings of one CLAP.

    `audio` [n, d] are the clips, `labels` their classes; `text` [m, d] are texts that name `classes`, at
    least two and all of `labels` (several of one class are averaged: Radford et al., CLIP, arXiv
    2103.00020, section 3.1.4); `prompts` [n, d] are the clips' own. Returns ``clap_score``, the cosine
    to its prompt (to its class without `prompts`); ``clap_margin``, the cosine to its class less that to
    the best other class; ``clap_predicted``, the class of the highest cosine.
    """
    audio, text = _unit(audio, "audio"), _unit(text, "text")
    labels, classes = _names(labels, len(audio)), _names(classes, len(text))
    names = list(dict.fromkeys(classes))
    if (unknown := sorted(set(labels) - set(names))) or len(names) < 2:
        raise ValueError(
            f"texts of at least two classes and of every label are needed; they name "
            f"{', '.join(names)}, not {', '.join(unknown) or 'a second one'}"
        )
    centres = _unit([text[classes == name].mean(axis=0) for name in names], "text")
    cosines = audio @ centres.T
    meant = labels[:, None] == np.array(names, dtype=object)
    to_class, to_others = cosines[meant], np.where(meant, -np.inf, cosines).max(axis=1)
    table = pd.DataFrame({"clap_score": to_class, "clap_margin": to_class - to_others})
    if prompts is not None:
        table["clap_score"] = (audio * _unit(prompts, "prompts")).sum(axis=1)
    return table.assign(clap_predicted=[names[i] for i in cosines.argmax(axis=1)])


def class_probability(train, generated, labels, seed=0):
    """Ask a judge that learned from real recordings how likely each clip is what it should be.

    `train` are embeddings [n, d] and labels of *real* recordings of *training* folds, `generated`
    [m, d] and `labels` those of the clips. Returns ``class_probability`` of the clip's own label, 0
    to 1, and ``predicted``, the most probable one.
    """
    x, generated = stats.real_rows(train[0], "train"), stats.real_rows(generated, "generated")
    y, labels = _names(train[1], len(x)), _names(labels, len(generated))
    if unknown := sorted(set(labels) - set(y)):
        raise ValueError(f"no real recording of {', '.join(unknown)} to learn from")
    judge = stats.linear_probe(seed).fit(x, y)
    chances = judge.predict_proba(generated)
    own = np.searchsorted(judge.classes_, labels)
    table = pd.DataFrame({"class_probability": chances[np.arange(len(own)), own]})
    return table.assign(predicted=judge.classes_[chances.argmax(axis=1)].astype(object))


def joint_rank(labels, *criteria):
    """Join criteria of different scales by the product of their ranks within each class.

    One over the geometric mean of the ranks, ties sharing their mean: 1 for the clip that is first
    by every criterion (rank product of Breitling et al., FEBS Letters 573, 2004).
    """
    values = pd.DataFrame([_values(criterion) for criterion in criteria]).T
    ranks = values.groupby(_names(labels, len(values))).rank(ascending=False)
    return np.exp(-np.log(ranks.to_numpy()).mean(axis=1))


def summarise(scores, embeddings):
    """Put what is known about a set of clips into one row.

    `scores` has ``label`` and the columns of `clap_scores` and `class_probability`, `embeddings`
    [clips, d] are of the same clips. Returns ``n``; ``judge_agrees``, the share of clips that the judge
    calls by their label, with its 95 % Wilson interval ``ci_low, ci_high``; the means ``clap_score`` and
    ``clap_margin``; ``spread``, the mean Euclidean distance of two clips of one class.
    """
    from scipy.spatial.distance import pdist
    from scipy.stats import binomtest

    x = stats.real_rows(embeddings, "embeddings")
    labels = _names(scores["label"], len(x))
    right = (scores["predicted"].astype(str) == labels).to_numpy()
    # a bootstrap of ten clips that are all right would claim certainty
    low, high = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    row = {"n": len(x), "judge_agrees": float(right.mean()), "ci_low": low, "ci_high": high}
    row |= {name: float(scores[name].mean()) for name in ("clap_score", "clap_margin")}
    distances = np.concatenate([pdist(x[labels == label]) for label in sorted(set(labels))])
    return row | {"spread": float(distances.mean()) if len(distances) else float("nan")}


# --- filters: which clips to keep, always a stated number per class -------------------------------


def keep_best(labels, values, n):
    """Mask of the `n` clips per class (a number, or a dictionary) of highest value."""
    values = _values(values)
    return _by_class(labels, n, lambda _, own: own[np.argsort(-values[own], kind="stable")])


def keep_random(labels, n, seed=0):
    """Mask of `n` clips per class at random, each class for itself: the control of every filter."""

    def shuffled(label, own):
        key = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little")
        return np.random.default_rng([seed, key]).permutation(own)

    return _by_class(labels, n, shuffled)


def _by_class(labels, n, order):
    """Mask of the first clips of each class, in the order of `order(label, rows)`."""
    labels = _names(labels, len(labels))
    kept = np.zeros(len(labels), dtype=bool)
    for label in sorted(set(labels)):
        own = np.flatnonzero(labels == label)
        wanted = n.get(label, 0) if isinstance(n, dict) else n
        if not 0 <= wanted <= len(own):
            raise ValueError(f"{wanted} clips of {label} are to be kept, there are {len(own)}")
        kept[order(label, own)[:wanted]] = True
    return kept


def counts_per_class(labels, share):
    """The number of clips that a share (above 0, at most 1) is of each class; at least one."""
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}: it must be above 0 and at most 1")
    counts = pd.Series(list(labels)).value_counts().sort_index()
    return {label: max(1, int(number * share)) for label, number in counts.items()}


# --- real or synthetic? ---------------------------------------------------------------------------


def two_sample_auc(
    real, synthetic, real_sources, synthetic_sources, *, folds=5, floors=10, repeats=500, seed=0
):
    """Probe how far a set is from real: can a linear classifier tell the two apart?

    Cross-validated logistic regression on embeddings [n, d] and [m, d], all of one source in one fold;
    the floor asks the same of two disjoint halves of the real sources, `floors` times. A classifier
    two-sample test (Lopez-Paz and Oquab, ICLR 2017); areas are averages over folds (Forman and Scholz,
    SIGKDD Explorations 12, 2010). Give both sets the same classes, length and level, or the probe
    answers by these.

    Two rows: ``comparison`` ("synthetic", "real against real"), ``auc`` (0.5 cannot be told apart, 1
    always), ``ci_low, ci_high`` (95 %: over `repeats` resamples of the sources; for the floor over
    its pairs), ``n_reference, n_candidate, sources``.
    """
    x, y = stats.real_rows(real, "real"), stats.real_rows(synthetic, "synthetic")
    a, b = _names(real_sources, len(x)), _names(synthetic_sources, len(y))
    if min(len(set(a)) // 2, len(set(b))) < folds:
        raise ValueError(
            f"{len(set(a))} real and {len(set(b))} synthetic sources are too few for {folds} folds "
            "of both and of half the real ones"
        )
    parts = _probed(x, y, a, b, folds, seed)
    floor = []
    for number in range(seed, seed + floors):
        names = np.random.default_rng([number, 2]).permutation(sorted(set(a)))
        first = np.isin(a, names[: len(names) // 2])
        floor.append(_mean_auc(_probed(x[first], x[~first], a[first], a[~first], folds, number)))
    half, kinds = len(x) // 2, ["synthetic", "real against real"]
    table = pd.DataFrame({"comparison": kinds, "auc": [_mean_auc(parts), float(np.mean(floor))]})
    ends = [_auc_interval(parts, repeats, seed), np.quantile(floor, [0.025, 0.975])]
    table[["ci_low", "ci_high"]] = ends
    sizes = {"n_reference": [len(x), half], "n_candidate": [len(y), len(x) - half]}
    return table.assign(**sizes, sources=[len(set(a) | set(b)), len(set(a))])


def _probed(x, y, a, b, folds, seed):
    """Scores and sources of the real clips of each fold, and of its synthetic clips."""
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

    points, sources = np.concatenate([x, y]), np.concatenate([a, b])
    synthetic = np.arange(len(points)) >= len(x)
    # few clips in many dimensions: without a firm penalty every probe says 1
    firm = {"logisticregression__C": 0.1, "logisticregression__class_weight": "balanced"}
    probe = stats.linear_probe(seed).set_params(**firm)
    cut = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    splits = list(cut.split(points, synthetic, sources))
    scores = cross_val_predict(probe, points, synthetic, cv=splits, method="decision_function")
    parts = [
        [(scores[test][side], sources[test][side]) for side in (~synthetic[test], synthetic[test])]
        for _, test in splits
        if len(set(synthetic[test])) == 2
    ]
    if not parts:
        raise ValueError("no fold holds both kinds: sources are shared too widely")
    return parts


def _mean_auc(parts):
    # pairs in the right order, ties half: a resampling does this thousands of times, and
    # scikit-learn's roc_auc_score takes 3.6 ms for 60 clips, this 0.02
    areas = [(np.sign(fake[:, None] - real).mean() + 1) / 2 for (real, _), (fake, _) in parts]
    return float(np.mean(areas))


def _auc_interval(parts, repeats, seed):
    rng = np.random.default_rng([seed, 1])

    def grouped(scores, sources):
        return [scores[sources == source] for source in dict.fromkeys(sources)]

    def resampled(groups):
        drawn = rng.integers(len(groups), size=len(groups))
        return np.concatenate([groups[i] for i in drawn]), None

    groups = [[grouped(*side) for side in sides] for sides in parts]
    areas = [_mean_auc([map(resampled, sides) for sides in groups]) for _ in range(repeats)]
    return np.quantile(areas, [0.025, 0.975])


# --- the best of several --------------------------------------------------------------------------


def plan_candidates(plan, n):
    """Plan `n` candidates of each clip; ``candidate_of`` holds the ``clip_id`` that each stands for.

    The first is the clip itself, and more candidates only add to fewer.
    """
    from . import generation

    if n < 1:
        raise ValueError(f"{n} candidates per clip: give at least 1")
    plan = plan.assign(candidate_of=plan["clip_id"])
    rows = []
    for row in plan.to_dict("records"):
        rows.append(row)
        for name in [f"{row['clip_id']}-c{number}" for number in range(2, n + 1)]:
            identity = ("candidate", row["label"], row["prompt"], name, int(row["seed"]))
            rows.append(row | {"clip_id": name, "seed": generation.clip_seed(*identity)})
    return pd.DataFrame(rows, columns=plan.columns)


def best_candidates(candidates, generated, scores):
    """Keep of each clip's candidates the one with the highest score, the first of equals.

    As AudioLDM's own sampler does (Liu et al., arXiv 2301.12503), but each candidate has a seed of
    its own and can be made again alone. `generated` is what was made of `candidates` (from
    `plan_candidates`), `scores` has one number per row of it. The rows come back in the plan's
    order, under the clip's own ``clip_id``; ``score`` is that of the choice, and stays where there
    was nothing to choose from.
    """
    parents = candidates.set_index("clip_id")["candidate_of"]
    if len(unknown := generated.loc[~generated["clip_id"].isin(parents.index), "clip_id"]):
        raise ValueError(f"clip {unknown.iloc[0]} is not a candidate of this plan")
    table = generated.assign(clip_id=generated["clip_id"].map(parents), by=_values(scores))
    rivals = table["clip_id"].map(parents.value_counts()) > 1
    table["score"] = table["by"].where(rivals, table["score"])
    best = table.sort_values("by", ascending=False, kind="stable").drop_duplicates("clip_id")
    wanted = [name for name in dict.fromkeys(parents) if name in set(best["clip_id"])]
    return best.set_index("clip_id").loc[wanted].reset_index()[list(generated.columns)]


def best_by_clap(candidates, generated, clap="laion-clap", path=""):
    """`best_candidates` by the cosine of clip and prompt; `clap` and `path` as for `text_embedder`."""
    from . import embeddings

    audio = embeddings.get_embedding(clap, path).embed(generated["path"], silence="allow")
    text = text_embedder(clap, path)(list(generated["prompt"]))
    cosines = (_unit(audio, "audio") * _unit(text, "text")).sum(axis=1)
    return best_candidates(candidates, generated, cosines)


# --- checks at the door ---------------------------------------------------------------------------


def _unit(x, name):
    x = stats.real_rows(x, name)
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError(f"row {lengths.argmin()} of {name} is zero: it has no direction")
    return x / lengths


def _names(names, n):
    names = np.array([str(name) for name in names], dtype=object)
    if len(names) != n:
        raise ValueError(f"{n} rows, but {len(names)} names come with them: one per row")
    return names


def _values(values):
    return stats.real_rows(np.reshape(values, (-1, 1)), "values")[:, 0]
