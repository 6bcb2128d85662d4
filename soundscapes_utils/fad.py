"""Distances between sets of embeddings, on plain arrays, each with its interval and its floor.

Throughout, `x` is the reference (real recordings), `y` the candidate, one row a clip; everything is
computed in float64. Where several rows stem from one recording, hand over `groups` (one
label a row): then recordings, not rows, are drawn, so that near-duplicates never face each other
and the floor is not flattered.
"""

from functools import partial

import numpy as np

_BLOCK = 1024  # rows of a distance matrix held at once
_KEPT = 0.8  # share of the recordings in a subsample for an interval
_MEDIAN_ROWS = 4096  # beyond this many rows the median distance is that of evenly spaced rows
FLOOR_NAME = "real (floor)"
_UNTRUSTED = "extrapolated from fewer clips than dimensions: biased"


def _matrix(x, name, least=2):
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{name}: expected an array of shape (clips, dim), got {x.shape}")
    if len(x) < least:
        raise ValueError(f"{name}: needs at least {least} rows (clips), got {len(x)}")
    if not np.isfinite(x).all():
        rows = np.flatnonzero(~np.isfinite(x).all(axis=1))
        raise ValueError(
            f"{name}: {len(rows)} of {len(x)} rows hold NaN or infinite values (first: row "
            f"{rows[0]}); embed those clips again or leave them out"
        )
    return x


def _pair(x, y, least=2):
    x, y = _matrix(x, "reference", least), _matrix(y, "candidate", least)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"reference has {x.shape[1]} dimensions, candidate {y.shape[1]}: embed both with the "
            "same network"
        )
    return x, y


# --- distances -----------------------------------------------------------------------------------


def frechet_distance(x, y):
    """Fréchet distance of the Gaussians fitted to two sets (FAD where the rows embed audio).

    ``|m_x − m_y|² + tr C_x + tr C_y − 2 tr (C_x C_y)^½`` with unbiased covariances. The root's
    trace is the sum of the singular values of ``F_x F_yᵀ`` for any factors ``C = Fᵀ F``: with the
    centred rows as factors no matrix is larger than n × n, and no root of a singular matrix is
    ever taken, so the result is real, not negative and finite at every n.

    Parameters
    ----------
    x, y : array_like, shape (n_x, d) and (n_y, d)
        Embeddings, one row a clip.

    Returns
    -------
    float
        In squared units of the embedding. Biased upwards by about tr(C)·(1/n_x + 1/n_y) or more:
        compare only with scores of the same n, and see `noise_floor` and `fad_infinity`.

    Raises
    ------
    ValueError
        Fewer than two rows, values that are not finite, different d.

    Notes
    -----
    Kilgour et al., "Fréchet Audio Distance", Interspeech 2019; Dowson and Landau 1982.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(50, 8))
    >>> round(frechet_distance(x, x + 2.0), 6)  # a shift of 2 in each of 8 dimensions
    32.0
    """
    x, y = _pair(x, y)
    shift = x.mean(axis=0) - y.mean(axis=0)
    a, b = _factor(x), _factor(y)
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return max(0.0, float(shift @ shift + (a * a).sum() + (b * b).sum() - 2.0 * root))


def _factor(x):
    rows = (x - x.mean(axis=0)) / np.sqrt(len(x) - 1)
    return rows if len(x) <= x.shape[1] else np.linalg.qr(rows, mode="r")


def _squared_distances(a, b):
    # centring on b keeps the expanded square from cancelling where embeddings sit far from zero
    centre = b.mean(axis=0)
    a, b = a - centre, b - centre
    b_norms = (b * b).sum(axis=1)
    for start in range(0, len(a), _BLOCK):
        rows = a[start : start + _BLOCK]
        squares = (rows * rows).sum(axis=1)[:, None] + b_norms - 2.0 * rows @ b.T
        yield start, np.maximum(squares, 0.0, out=squares)


