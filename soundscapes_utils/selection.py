"""Choosing among generated clips: the best of several, filters with their control, and a probe.

Everything works on plain arrays (embeddings, labels, scores), whoever made them. Three rules hold
throughout. A filter keeps a stated number of clips of each class, and stands beside a random choice
of as many. A judge learns from real recordings of training folds. What is chosen is chosen on
validation folds: :func:`choose_filter` refuses to see the test fold.
"""

import hashlib
from types import SimpleNamespace

import numpy as np
import pandas as pd

from . import stats

TEXT_TOWERS = ("mini-clap", "laion-clap")


def text_embedder(name="mini-clap", path=""):
    """Open the text tower that belongs to an audio embedding of `embeddings.get_embedding`.

    Parameters
    ----------
    name : {"mini-clap", "laion-clap"}
        As for `embeddings.get_embedding`.
    path : str or Path
        The same as there: an AudioLDM checkpoint (the built-in one by default), or a CLAP in
        transformers' format (``laion/clap-htsat-unfused`` by default).

    Returns
    -------
    callable
        From a list of texts to float32 [texts, dim] of unit length, to be compared by cosine with
        the rows of the audio embedding.

    Raises
    ------
    ValueError
        An embedding that has no text tower here.
    ldm.CheckpointError
        The weights cannot be opened.

    Notes
    -----
    Where a model generated under the same CLAP's condition, its scores flatter it: say so.

    Examples
    --------
    >>> text_embedder()(["a dog barking", "rain"]).shape
    (2, 128)
    """
    if name not in TEXT_TOWERS:
        raise ValueError(
            f"{name} has no text tower here: choose one of {', '.join(TEXT_TOWERS)}, or give "
            "your own function from texts to rows"
        )
    from . import embeddings, ldm

    if name == "mini-clap":
        source, parts = ldm.resolve(path or "builtin"), ("tokenizer", "text_encoder")
    else:
        source, parts = str(path or embeddings._LAION_HUB), ("", "")
    tower = _text_tower(source, *parts)
    return lambda texts: ldm.embed_text(tower, list(texts)).cpu().numpy()


def _text_tower(source, tokenizer, model):
    """What `ldm.embed_text` needs of a pipeline."""
    import torch
    from transformers import AutoTokenizer, ClapTextModelWithProjection

    from . import ldm

    try:
        with ldm.quiet():
            words = AutoTokenizer.from_pretrained(source, subfolder=tokenizer)
            tower = ClapTextModelWithProjection.from_pretrained(
                source, subfolder=model, dtype=torch.float32
            ).eval()
    except (OSError, ValueError, KeyError) as error:
        raise ldm.CheckpointError(
            f"{source}: no CLAP text tower can be opened there ({ldm._first_line(error)}). Give the "
            "folder or hub name of a whole checkpoint, while the hub can be reached."
        ) from error
    # a text tower pads to what its tokenizer names; tokenizers without a limit name 10³⁰
    limit = tower.config.max_position_embeddings - 2
    words.model_max_length = min(words.model_max_length, limit)
    return SimpleNamespace(tokenizer=words, text_encoder=tower, device=torch.device("cpu"))


# --- criteria: one number a clip, more is better --------------------------------------------------


def clap_scores(audio, labels, text, classes, prompts=None):
    """Score clips by text and audio embeddings of one CLAP.

    Parameters
    ----------
    audio : array_like, shape (n, d)
        Embeddings of the clips.
    labels : sequence of str, shape (n,)
        Class that each clip is meant to be.
    text : array_like, shape (m, d)
        Embeddings of texts that name the classes. Several of one class are averaged, as Radford et
        al. (CLIP, arXiv 2103.00020, section 3.1.4) do.
    classes : sequence of str, shape (m,)
        Which class each text names; at least two classes, and all of `labels` among them.
    prompts : array_like, shape (n, d), optional
        Embedding of each clip's own prompt.

    Returns
    -------
    pandas.DataFrame
        One row a clip: ``clap_score``, the cosine to its prompt (to its class without `prompts`);
        ``clap_margin``, the cosine to its class less that to the best other class, so that a clip
        which suits every text gains nothing; ``heard_as``, the class of the highest cosine.

    Raises
    ------
    ValueError
        Shapes that do not fit, rows that are zero or not finite, one class only, or a label that
        no text names.

    Examples
    --------
    >>> clap_scores([[1, 0], [0.6, 0.8]], ["dog", "dog"], [[1, 0], [0, 1]], ["dog", "rain"]).round(2)
       clap_score  clap_margin heard_as
    0         1.0          1.0      dog
    1         0.6         -0.2     rain
    """
    audio, text = _unit(audio, "audio"), _unit(text, "text")
    labels, classes = _names(labels, len(audio), "audio"), _names(classes, len(text), "text")
    names = list(dict.fromkeys(classes))
    unknown = sorted(set(labels) - set(names))
    if unknown or len(names) < 2:
        raise ValueError(
            f"texts of at least two classes and of every label are needed; they name "
            f"{', '.join(names)}, not {', '.join(unknown) or 'a second one'}"
        )
    if text.shape[1] != audio.shape[1]:
        raise ValueError(f"audio is {audio.shape[1]} wide, text {text.shape[1]}: take one CLAP")
    centres = _unit([text[classes == name].mean(axis=0) for name in names], "text")
    cosines = audio @ centres.T
    own = np.array([names.index(label) for label in labels])
    rows = np.arange(len(audio))
    meant = cosines[rows, own]
    others = cosines.copy()
    others[rows, own] = -np.inf
    score = meant if prompts is None else _cosines(audio, prompts)
    heard = np.array(names, dtype=object)[cosines.argmax(axis=1)]
    return pd.DataFrame(
        {"clap_score": score, "clap_margin": meant - others.max(axis=1), "heard_as": heard}
    )


def _cosines(audio, prompts):
    prompts = _unit(prompts, "prompts")
    if prompts.shape != audio.shape:
        raise ValueError(f"prompts have shape {prompts.shape}, audio {audio.shape}: one row a clip")
    return np.einsum("ij,ij->i", audio, prompts)


def agreement(train, made, labels, seed=0):
    """Ask a judge that learned from real recordings how likely each clip is what it should be.

    Parameters
    ----------
    train : tuple of (array_like [n, d], sequence of str [n])
        Embeddings and labels of *real* recordings of *training* folds: nothing that is generated,
        and no recording on which anything is chosen or tested later.
    made : array_like, shape (m, d)
        Embeddings of the generated clips.
    labels : sequence of str, shape (m,)
        What they should be; classes of `train`.
    seed : int
        Of the solver.

    Returns
    -------
    pandas.DataFrame
        One row a clip: ``agreement``, the judge's probability of the clip's own label, 0 to 1;
        ``judged_as``, the most probable label.

    Raises
    ------
    ValueError
        Shapes that do not fit, values that are not finite, or a label that the judge never heard.

    Notes
    -----
    The judge is that of :func:`soundscapes_utils.esc.class_consistency`: logistic regression on
    standardised features.

    Examples
    --------
    >>> train = [[0.0], [0.1], [1.0], [1.1]], ["dog", "dog", "rain", "rain"]
    >>> agreement(train, [[0.0], [2.0]], ["dog", "dog"])["judged_as"].tolist()
    ['dog', 'rain']
    """
    x, made = _rows(train[0], "train"), _rows(made, "made")
    y, labels = _names(train[1], len(x), "train"), _names(labels, len(made), "made")
    unheard = sorted(set(labels) - set(y))
    if unheard:
        raise ValueError(f"no real recording of {', '.join(unheard)} to learn from")
    judge = _classifier(seed).fit(x, y)
    chances = judge.predict_proba(made)
    own = np.searchsorted(judge.classes_, labels)
    return pd.DataFrame(
        {
            "agreement": chances[np.arange(len(made)), own],
            "judged_as": judge.classes_[chances.argmax(axis=1)].astype(object),
        }
    )


def _classifier(seed, **options):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = LogisticRegression(max_iter=2000, random_state=seed, **options)
    return make_pipeline(StandardScaler(), regression)


def joint_rank(labels, *criteria):
    """Join several criteria whose scales have nothing in common: by the product of their ranks.

    Parameters
    ----------
    labels : sequence of str, shape (n,)
        Clips are ranked among those of their class.
    *criteria : array_like, shape (n,)
        More is better; at least one.

    Returns
    -------
    np.ndarray, float64 [n]
        One over the geometric mean of the ranks: 1 for the clip that is first by every criterion.
        Ties share their mean rank.

    Raises
    ------
    ValueError
        No criterion, lengths that differ, values that are not finite.

    Notes
    -----
    The rank product of Breitling et al., FEBS Letters 573 (2004).

    Examples
    --------
    >>> joint_rank(["dog"] * 3, [3, 2, 1], [0.9, 0.1, 0.2]).round(3).tolist()
    [1.0, 0.408, 0.408]
    """
    from scipy.stats import rankdata

    if not criteria:
        raise ValueError("joint_rank needs at least one criterion")
    values = np.array([_values(one, len(labels)) for one in criteria])
    labels = _names(labels, values.shape[1], "criteria")
    ranks = np.empty_like(values)
    for label in set(labels):
        own = labels == label
        ranks[:, own] = rankdata(-values[:, own], axis=1)
    return np.exp(-np.log(ranks).mean(axis=0))


def summarise(scores, embeddings):
    """Put what is known about a set of clips into one row, to compare sets made in two ways.

    Parameters
    ----------
    scores : pandas.DataFrame
        One row a clip: ``label``, and the columns of `clap_scores` and `agreement`.
    embeddings : array_like, shape (clips, d)
        Of the same clips, for their spread.

    Returns
    -------
    dict
        ``n``; ``judge_agrees``, the share of clips that the judge calls by their label, with its
        95 % Wilson interval ``ci_low, ci_high``; the means ``clap_score`` and ``clap_margin``;
        ``spread``, the mean Euclidean distance of two clips of one class (NaN for one clip each).

    Raises
    ------
    ValueError
        Embeddings of another number of clips, or not finite.

    Examples
    --------
    >>> scores = pd.DataFrame({"label": ["dog", "dog"], "judged_as": ["dog", "rain"],
    ...                        "clap_score": [0.5, 0.1], "clap_margin": [0.2, -0.2]})
    >>> found = summarise(scores, [[0.0], [3.0]])
    >>> found["n"], found["judge_agrees"], round(found["clap_score"], 2), found["spread"]
    (2, 0.5, 0.3, 3.0)
    """
    from scipy.stats import binomtest

    x = _rows(embeddings, "embeddings")
    labels = _names(scores["label"], len(x), "embeddings")
    right = (scores["judged_as"].astype(str) == labels).to_numpy()
    # a bootstrap of ten clips that are all right would claim certainty
    low, high = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    return {
        "n": len(x),
        "judge_agrees": float(right.mean()),
        "ci_low": low,
        "ci_high": high,
        "clap_score": float(scores["clap_score"].mean()),
        "clap_margin": float(scores["clap_margin"].mean()),
        "spread": _spread(labels, x),
    }