def median_distance(x):
    """Median Euclidean distance between the rows of a set: the bandwidth of `kernel_distance`.

    Parameters
    ----------
    x : array_like, shape (n, d)
        Embeddings. Of more than 4,096 rows, 4,096 evenly spaced ones are compared.

    Returns
    -------
    float
        In units of the embedding; 0 where most rows are equal.

    Raises
    ------
    ValueError
        Fewer than two rows or values that are not finite.

    Examples
    --------
    >>> median_distance([[0.0], [1.0], [3.0]])
    2.0
    """
    from scipy.spatial.distance import pdist

    x = _matrix(x, "reference")
    if len(x) > _MEDIAN_ROWS:
        x = x[np.linspace(0, len(x) - 1, _MEDIAN_ROWS).astype(int)]
    return float(np.median(pdist(x)))


def kernel_distance(x, y, bandwidth=None):
    """Kernel audio distance (KAD): 100 × the unbiased squared MMD under a Gaussian kernel.

    Parameters
    ----------
    x, y : array_like, shape (n_x, d) and (n_y, d)
        Embeddings, `x` the reference.
    bandwidth : float, optional
        σ in ``exp(−|a − b|²/(2σ²))``; by default the median distance within `x`. Candidates that
        are to be compared must share it.

    Returns
    -------
    float
        Dimensionless, at most 200. Its expectation at equal distributions is 0 at every n, so it
        *can be negative*: that means "no difference seen at this n", never "better than real".

    Raises
    ------
    ValueError
        As `frechet_distance`; a bandwidth that is not positive, or a reference whose rows are
        mostly equal, so that it has none.

    Notes
    -----
    Chung et al., "KAD: No More FAD!", arXiv 2502.15602: median over the *reference*. Memory is
    that of 1,024 rows of the distance matrix.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x, near, far = rng.normal(size=(3, 200, 4)) + np.array([0, 0, 3])[:, None, None]
    >>> abs(kernel_distance(x, near)) < 1.5 < kernel_distance(x, far)
    True
    """
    x, y = _pair(x, y)
    sigma = median_distance(x) if bandwidth is None else float(bandwidth)
    if not (np.isfinite(sigma) and sigma > 0):
        raise ValueError(
            f"kernel bandwidth must be positive, got {sigma}; where most rows of the "
            "reference are equal, give one by hand"
        )

    def kernel_sum(a, b):
        blocks = _squared_distances(a, b)
        return sum(float(np.exp(block / (-2.0 * sigma**2)).sum()) for _, block in blocks)

    n, m = len(x), len(y)
    # each row's kernel with itself is 1 and must not count in the unbiased estimate
    within_x = (kernel_sum(x, x) - n) / (n * (n - 1))
    within_y = (kernel_sum(y, y) - m) / (m * (m - 1))
    return 100.0 * (within_x + within_y - 2.0 * kernel_sum(x, y) / (n * m))