# --- filters: which clips to keep, always a stated number of each class ---------------------------


def keep_best(labels, values, n):
    """Keep the clips of each class that a criterion likes best.

    Parameters
    ----------
    labels : sequence of str, shape (clips,)
        Class of each clip.
    values : array_like, shape (clips,)
        More is better; of two equal clips the earlier one is kept.
    n : int or mapping of str to int
        How many of each class.

    Returns
    -------
    np.ndarray, bool [clips]
        True for the clips kept.

    Raises
    ------
    ValueError
        Values that are not finite, or a class with fewer clips than are to be kept.

    Examples
    --------
    >>> keep_best(["dog", "dog", "rain"], [0.1, 0.7, 0.2], 1).tolist()
    [False, True, True]
    """
    values = _values(values, len(labels))
    return _by_class(labels, n, lambda _, own, k: own[np.argsort(-values[own], kind="stable")[:k]])


def keep_random(labels, n, seed=0):
    """Keep clips of each class at random: the control beside every other filter.

    Parameters
    ----------
    labels : sequence of str, shape (clips,)
        Class of each clip.
    n : int or mapping of str to int
        How many of each class.
    seed : int
        Of the choice; another class in the set changes nothing for the others.

    Returns
    -------
    np.ndarray, bool [clips]
        True for the clips kept.

    Raises
    ------
    ValueError
        A class with fewer clips than are to be kept.

    Examples
    --------
    >>> int(keep_random(["dog"] * 9 + ["rain"] * 9, 4).sum())
    8
    """

    def draw(label, own, k):
        key = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little")
        return np.random.default_rng([seed, key]).permutation(own)[:k]

    return _by_class(labels, n, draw)


def keep_diverse(labels, embeddings, n):
    """Keep clips of each class that lie as far apart as can be: greedy k-centre.

    The first is the one nearest to the mean of its class; each next one is the farthest from all
    that are kept.

    Parameters
    ----------
    labels : sequence of str, shape (clips,)
        Class of each clip.
    embeddings : array_like, shape (clips, d)
        Distances are Euclidean: bring columns of different units to one scale first.
    n : int or mapping of str to int
        How many of each class.

    Returns
    -------
    np.ndarray, bool [clips]
        True for the clips kept.

    Raises
    ------
    ValueError
        Values that are not finite, or a class with fewer clips than are to be kept.

    Notes
    -----
    Gonzalez, Theoretical Computer Science 38 (1985): the largest distance from any clip to the
    nearest one kept (`covering_radius`) is at most twice the smallest possible. Outliers are the
    first that it takes: a filter for variety, not for quality.

    Examples
    --------
    >>> keep_diverse(["dog"] * 4, [[0.0], [0.1], [1.0], [0.45]], 2).tolist()
    [False, False, True, True]
    """
    x = _rows(embeddings, "embeddings")
    _names(labels, len(x), "embeddings")

    def far_apart(_, own, k):
        points = x[own]
        chosen = [int(((points - points.mean(axis=0)) ** 2).sum(axis=1).argmin())]
        nearest = np.full(len(own), np.inf)
        while len(chosen) < k:
            nearest = np.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
            # a clip that equals a kept one must not be taken twice
            nearest[chosen] = -1.0
            chosen.append(int(nearest.argmax()))
        return own[chosen[:k]]

    return _by_class(labels, n, far_apart)


def covering_radius(labels, embeddings, kept):
    """How well the clips kept stand for the others of their class.

    Parameters
    ----------
    labels : sequence of str, shape (clips,)
        Class of each clip.
    embeddings : array_like, shape (clips, d)
        As for `keep_diverse`.
    kept : array_like of bool, shape (clips,)
        At least one clip of each class.

    Returns
    -------
    float
        Largest Euclidean distance from any clip to the nearest kept one of its class.

    Raises
    ------
    ValueError
        Values that are not finite, or a class of which nothing was kept.

    Examples
    --------
    >>> covering_radius(["dog"] * 3, [[0.0], [1.0], [3.0]], [True, True, False])
    2.0
    """
    x = _rows(embeddings, "embeddings")
    labels, kept = _names(labels, len(x), "embeddings"), _mask(kept, len(x))
    radius = 0.0
    for label in set(labels):
        own, of_them = x[labels == label], x[(labels == label) & kept]
        if not len(of_them):
            raise ValueError(f"no clip of {label} was kept")
        nearest = np.linalg.norm(own[:, None] - of_them[None], axis=2).min(axis=1)
        radius = max(radius, float(nearest.max()))
    return radius


def make_filters(labels, criteria, n, embeddings=None, seed=0):
    """Apply every filter at one retained number, with the random drop among them.

    Parameters
    ----------
    labels : sequence of str, shape (clips,)
        Class of each clip.
    criteria : mapping of str to array_like, shape (clips,)
        Such as the columns of `clap_scores` and `agreement`; more is better.
    n : int or mapping of str to int
        How many of each class every filter keeps.
    embeddings : array_like, shape (clips, d), optional
        Adds the filter ``"diverse"``.
    seed : int
        Of the random drop.

    Returns
    -------
    dict of str to np.ndarray, bool [clips]
        ``"random"`` first; then each criterion by its name; ``"joint"``, all criteria by
        `joint_rank`, where there are several; ``"diverse"``.

    Raises
    ------
    ValueError
        As the filters themselves.

    Examples
    --------
    >>> list(make_filters(["dog"] * 4, {"score": [1, 2, 3, 4], "margin": [0, 1, 0, 1]}, 2))
    ['random', 'score', 'margin', 'joint']
    """
    kept = {"random": keep_random(labels, n, seed)}
    kept |= {name: keep_best(labels, values, n) for name, values in criteria.items()}
    if len(criteria) > 1:
        kept["joint"] = keep_best(labels, joint_rank(labels, *criteria.values()), n)
    if embeddings is not None:
        kept["diverse"] = keep_diverse(labels, embeddings, n)
    return kept