def precision_recall_density_coverage(x, y, k=5):
    """Fidelity and diversity by k-nearest-neighbour balls.

    Parameters
    ----------
    x, y : array_like, shape (n_x, d) and (n_y, d)
        Embeddings, `x` the reference.
    k : int, default 5
        Neighbours that set a ball's radius.

    Returns
    -------
    dict of float
        ``precision``, share of candidates inside some reference ball; ``recall``, share of
        reference rows inside some candidate ball; ``density``, mean number of reference balls
        round a candidate over k (can exceed 1); ``coverage``, share of reference balls that hold
        a candidate.

    Raises
    ------
    ValueError
        As `frechet_distance`, or a set that has no k neighbours (n ≤ k).

    Notes
    -----
    Kynkäänniemi et al. (arXiv 1904.06991) and Naeem et al. (arXiv 2002.09797); both depend on n
    and k, so they want a floor as the distances do.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(60, 4))
    >>> found = precision_recall_density_coverage(x, x + 100.0)
    >>> found["precision"], found["coverage"]
    (0.0, 0.0)
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    x, y = _pair(x, y, least=k + 1)
    x_radii, y_radii = _squared_radii(x, k), _squared_radii(y, k)
    inside, recalled, covered = [], [], []
    for start, block in _squared_distances(x, y):
        within = block <= x_radii[start : start + len(block), None]
        inside.append(within.sum(axis=0))
        recalled.append((block <= y_radii).any(axis=1))
        covered.append(within.any(axis=1))
    balls = np.sum(inside, axis=0)
    return {
        "precision": float((balls > 0).mean()),
        "recall": float(np.concatenate(recalled).mean()),
        "density": float(balls.mean() / k),
        "coverage": float(np.concatenate(covered).mean()),
    }


def _squared_radii(x, k):
    # column 0 is the row's distance to itself
    return np.concatenate([np.partition(b, k, axis=1)[:, k] for _, b in _squared_distances(x, x)])


def _manifold(key):
    return lambda x, y: precision_recall_density_coverage(x, y)[key]


def _extrapolated(x, y):
    return fad_infinity(x, y, repeats=2)["value"]


METRICS = {
    "FAD": frechet_distance,
    "FAD-inf": _extrapolated,
    "KAD": kernel_distance,
    **{key: _manifold(key) for key in ("precision", "recall", "density", "coverage")},
}
"""Distances and shares that `score_table` knows, by name: functions of (reference, candidate)."""

# four fifths of them must still hold a row and its five neighbours, or several sizes for a line
_RECORDINGS_FOR_INTERVAL = dict.fromkeys(set(METRICS) - {"FAD", "KAD"}, 8)
_POSITIVE, _SHARE = (0.0, np.inf), (0.0, 1.0)
_RANGES = {"FAD": _POSITIVE, "density": _POSITIVE}
_RANGES |= dict.fromkeys(("precision", "recall", "coverage"), _SHARE)


# --- how sure, and against what ------------------------------------------------------------------


def _codes(n, groups, name):
    """Group number of every row; without groups every row is its own."""
    if groups is None:
        return np.arange(n)
    groups = np.asarray(groups)
    if groups.shape != (n,):
        raise ValueError(f"groups of {name}: expected {n} labels, one a row, got {groups.shape}")
    return np.unique(groups, return_inverse=True)[1]


def _shuffled(codes, rng):
    """Rows in random order, those of one group next to each other."""
    place = rng.permutation(codes.max() + 1)[codes]
    return np.lexsort((rng.random(len(codes)), place))


def _four_fifths(codes, rng):
    """Mask of the rows of a random four fifths of the recordings."""
    n = codes.max() + 1
    return np.isin(codes, rng.permutation(n)[: int(_KEPT * n)])


def _widening(codes):
    # a mean over k of n, drawn without replacement, varies by (n − k)/k of what n rows vary by
    ratios = [int(_KEPT * n) / (n - int(_KEPT * n)) for n in (code.max() + 1 for code in codes)]
    return np.prod(ratios) ** 0.25


def bootstrap_distance(
    x,
    y,
    metric=frechet_distance,
    *,
    groups_x=None,
    groups_y=None,
    repeats=200,
    confidence=0.95,
    seed=0,
):
    """Distance with an interval from subsamples.

    The ordinary bootstrap repeats rows, which shrinks covariances and lifts a FAD far above the
    value it should surround. Here each repeat keeps random four fifths of both sets and repeats
    nothing; the spread of the repeats, widened by √(k/(n − k)) = 2 as a mean of k out of n rows
    demands, is put round the value (a delete-d jackknife). Centring on the repeats' own mean takes
    out the bias of their smaller n.

    Parameters
    ----------
    x, y : array_like, shape (n_x, d) and (n_y, d)
        Embeddings, `x` the reference.
    metric : callable, default frechet_distance
        Maps (x, y) to a number.
    groups_x, groups_y : array_like, optional
        Recording of every row; what is drawn are then recordings.
    repeats : int, default 200
        Number of subsamples.
    confidence : float, default 0.95
        Between 0 and 1.
    seed : int, default 0
        The same seed gives the same interval.

    Returns
    -------
    tuple of float
        ``(value, ci_low, ci_high)``: how far the score *at this n* would move with other clips. It
        does not contain the bias of a finite n, for which see `noise_floor` and `fad_infinity`. For
        Gaussian clouds of 40 clips it held the mean score in 95 to 99 of 100 trials.

    Raises
    ------
    ValueError
        As the metric, or fewer than four rows (recordings) in a set.

    Notes
    -----
    Shao and Tu, "The Jackknife and Bootstrap" (1995), ch. 2; Politis, Romano and Wolf,
    "Subsampling" (1999).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x, y = rng.normal(size=(60, 4)), rng.normal(1.0, 1.0, size=(60, 4))
    >>> value, low, high = bootstrap_distance(x, y)
    >>> low < value < high
    True
    """
    x, y = _pair(x, y)
    codes = _codes(len(x), groups_x, "reference"), _codes(len(y), groups_y, "candidate")
    for name, code in zip(("reference", "candidate"), codes, strict=True):
        if code.max() < 3:
            raise ValueError(
                f"{name}: an interval needs at least 4 independent clips, got {code.max() + 1}"
            )
    value = metric(x, y)
    rng = np.random.default_rng(seed)
    subsamples = [
        metric(x[_four_fifths(codes[0], rng)], y[_four_fifths(codes[1], rng)])
        for _ in range(repeats)
    ]
    return (value, *_interval(value, subsamples, codes, confidence))


def _interval(value, subsamples, codes, confidence=0.95):
    tail = 50.0 * (1.0 - confidence)
    spread = _widening(codes) * (np.array(subsamples) - np.mean(subsamples))
    low, high = np.percentile(spread, [tail, 100.0 - tail])
    return float(value + low), float(value + high)


def noise_floor(x, n=None, repeats=30, seed=0, *, metric=frechet_distance, groups=None):
    """Distances between disjoint random halves of one set: what "perfect" scores at this n.

    Parameters
    ----------
    x : array_like, shape (rows, d)
        Embeddings of real clips.
    n : int, optional
        Rows in each of the two sets; by default as many as fit.
    repeats : int, default 30
        Number of random splits.
    seed : int, default 0
        The same seed gives the same splits.
    metric : callable, default frechet_distance
        Maps (x, y) to a number.
    groups : array_like, optional
        Recording of every row: no recording is on both sides.

    Returns
    -------
    np.ndarray of float, shape (repeats,)
        Their mean is the floor; their spread is that of re-splitting these clips.

    Raises
    ------
    ValueError
        As the metric, or `n` too large for two disjoint sets.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(200, 4))
    >>> small, large = noise_floor(x, 10).mean(), noise_floor(x, 100).mean()
    >>> bool(small > 3 * large)
    True
    """
    x = _matrix(x, "reference", least=4)
    codes = _codes(len(x), groups, "reference")
    n = _half_size(codes) if n is None else int(n)
    rng = np.random.default_rng(seed)
    return np.array([metric(*_disjoint(x, codes, n, rng)) for _ in range(repeats)])


def _half_size(codes):
    # the recording at the cut may have to stay out of the second half
    return int(len(codes) - np.bincount(codes).max() + 1) // 2


def _disjoint(x, codes, n, rng):
    order = _shuffled(codes, rng)
    first, rest = order[:n], order[n:]
    # a recording that the cut went through stays on the first side alone
    second = rest[~np.isin(codes[rest], codes[first])][:n]
    if n < 2 or len(second) < n:
        raise ValueError(
            f"reference: {len(codes)} rows of {codes.max() + 1} recordings do not give two "
            f"disjoint sets of {n} (at least 2) rows; use a smaller n or more clips"
        )
    return x[first], x[second]


def fad_infinity(x, y, *, seed=0, sizes=8, draws=5, repeats=50, groups_x=None, groups_y=None):
    """Fréchet distance extrapolated to infinitely many clips.

    FAD falls about linearly with 1/n. Subsets of `sizes` different n, from a quarter of the
    smaller set to all of it and evenly spaced in 1/n, are drawn without replacement from *both*
    sets; the line through their mean FAD, read at 1/n = 0, is the result.

    Parameters
    ----------
    x, y : array_like, shape (n_x, d) and (n_y, d)
        Embeddings, `x` the reference.
    seed : int, default 0
        The same seed gives the same result.
    sizes : int, default 8
        Different n, at least 3.
    draws : int, default 5
        Random subsets for each n.
    repeats : int, default 50
        Subsamples for the interval, as in `bootstrap_distance`.
    groups_x, groups_y : array_like, optional
        Recording of every row; subsets then take whole recordings (the last one cut to fit).

    Returns
    -------
    dict
        ``value``, the intercept (noise can make it negative); ``slope``, in FAD × clips; ``r2`` of
        the line; ``ci_low``, ``ci_high``, 95 %; ``trusted``, whether the smallest subset has at
        least d rows; ``curve``, a table of ``n`` and mean ``fad``. With fewer rows than dimensions
        FAD is *not* linear in 1/n and much of the bias stays, however good r2 looks: of 22 points
        of pure bias at n = 100 and d = 64, 10 remained at an r2 of .97.

    Raises
    ------
    ValueError
        As `frechet_distance`; fewer than 8 recordings in a set; fewer than 3 sizes.

    Notes
    -----
    Gui et al., "Adapting Fréchet Audio Distance", ICASSP 2024, hold the reference fixed and draw
    with replacement; then the reference's own bias stays, and repeated rows add one.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> found = fad_infinity(rng.normal(size=(200, 8)), rng.normal(0.5, 1, size=(200, 8)))
    >>> found["ci_low"] < 8 * 0.5**2 < found["ci_high"]
    True
    """
    import pandas as pd

    x, y = _pair(x, y)
    if sizes < 3:
        raise ValueError(f"a line wants at least 3 sizes, got {sizes}")
    codes = _codes(len(x), groups_x, "reference"), _codes(len(y), groups_y, "candidate")
    if min(code.max() for code in codes) < 7:
        raise ValueError(
            "fad_infinity needs at least 8 independent clips in each set; take more, or leave "
            "FAD-inf out of the metrics"
        )
    rng = np.random.default_rng(seed)
    n, fad, slope, value = _line(x, y, codes, sizes, draws, rng)
    subsamples = []
    for _ in range(repeats):
        kept = [_four_fifths(code, rng) for code in codes]
        rest = [_codes(k.sum(), c[k], "subsample") for c, k in zip(codes, kept, strict=True)]
        subsamples.append(_line(x[kept[0]], y[kept[1]], rest, sizes, 1, rng)[-1])
    low, high = _interval(value, subsamples, codes)
    return {
        "value": float(value),
        "slope": float(slope),
        "r2": _r_squared(fad, value + slope / n),
        "ci_low": low,
        "ci_high": high,
        "trusted": bool(n.min() >= x.shape[1]),
        "curve": pd.DataFrame({"n": n, "fad": fad}),
    }


def _line(x, y, codes, sizes, draws, rng):
    """Mean FAD of random subsets for n evenly spaced in 1/n, and the line through them."""
    full = min(len(x), len(y))
    n = np.unique(np.rint(1.0 / np.linspace(4.0 / full, 1.0 / full, sizes)).astype(int))
    n = n[n >= 2]
    totals = np.zeros(len(n))
    for _ in range(draws):
        order_x, order_y = (_shuffled(code, rng) for code in codes)
        totals += [frechet_distance(x[order_x[:k]], y[order_y[:k]]) for k in n]
    slope, intercept = np.polyfit(1.0 / n, totals / draws, 1)
    return n, totals / draws, slope, intercept


def _r_squared(values, fitted):
    spread = ((values - values.mean()) ** 2).sum()
    return float(1.0 - ((values - fitted) ** 2).sum() / spread) if spread > 0 else 1.0


# --- tables --------------------------------------------------------------------------------------


def score_table(
    reference,
    candidates,
    *,
    embedding,
    reference_name="real",
    metrics=("FAD", "KAD"),
    floor=None,
    groups=None,
    repeats=200,
    seed=0,
):
    """Score candidates against one reference, with n, interval and floor.

    Parameters
    ----------
    reference : array_like, shape (n, d)
        Embeddings of held-out real clips.
    candidates : dict of str to array_like, shape (n_i, d)
        Embeddings to score, by name.
    embedding : str
        Name of the embedding, for the table.
    reference_name : str, default "real"
        Name of the reference, for the table.
    metrics : sequence of str
        Keys of `METRICS`. KAD's bandwidth is the reference's for all candidates.
    floor : array_like, shape (m, d), optional
        Real clips that are *not* in the reference: as many of them as the candidate has are
        scored as if they were a candidate. Without it the floor is `noise_floor` of the reference.
    groups : dict of str to array_like, optional
        Recording of every row, by candidate's name; the reference's under `reference_name`.
    repeats : int, default 200
        Subsamples for each interval; a tenth of it (at least 10) splits for a floor of halves.
    seed : int, default 0
        Of intervals and floors.

    Returns
    -------
    pandas.DataFrame
        The ``scores`` table: ``metric, embedding, reference, candidate, value, ci_low, ci_high,
        n_reference, n_candidate, note``. Floor rows have ``candidate == fad.FLOOR_NAME``. The
        interval is empty where a set has too few recordings for one, and the note says so.

    Raises
    ------
    ValueError
        As the metrics, an unknown metric, or no candidate.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> table = score_table(
    ...     rng.normal(size=(40, 4)), {"noisy": rng.normal(0, 2, (20, 4))}, embedding="toy"
    ... )
    >>> table.candidate.tolist()
    ['real (floor)', 'noisy', 'real (floor)', 'noisy']
    """
    import pandas as pd

    if not candidates:
        raise ValueError("score_table: no candidates given")
    unknown = set(metrics) - set(METRICS)
    if unknown:
        raise ValueError(f"unknown metrics {sorted(unknown)}; known: {', '.join(METRICS)}")
    groups = groups or {}
    reference_groups = groups.get(reference_name)
    rows = []
    for name in metrics:
        metric = METRICS[name]
        if metric is kernel_distance:
            metric = partial(kernel_distance, bandwidth=median_distance(reference))
        score = partial(_score, name, reference, reference_groups, metric, repeats, seed)
        if floor is None:
            found = [_floor_of_halves(reference, reference_groups, metric, repeats, seed)]
        else:
            origin = "real clips outside the reference"
            sets = _floor_sets(floor, candidates, seed)
            found = [score(FLOOR_NAME, real, None, origin) for real in sets]
        found += [score(key, y, groups.get(key)) for key, y in candidates.items()]
        rows += [{"metric": name, **row} for row in found]
    table = pd.DataFrame(rows).assign(embedding=embedding, reference=reference_name)
    return table[SCORE_COLUMNS]


SCORE_COLUMNS = [
    *("metric", "embedding", "reference", "candidate", "value", "ci_low", "ci_high"),
    *("n_reference", "n_candidate", "note"),
]


def _score(
    name, reference, reference_groups, metric, repeats, seed, candidate, y, y_groups, origin=""
):
    groups = {"groups_x": reference_groups, "groups_y": y_groups, "seed": seed}
    recordings = [
        _codes(len(reference), reference_groups, "reference"),
        _codes(len(y), y_groups, candidate),
    ]
    note, low, high = "", np.nan, np.nan
    least = _RECORDINGS_FOR_INTERVAL.get(name, 4)
    if min(code.max() + 1 for code in recordings) < least:
        value, note = metric(reference, y), f"fewer than {least} recordings: no interval"
    elif metric is _extrapolated:
        found = fad_infinity(reference, y, **groups)
        value, low, high = found["value"], found["ci_low"], found["ci_high"]
        note = "" if found["trusted"] else _UNTRUSTED
    else:
        value, low, high = bootstrap_distance(reference, y, metric, repeats=repeats, **groups)
    low, high = np.clip([low, high], *_RANGES.get(name, (-np.inf, np.inf)))
    return {
        "candidate": candidate,
        "value": value,
        "ci_low": low,
        "ci_high": high,
        "n_reference": len(reference),
        "n_candidate": len(y),
        "note": "; ".join(filter(None, [origin, note])),
    }


def _floor_sets(floor, candidates, seed):
    """Real clips in the number of each candidate, or all of them where there are fewer."""
    floor = _matrix(floor, "floor")
    order = np.random.default_rng(seed).permutation(len(floor))
    sizes = sorted({min(len(y), len(floor)) for y in candidates.values()})
    return [floor[order[:size]] for size in sizes]


def _floor_of_halves(reference, groups, metric, repeats, seed):
    reference = _matrix(reference, "reference", least=4)
    splits = max(10, repeats // 10)
    n = _half_size(_codes(len(reference), groups, "reference"))
    values = noise_floor(reference, n, splits, seed, metric=metric, groups=groups)
    low, high = np.percentile(values, [2.5, 97.5])
    note = f"disjoint halves of the reference, {splits} splits"
    if metric is _extrapolated and n // 4 < reference.shape[1]:
        note = f"{note}; {_UNTRUSTED}"
    return {
        "candidate": FLOOR_NAME,
        "value": values.mean(),
        "ci_low": low,
        "ci_high": high,
        "n_reference": n,
        "n_candidate": n,
        "note": note,
    }


def beside_floor(scores):
    """Put the floor beside every score: the ``scores`` table as people read it.

    Parameters
    ----------
    scores : pandas.DataFrame
        From `score_table`, or several of them concatenated.

    Returns
    -------
    pandas.DataFrame
        ``embedding, metric, reference, candidate``; ``n`` (of reference / candidate); ``score`` and
        ``floor``, both with interval; ``floor_n``. Of several floors the one nearest in n is taken.

    Raises
    ------
    ValueError
        A score for whose embedding, metric and reference there is no floor.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> table = score_table(
    ...     rng.normal(size=(40, 4)), {"noisy": rng.normal(0, 2, (20, 4))}, embedding="toy"
    ... )
    >>> beside_floor(table)["n"].tolist()
    ['40 / 20', '40 / 20']
    """
    import pandas as pd

    scores = scores.reset_index(drop=True)
    is_floor = scores["candidate"] == FLOOR_NAME
    rows = []
    for row in scores[~is_floor].itertuples():
        same = is_floor
        for key in ("metric", "embedding", "reference"):
            same = same & (scores[key] == getattr(row, key))
        if not same.any():
            raise ValueError(
                f"no floor for {row.metric} in {row.embedding} against {row.reference}"
            )
        nearest = (scores.loc[same, "n_candidate"] - row.n_candidate).abs().idxmin()
        floor = scores.loc[nearest]
        rows.append(
            {
                "embedding": row.embedding,
                "metric": row.metric,
                "reference": row.reference,
                "candidate": row.candidate,
                "n": f"{row.n_reference} / {row.n_candidate}",
                "score": _with_interval(row.value, row.ci_low, row.ci_high),
                "floor": _with_interval(floor["value"], floor["ci_low"], floor["ci_high"]),
                "floor_n": f"{floor['n_reference']} / {floor['n_candidate']}",
            }
        )
    return pd.DataFrame(rows)


def _with_interval(value, low, high):
    value, low, high = (
        np.format_float_positional(v, precision=3, fractional=False, trim="-")
        for v in (value, low, high)
    )
    return value if low == "nan" else f"{value} [{low}, {high}]"