def share_of_each(labels, share):
    """Turn a share into the number of clips that a filter keeps of each class.

    Parameters
    ----------
    labels : sequence of str, shape (clips,)
        Class of each clip.
    share : float
        Above 0, at most 1.

    Returns
    -------
    dict of str to int
        Rounded down, but at least one of each class.

    Raises
    ------
    ValueError
        A share that is none.

    Examples
    --------
    >>> share_of_each(["dog"] * 5 + ["rain"], 0.5)
    {'dog': 2, 'rain': 1}
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}: it must be above 0 and at most 1")
    counts = pd.Series(_names(labels, len(labels), "labels")).value_counts().sort_index()
    return {label: max(1, int(number * share)) for label, number in counts.items()}


def filters_at_shares(labels, criteria, shares, seed=0):
    """Apply the filters by criteria at several thresholds, stated as shares of each class.

    Parameters
    ----------
    labels, criteria, seed
        As for `make_filters`.
    shares : sequence of float
        See `share_of_each`.

    Returns
    -------
    dict of str to np.ndarray, bool [clips]
        As from `make_filters` for each share, under names such as ``"joint 25%"``.

    Examples
    --------
    >>> list(filters_at_shares(["dog"] * 4, {"score": [1, 2, 3, 4]}, [0.25, 0.75]))
    ['random 25%', 'score 25%', 'random 75%', 'score 75%']
    """
    return {
        f"{name} {share:.0%}": mask
        for share in shares
        for name, mask in make_filters(
            labels, criteria, share_of_each(labels, share), seed=seed
        ).items()
    }


def offer_filters(filters, made, labels, criteria, judged="agreement", seed=0):
    """Make filters ready for `choose_filter`: a judge must not have heard the fold that validates.

    Parameters
    ----------
    filters : mapping of str to array_like of bool, shape (clips,)
        As from `make_filters` and `filters_at_shares`, under their names.
    made : array_like, shape (clips, d)
        Embeddings of the clips, in which the judge listens.
    labels : sequence of str, shape (clips,)
        Class of each clip.
    criteria : mapping of str to array_like, shape (clips,)
        As given to `make_filters`.
    judged : str
        Which criterion is a judge's `agreement`.
    seed : int
        Of the judge.

    Returns
    -------
    dict
        The filters without the random drops (`choose_filter` draws its own). Those by `judged`, and
        ``"joint"`` if it is among the criteria, are functions that train their judge anew; what
        they keep is as much of each class as the mask kept.

    Examples
    --------
    >>> masks = make_filters(["dog"] * 2, {"score": [1, 2], "agreement": [0.1, 0.9]}, 1)
    >>> offered = offer_filters(masks, [[0.0], [1.0]], ["dog"] * 2, {"score": [1, 2]})
    >>> [name for name, given in offered.items() if callable(given)]
    ['agreement', 'joint']
    """
    labels = _names(labels, len(labels), "labels")
    others = [values for name, values in criteria.items() if name != judged]

    def judging(mask, *beside):
        counts = pd.Series(labels[mask]).value_counts().to_dict()

        def keep(x, y):
            likes = agreement((x, y), made, labels, seed)["agreement"]
            return keep_best(labels, joint_rank(labels, likes, *beside), counts)

        return keep

    offered = {}
    for name, mask in filters.items():
        kind, mask = name.split()[0], _mask(mask, len(labels))
        if kind in (judged, "joint"):
            offered[name] = judging(mask, *(others if kind == "joint" else ()))
        elif kind != "random":
            offered[name] = mask
    return offered


def describe_filters(labels, filters, criteria, embeddings=None):
    """What is left after each filter, and what the filters have in common.

    Parameters
    ----------
    labels : sequence of str, shape (clips,)
        Class of each clip.
    filters : mapping of str to array_like of bool, shape (clips,)
        As from `make_filters`.
    criteria : mapping of str to array_like, shape (clips,)
        Averaged over the clips kept. A filter is always good by its own criterion.
    embeddings : array_like, shape (clips, d), optional
        For the spread.

    Returns
    -------
    pandas.DataFrame
        First a row ``"all"``, then one a filter: ``filter, n``, ``per_class`` (fewest clips of a
        class), the mean of each criterion, and with `embeddings` ``spread``: mean Euclidean
        distance of two kept clips of a class.

    Examples
    --------
    >>> describe_filters(["dog"] * 3, {"best": [True, False, False]}, {"score": [3, 2, 1]})
      filter  n  per_class  score
    0    all  3          3    2.0
    1   best  1          1    3.0
    """
    labels = _names(labels, len(labels), "labels")
    everything = {"all": np.ones(len(labels), dtype=bool)}
    rows = []
    for name, kept in (everything | dict(filters)).items():
        kept = _mask(kept, len(labels))
        counts = [int((kept & (labels == label)).sum()) for label in sorted(set(labels))]
        row = {"filter": name, "n": int(kept.sum()), "per_class": min(counts)}
        row |= {key: float(np.mean(np.asarray(v)[kept])) for key, v in criteria.items()}
        if embeddings is not None:
            row["spread"] = _spread(labels[kept], _rows(embeddings, "embeddings")[kept])
        rows.append(row)
    return pd.DataFrame(rows)


def _spread(labels, x):
    from scipy.spatial.distance import pdist

    distances = [pdist(x[labels == label]) for label in sorted(set(labels))]
    distances = np.concatenate(distances) if distances else np.empty(0)
    return float(distances.mean()) if len(distances) else float("nan")


def _by_class(labels, n, choose):
    """Mask of what `choose(label, rows, number)` takes of every class."""
    labels = _names(labels, len(labels), "labels")
    kept = np.zeros(len(labels), dtype=bool)
    for label, own in pd.Series(labels).groupby(labels).groups.items():
        k = n.get(label, 0) if hasattr(n, "get") else n
        if not 0 <= k <= len(own):
            raise ValueError(
                f"{k} clips of {label} are to be kept, there are {len(own)}: generate more, or "
                "keep fewer"
            )
        kept[choose(label, own.to_numpy(), k)] = True
    return kept


# --- selection a filter, on validation folds --------------------------------------------------------


def choose_filter(
    real, folds, made, filters, *, test_fold, sources=None, with_real=False, draws=199, seed=0
):
    """Find the filter that serves a classifier best, without ever looking at the test fold.

    Each fold of the real training recordings validates in turn: a classifier learns from the clips
    that a filter keeps, and is examined on the real recordings of that fold. Beside it stand
    classifiers that learned from a random drop of equal number, class by class.

    Parameters
    ----------
    real : tuple of (array_like [n, d], sequence of str [n])
        Embeddings and labels of the real recordings, those of the test fold left out.
    folds : sequence of int, shape (n,)
        Their folds; at least two.
    made : tuple of (array_like [m, d], sequence of str [m])
        Embeddings and labels of all generated clips.
    filters : mapping of str to (array_like of bool [m], or callable)
        Masks of what is kept. A filter that itself learns from real recordings is given as a
        function of their embeddings and labels that returns a mask: it then never sees the fold
        that validates. Thresholds are compared as filters of different names.
    test_fold : int
        The fold that must not occur.
    sources : sequence, shape (n,), optional
        Original recording of each real one: excerpts of one source count once.
    with_real : bool
        Whether the classifiers also learn from the real recordings of the other folds.
    draws : int
        Random drops behind each control.
    seed : int
        Of the drops and the solver.

    Returns
    -------
    pandas.DataFrame
        One row a filter, in the order given: ``filter, n_kept`` (mean over the folds),
        ``n_validation`` (sources examined), ``accuracy, ci_low, ci_high`` (95 %, over sources),
        ``control`` (mean accuracy after the random drops), ``control_low, control_high`` (their
        middle 95 %), ``difference``; ``p``, the share of random drops that did as well or better
        (the filter counted among them: a randomisation test, one-sided, never below
        1 / (draws + 1)); ``p_holm``, the same with regard to how many filters were tried;
        ``chosen``, true for the best accuracy, the first of equals. A filter that drops nothing has
        no control: its ``p`` is NaN.

    Raises
    ------
    ValueError
        The test fold is among `folds`, a single fold, a filter that keeps fewer than two classes,
        or shapes that do not fit.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> labels = np.array(["dog", "rain"] * 20)
    >>> x = (labels == "dog")[:, None] * 2.0 + rng.normal(size=(40, 2)) * 0.3
    >>> wrong = np.arange(40) < 16
    >>> spoilt = np.where(wrong[:, None], 2.0 - x, x)
    >>> table = choose_filter((x, labels), np.arange(40) // 20, (spoilt, labels),
    ...                       {"right": ~wrong}, test_fold=5, draws=9)
    >>> bool(table.difference[0] > 0), float(table.n_kept[0])
    (True, 24.0)
    """
    x, made_x = _rows(real[0], "real"), _rows(made[0], "made")
    y, made_y = _names(real[1], len(x), "real"), _names(made[1], len(made_x), "made")
    folds = np.asarray(folds)
    _check_folds(folds, len(x), test_fold)
    groups = np.arange(len(x)) if sources is None else np.asarray(sources)

    def examined(masks):
        """Per source: was it recognised by what the filter of the other folds let through?"""
        right, learned = np.zeros(len(x)), {}
        for fold, mask in zip(np.unique(folds), masks, strict=True):
            others, own = folds != fold, folds == fold
            parts = [(made_x[mask], made_y[mask])]
            parts += [(x[others], y[others])] if with_real else []
            # a filter that is the same for all folds trains one classifier, if it trains alone
            key = fold if with_real else mask.tobytes()
            if key not in learned:
                both = [np.concatenate(part) for part in zip(*parts, strict=True)]
                learned[key] = _classifier(seed).fit(*both)
            right[own] = learned[key].predict(x[own]) == y[own]
        return pd.Series(right).groupby(groups).mean().to_numpy()

    def dropped(masks, draw):
        counts = [pd.Series(made_y[mask]).value_counts().to_dict() for mask in masks]
        return [keep_random(made_y, count, seed + draw) for count in counts]

    rows, controls = [], {}
    for name, given in filters.items():
        masks = [_kept(name, given, x, y, folds != fold, made_y) for fold in np.unique(folds)]
        right, drops = examined(masks), np.empty(0)
        if not all(mask.all() for mask in masks):
            counts = str([sorted(pd.Series(made_y[mask]).value_counts().items()) for mask in masks])
            if counts not in controls:
                found = [examined(dropped(masks, draw)).mean() for draw in range(draws)]
                controls[counts] = np.array(found)
            drops = controls[counts]
        kept = float(np.mean([mask.sum() for mask in masks]))
        rows.append({"filter": name, "n_kept": kept} | _against(right, drops, seed))
    table = pd.DataFrame(rows)
    tested = table["p"].notna()
    table.loc[tested, "p_holm"] = stats.holm(table.loc[tested, "p"]) if tested.any() else np.nan
    return table.assign(chosen=table.index == table["accuracy"].idxmax())


def _kept(name, given, x, y, training, made_y):
    mask = _mask(given(x[training], y[training]) if callable(given) else given, len(made_y))
    if len(set(made_y[mask])) < 2:
        raise ValueError(f"filter {name} keeps fewer than two classes: loosen it")
    return mask


def _check_folds(folds, n, test_fold):
    if len(folds) != n:
        raise ValueError(f"{n} real recordings, {len(folds)} folds: give one of each")
    if (folds == test_fold).any():
        raise ValueError(
            f"{(folds == test_fold).sum()} recordings of test fold {test_fold} are among those "
            "that a filter is chosen on: leave them out, or the test is none"
        )
    if len(np.unique(folds)) < 2:
        raise ValueError("at least two folds are needed, so that each can validate the others")


def _against(right, drops, seed):
    low, high = stats.bootstrap_ci(right, seed=seed)
    accuracy = float(right.mean())
    row = {"n_validation": len(right), "accuracy": accuracy, "ci_low": low, "ci_high": high}
    names = ("control", "control_low", "control_high", "difference", "p")
    if not len(drops):
        return row | dict.fromkeys(names, np.nan)
    ends = np.quantile(drops, [0.025, 0.975])
    # equal shares are summed in another order: what differs in the last digit is a tie
    as_well = int((drops >= accuracy - 1e-12).sum())
    found = (drops.mean(), *ends, accuracy - drops.mean(), (1 + as_well) / (1 + len(drops)))
    return row | dict(zip(names, map(float, found), strict=True))


# --- real or synthetic? -----------------------------------------------------------------------------


def real_or_synthetic(
    real, synthetic, real_sources, synthetic_sources, *, folds=5, floors=10, repeats=500, seed=0
):
    """Probe how far a set is from real: can a linear classifier tell the two apart?

    Cross-validated logistic regression on embeddings. All that comes from one source is in one
    fold, so that nothing is told apart by its twin. The floor asks the same of two disjoint halves
    of the real sources: what is found there is found between real and real.

    Parameters
    ----------
    real, synthetic : array_like, shapes (n, d) and (m, d)
        Embeddings. Give both the same classes in the same shares, the same length and level, or the
        probe answers by these.
    real_sources, synthetic_sources : sequence, shapes (n,) and (m,)
        Original recording of each real clip; for each synthetic one its own name, or the source
        that it was derived from (then both stay in one fold).
    folds : int
        Of the cross-validation.
    floors : int
        Pairs of halves behind the floor.
    repeats : int
        Resamples behind each interval.
    seed : int
        Of folds, halves and resamples.

    Returns
    -------
    pandas.DataFrame
        Two rows: ``comparison`` ("synthetic", "real against real"), ``auc`` (mean over the folds of
        the area under the ROC curve: 0.5 cannot be told apart, 1 always), ``ci_low, ci_high`` (95 %:
        over sources for the first; the spread over the pairs of halves for the second),
        ``n_reference, n_candidate`` (clips on either side; for the floor, of a half), ``sources``.

    Raises
    ------
    ValueError
        Shapes that do not fit, values that are not finite, or too few sources for the folds.

    Notes
    -----
    A classifier two-sample test: Lopez-Paz and Oquab, ICLR 2017. An area is computed within each
    fold and averaged, since scores of different folds' classifiers have no common scale (Forman
    and Scholz, SIGKDD Explorations 12, 2010).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x, y = rng.normal(size=(60, 2)), rng.normal(4, 1, size=(60, 2))
    >>> real_or_synthetic(x, y, np.arange(60), 100 + np.arange(60))["auc"].round(1).tolist()
    [1.0, 0.5]
    """
    x, y = _rows(real, "real"), _rows(synthetic, "synthetic")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"real is {x.shape[1]} wide, synthetic {y.shape[1]}: take one embedding")
    a = _names(real_sources, len(x), "real")
    b = _names(synthetic_sources, len(y), "synthetic")
    if min(len(set(a)) // 2, len(set(b))) < folds:
        raise ValueError(
            f"{len(set(a))} real and {len(set(b))} synthetic sources are too few for {folds} folds "
            "of both and of half the real ones"
        )
    parts = _probed(x, y, a, b, folds, seed)
    low, high = _auc_interval(parts, repeats, seed)
    first = {"auc": _mean_auc(parts), "ci_low": low, "ci_high": high}
    first |= {"n_reference": len(x), "n_candidate": len(y), "sources": len(set(a) | set(b))}
    areas = [_floor_auc(x, a, folds, seed + number) for number in range(floors)]
    second = {"auc": float(np.mean(areas))}
    second |= dict(zip(("ci_low", "ci_high"), np.quantile(areas, [0.025, 0.975]), strict=True))
    half = {"n_reference": len(x) // 2, "n_candidate": len(x) - len(x) // 2}
    rows = [first, second | half | {"sources": len(set(a))}]
    table = pd.DataFrame(rows, dtype=object).infer_objects()
    table.insert(0, "comparison", ["synthetic", "real against real"])
    return table


def _probed(x, y, a, b, folds, seed):
    """Of each fold: scores and sources of its real clips, scores and sources of the others."""
    from sklearn.model_selection import StratifiedGroupKFold

    points, sources = np.concatenate([x, y]), np.concatenate([a, b])
    made = np.arange(len(points)) >= len(x)
    cut = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    parts = []
    for train, test in cut.split(points, made, sources):
        # few clips in many dimensions: without a firm penalty every probe says 1
        probe = _classifier(seed, C=0.1, class_weight="balanced").fit(points[train], made[train])
        score = probe.decision_function(points[test])
        real, fake = ~made[test], made[test]
        sides = [(score[side], sources[test][side]) for side in (real, fake)]
        if all(len(side[0]) for side in sides):
            parts.append(sides)
    if not parts:
        raise ValueError("no fold holds both kinds: sources are shared too widely")
    return parts


def _auc(real, fake):
    from scipy.stats import rankdata

    # the Mann-Whitney statistic; ties count half
    ranks = rankdata(np.concatenate([fake, real]))[: len(fake)]
    return (ranks.sum() - len(fake) * (len(fake) + 1) / 2) / (len(fake) * len(real))


def _mean_auc(parts):
    return float(np.mean([_auc(real[0], fake[0]) for real, fake in parts]))


def _auc_interval(parts, repeats, seed):
    rng = np.random.default_rng([seed, 1])
    grouped = [[_by_source(*side) for side in sides] for sides in parts]

    def resampled(groups):
        return np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))])

    areas = [
        np.mean([_auc(resampled(real), resampled(fake)) for real, fake in grouped])
        for _ in range(repeats)
    ]
    return tuple(float(end) for end in np.quantile(areas, [0.025, 0.975]))


def _by_source(scores, sources):
    return [scores[sources == source] for source in dict.fromkeys(sources)]


def _floor_auc(x, sources, folds, seed):
    names = np.random.default_rng([seed, 2]).permutation(sorted(set(sources)))
    first = np.isin(sources, names[: len(names) // 2])
    halves = x[first], x[~first], sources[first], sources[~first]
    return _mean_auc(_probed(*halves, folds, seed))


# --- the best of several ---------------------------------------------------------------------------


def plan_candidates(plan, n):
    """Ask for several candidates of each clip of a plan.

    Parameters
    ----------
    plan : pandas.DataFrame
        From `generation.plan_clips`.
    n : int
        Candidates of each clip. The first is the clip itself: a plan with `n` of 1 is unchanged,
        and more candidates only add to fewer.

    Returns
    -------
    pandas.DataFrame
        The columns of `plan`, and ``candidate_of``, the ``clip_id`` that each stands for. A further
        candidate's seed follows from the clip's identity and seed, and its number.

    Raises
    ------
    ValueError
        `n` below 1.

    Examples
    --------
    >>> from soundscapes_utils import generation
    >>> plan_candidates(generation.plan_clips(["dog"], 1, duration_s=1), 2).clip_id.tolist()
    ['dog-simple-0000', 'dog-simple-0000-c2']
    """
    from . import generation

    if n < 1:
        raise ValueError(f"{n} candidates of each clip: give at least 1")
    plan = plan.assign(candidate_of=plan["clip_id"])
    rows = []
    for row in plan.to_dict("records"):
        rows.append(row)
        for number in range(2, n + 1):
            name = f"{row['clip_id']}-c{number}"
            seed = generation.clip_seed(
                "candidate", row["label"], row["prompt"], name, int(row["seed"])
            )
            rows.append(row | {"clip_id": name, "seed": seed})
    return pd.DataFrame(rows, columns=plan.columns)


def best_candidates(candidates, generated, scores):
    """Keep of each clip's candidates the one with the highest score.

    Parameters
    ----------
    candidates : pandas.DataFrame
        From `plan_candidates`.
    generated : pandas.DataFrame
        What `generation.generate_clips` made of it; clips that failed may be missing.
    scores : array_like, shape (len(generated),)
        One a row of `generated`; more is better. Usually the ``clap_score`` of `clap_scores`.

    Returns
    -------
    pandas.DataFrame
        A `generated` table in the plan's order, one row for each clip of which a candidate is
        there, under the clip's own ``clip_id``; ``score`` is that of the choice, and stays as it
        was where there was nothing to choose from. Of equal candidates the first is kept.

    Raises
    ------
    ValueError
        Scores that are not finite or not one a row, or a clip that is not among the candidates.

    Notes
    -----
    As AudioLDM's own sampler does (Liu et al., arXiv 2301.12503; three candidates in Gaurav et
    al.), but each candidate has a seed of its own and can be made again alone.

    Examples
    --------
    >>> candidates = pd.DataFrame({"clip_id": ["a", "a-c2"], "candidate_of": ["a", "a"]})
    >>> best_candidates(candidates, candidates[["clip_id"]].assign(score=0.0), [0.1, 0.4])
      clip_id  score
    0       a    0.4
    """
    scores = _values(scores, len(generated))
    parents = candidates.set_index("clip_id")["candidate_of"]
    unknown = generated.loc[~generated["clip_id"].isin(parents.index), "clip_id"]
    if len(unknown):
        raise ValueError(f"clip {unknown.iloc[0]} is no candidate of this plan")
    parent = generated["clip_id"].map(parents).to_numpy()
    rivals = pd.Series(parent).map(parents.value_counts()).to_numpy() > 1
    order = pd.DataFrame({"parent": parent, "score": scores}).sort_values(
        "score", ascending=False, kind="stable"
    )
    first = order.drop_duplicates("parent").index
    chosen = generated.assign(
        clip_id=parent, score=np.where(rivals, scores, generated["score"].to_numpy(float))
    ).iloc[first]
    wanted = [name for name in dict.fromkeys(parents) if name in set(parent)]
    return chosen.set_index("clip_id").loc[wanted].reset_index()[list(generated.columns)]


def best_by_clap(candidates, generated, clap="laion-clap", path=""):
    """Keep of each clip's candidates the one that suits its own prompt best.

    Parameters
    ----------
    candidates, generated : pandas.DataFrame
        As for `best_candidates`; of `generated`, ``path`` and ``prompt`` are used.
    clap, path : str
        As for `text_embedder`.

    Returns
    -------
    pandas.DataFrame
        As from `best_candidates`; ``score`` is the cosine between a clip and its prompt.

    Examples
    --------
    >>> import tempfile
    >>> from soundscapes_utils import generation
    >>> plan = plan_candidates(generation.plan_clips(["dog"], 1, duration_s=1.28), 2)
    >>> backend = generation.get_backend("audioldm", steps=1, device="cpu")
    >>> made = generation.generate_clips(plan, backend, tempfile.mkdtemp())
    >>> best_by_clap(plan, made, "mini-clap").clip_id.tolist()
    ['dog-simple-0000']
    """
    from . import embeddings

    said = text_embedder(clap, path)(generated["prompt"])
    heard = embeddings.get_embedding(clap, path).embed(generated["path"], silence="allow")
    return best_candidates(candidates, generated, _cosines(_unit(heard, "generated"), said))


# --- checks ----------------------------------------------------------------------------------------


def _rows(x, name):
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or not x.size:
        raise ValueError(f"{name} must be rows of numbers, one a clip; it has shape {x.shape}")
    wrong = ~np.isfinite(x).all(axis=1)
    if wrong.any():
        raise ValueError(
            f"{wrong.sum()} rows of {name} are not finite, the first is row {wrong.argmax()}: "
            "set these clips aside"
        )
    return x


def _unit(x, name):
    x = _rows(x, name)
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError(f"row {lengths.argmin()} of {name} is zero: it has no direction")
    return x / lengths


def _names(names, n, what):
    names = np.asarray([str(name) for name in names], dtype=object)
    if len(names) != n:
        raise ValueError(f"{what} has {n} rows, but {len(names)} names come with it: one a row")
    return names


def _values(values, n):
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (n,) or not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise ValueError(
            f"one finite value a clip is needed: got shape {values.shape} for {n} clips, {bad} of "
            "them not finite"
        )
    return values


def _mask(kept, n):
    kept = np.asarray(kept)
    if kept.dtype != bool or kept.shape != (n,):
        raise ValueError(
            f"a filter is one True or False a clip: got {kept.dtype} of shape {kept.shape} for {n}"
        )
    return kept
