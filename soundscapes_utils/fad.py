"""Distances between two sets of embeddings, each with its interval and its noise floor.

Throughout, `x` is the reference (real recordings) and `y` the candidate: arrays (n, d), one row per clip
or window, in float64. Of two finite sets no Fréchet distance is zero, however alike they are: what real
clips score against other real clips is the *noise floor*. Where several rows stem from one recording,
give `groups` (one label per row): recordings are drawn, not rows.
"""

from functools import cache, partial
from inspect import signature

import numpy as np

from . import stats

_BLOCK = 1024  # rows and columns of a distance matrix computed at once
_MEDIAN_ROWS = 5000  # up to here the median distance is over all rows, beyond over as many of them
_LARGEST = 1e150  # whose square still is a float64
_BOTH = ("FAD", "KAD")
_KEPT = 0.8  # share of the recordings in a subsample for an interval
_UNTRUSTED = "extrapolated from fewer clips than dimensions: biased"


def _matrix(x, name, least=2):
    x = stats.real_rows(x, name, least=least)
    if np.maximum(x.max(), -x.min()) > _LARGEST:
        raise ValueError(f"{name}: values beyond {_LARGEST} cannot be squared; scale them down")
    return x


def _pair(x, y, least=2, names=("reference", "candidate")):
    x, y = (_matrix(rows, name, least) for rows, name in zip((x, y), names, strict=True))
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"{names[0]} has {x.shape[1]} dimensions, {names[1]} {y.shape[1]}: embed both with the "
            "same network"
        )
    return x, y


def _codes(n, groups, name):
    """Group number of every row; without groups every row is one of its own."""
    if groups is None:
        return np.arange(n)
    groups = np.asarray(groups)
    if groups.shape != (n,):
        raise ValueError(f"groups of {name}: expected {n} labels, one per row, got {groups.shape}")
    return np.unique(groups, return_inverse=True)[1]


# --- Fréchet distance ----------------------------------------------------------------------------


def frechet_distance(x, y):
    """Fréchet distance of the Gaussians fitted to two sets (FAD where the rows embed audio).

    ``|m_x − m_y|² + tr C_x + tr C_y − 2 tr (C_x C_y)^½`` with unbiased covariances. With the centred
    rows over √(n − 1), ``C_x = AᵀA`` and ``C_y = BᵀB``, and the last trace is the sum of the singular
    values of ``A Bᵀ``: never complex, and fewer rows than dimensions are no special case.
    Kilgour et al., "Fréchet Audio Distance", Interspeech 2019; Dowson and Landau 1982.

    Returns
    -------
    float
        Not negative, in squared units of the embedding. Biased upwards by about
        tr(C)·(1/n_x + 1/n_y) or more: compare only with scores of the same n.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(50, 8))
    >>> round(frechet_distance(x, x + 2.0), 6)  # a shift of 2 in each of 8 dimensions
    32.0
    """
    x, y = _pair(x, y)
    # a power of two: squares neither overflow nor vanish, and no digit changes
    unit = 2.0 ** int(np.frexp(max(np.abs(x).max(), np.abs(y).max()))[1])
    shift = (x.mean(axis=0) - y.mean(axis=0)) / unit
    a, b = ((rows - rows.mean(axis=0)) / (unit * np.sqrt(len(rows) - 1)) for rows in (x, y))
    # in one order: the same to the last bit with x and y exchanged
    a, b = sorted((a, b), key=lambda rows: (len(rows), np.vdot(rows, rows)))
    apart = shift @ shift + np.vdot(a, a) + np.vdot(b, b)
    root, error = _root_trace(a, b)
    if 2.0 * error > 1e-8 * (apart - 2.0 * root):  # singular or ill-scaled, or nearly equal sets
        a, b = (rows if len(rows) <= x.shape[1] else np.linalg.qr(rows, mode="r") for rows in (a, b))
        root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(unit**2 * max(0.0, apart - 2.0 * root))


def _root_trace(a, b):
    """Trace of (C_a C_b)^½ by eigenvalues, and a bound of its rounding error.

    They square what singular values do not, in half the time (benchmarks/all.py, P2).
    """
    from scipy.linalg import LinAlgError, eigvalsh

    if len(a) <= a.shape[1]:
        product = a @ b.T
        product = product @ product.T
        values, size = np.linalg.eigvalsh(product), np.linalg.norm(product)
    else:
        cov_a, cov_b = a.T @ a, b.T @ b
        size = np.linalg.norm(cov_a) * np.linalg.norm(cov_b)
        try:
            values = eigvalsh(cov_a, cov_b, type=2, driver="gv", check_finite=False)  # of C_a C_b
        except LinAlgError:  # C_b has no Cholesky factor
            return 0.0, np.inf
    noise, roots = 16.0 * np.finfo(float).eps * size, np.sqrt(np.maximum(values, 0.0))
    # |√λ − √μ| ≤ |λ − μ|/√λ, and ≤ √|λ − μ| where λ is lost in the noise
    return roots.sum(), np.minimum(np.sqrt(noise), noise / np.maximum(roots, 1e-300)).sum()


# --- kernel distance -----------------------------------------------------------------------------


def kernel_distance(x, y, bandwidth=None, groups_x=None, groups_y=None, dtype=np.float64):
    """Kernel audio distance (KAD): 100 × the unbiased squared MMD under a Gaussian kernel.

    Chung et al., "KAD: No More FAD!", arXiv 2502.15602.

    Parameters
    ----------
    bandwidth : float, optional
        σ in ``exp(−|a − b|²/(2σ²))``; by default the median distance within `x`. Candidates that
        are to be compared must share it.
    groups_x, groups_y : array_like, optional
        Pairs of one group are left out within a set, of the median too: nearer to each other than
        independent rows, they would make equal distributions look different.
    dtype : {numpy.float64, numpy.float32}
        float32 takes half the time for thousands of rows, and errs by some 10⁻⁶.

    Returns
    -------
    float
        At most 200. Its expectation at equal distributions is 0 at every n, so it *can be negative*:
        that means "no difference seen at this n", never "better than real".

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x, near, far = rng.normal(size=(3, 200, 4)) + np.array([0, 0, 3])[:, None, None]
    >>> abs(kernel_distance(x, near)) < 1.5 < kernel_distance(x, far)
    True
    """
    x, y = _pair(x, y)
    if np.dtype(dtype) == np.float32 and max(np.abs(x).max(), np.abs(y).max()) > 1e15:
        raise ValueError("values beyond 1e15 cannot be squared in float32; take float64")
    codes_x, codes_y = _codes(len(x), groups_x, "reference"), _codes(len(y), groups_y, "candidate")
    if min(codes_x.max(), codes_y.max()) == 0:
        raise ValueError("kernel distance: all rows of a set are of one group; take more clips")
    centre = _centre(x)
    x, y = (np.asarray(rows - centre, dtype) for rows in (x, y))
    squares = _pairs(x, codes_x)
    if bandwidth is None:
        bandwidth, squares = _median_distance(x, codes_x)
    if not 0 < bandwidth < np.inf:
        raise ValueError(
            f"kernel bandwidth must be positive, got {bandwidth}; where most rows of the reference "
            "are equal, give one by hand"
        )
    within = _mean_kernel(squares, bandwidth) + _mean_kernel(_pairs(y, codes_y), bandwidth)
    return 100.0 * (within - 2.0 * _mean_kernel(_blocks(x, y), bandwidth))


def _centre(x):
    # near most rows, so that the expanded square does not cancel; a few far rows do not move it
    return np.median(x[np.linspace(0, len(x) - 1, min(len(x), 256)).astype(int)], axis=0)


def _squared_distances(a, b):
    # scikit-learn's euclidean_distances is the same formula, but forty times as slow at 60 rows, of
    # which an interval takes hundreds
    squares = a @ b.T
    squares *= -2.0
    squares += np.einsum("ij,ij->i", a, a)[:, None]
    squares += np.einsum("ij,ij->i", b, b)
    return np.maximum(squares, 0.0, out=squares)


def _blocks(a, b):
    """Squared distances of some rows of `a` to all of `b`, block after block."""
    for i in range(0, len(a), _BLOCK):
        yield _squared_distances(a[i : i + _BLOCK], b)


def _pairs(x, codes):
    """Squared distances of all pairs of rows of two groups, each pair once, block after block."""
    grouped = codes.max() + 1 < len(codes)
    for i in range(0, len(x), _BLOCK):
        for j in range(i, len(x), _BLOCK):
            block = _squared_distances(x[i : i + _BLOCK], x[j : j + _BLOCK])
            kept = ~np.tri(len(block), dtype=bool) if i == j else True
            if grouped:
                kept = kept & (codes[i : i + _BLOCK, None] != codes[j : j + _BLOCK])
            yield block.ravel() if kept is True else block[kept]


def _median_distance(x, codes):
    """Median distance between centred rows of two groups, and the squared distances of all pairs."""
    rows = np.linspace(0, len(x) - 1, min(len(x), _MEDIAN_ROWS)).astype(int)
    squares, end = np.empty(len(rows) * (len(rows) - 1) // 2, x.dtype), 0
    for block in _pairs(x[rows], _codes(len(rows), codes[rows], "reference")):
        squares[end : end + len(block)] = block
        end += len(block)
    squares, middle = squares[:end], [(end - 1) // 2, end // 2]
    squares.partition(middle)
    median = float(np.sqrt(squares[middle].astype(np.float64)).mean())
    return median, iter([squares]) if len(rows) == len(x) else _pairs(x, codes)


def _mean_kernel(blocks, bandwidth):
    total, n = 0.0, 0
    for squares in blocks:
        squares /= -2.0 * bandwidth**2
        total += float(np.exp(squares, out=squares).sum(dtype=np.float64))
        n += squares.size
    return total / n


# --- nearest neighbours --------------------------------------------------------------------------


def precision_recall_density_coverage(x, y, k=5):
    """Fidelity and diversity by balls that reach to the k-th nearest neighbour, and not to ties with it.

    Kynkäänniemi et al., arXiv 1904.06991; Naeem et al., arXiv 2002.09797; `prdc`'s rules.

    Returns
    -------
    dict of float
        ``precision``, share of candidates inside some reference ball; ``recall``, share of
        reference rows inside some candidate ball; ``density``, mean number of reference balls
        around a candidate over k (can exceed 1); ``coverage``, share of reference balls that hold
        a candidate. All depend on n and k, so they want a floor as the distances do.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(60, 4))
    >>> precision_recall_density_coverage(x, x + 100.0)["precision"]
    0.0
    """
    x, y = _pair(x, y, least=k + 1)
    centre = _centre(x)
    x, y = x - centre, y - centre
    x_radii, y_radii = _radii(x, k), _radii(y, k)
    balls, recalled, covered = np.zeros(len(y)), [], []
    for start, block in zip(range(0, len(x), _BLOCK), _blocks(x, y), strict=True):
        inside = block < x_radii[start : start + len(block), None]
        balls += inside.sum(axis=0)
        recalled.append((block < y_radii).any(axis=1))
        covered.append(inside.any(axis=1))
    return {
        "precision": float((balls > 0).mean()),
        "recall": float(np.concatenate(recalled).mean()),
        "density": float(balls.mean() / k),
        "coverage": float(np.concatenate(covered).mean()),
    }


def _radii(x, k):
    """Squared distance of each row to its k-th nearest, less what rounding could make of a tie."""
    # the nearest of all is the row itself
    radii = np.concatenate([np.partition(block, k, axis=1)[:, k] for block in _blocks(x, x)])
    return radii - 1e-12 * (radii + np.einsum("ij,ij->i", x, x))


def memorisation(train, test, generated, share=0.05):
    """Do generated clips lie nearer to the training clips than unseen real clips (`test`) do?

    A dict: ``nearer``, probability that a generated clip is nearer than a test clip (½: no copying
    seen), with its one-sided ``p_value``; ``flagged``, share of generated clips that are nearer than
    `share` of the test clips are (the ``threshold``); ``n_generated``; ``clips``, a table with the
    ``nearest`` row of `train` to each, the nearest first. The rank test of Meehan, Chaudhuri and
    Dasgupta (AISTATS 2020). Low diversity where training clips are dense looks near, too.
    """
    import pandas as pd
    from scipy.stats import mannwhitneyu

    train, test = _pair(train, test, names=("training set", "test set"))
    generated = _pair(train, generated, names=("training set", "generated set"))[1]
    expected = _nearest(test, train)[1]
    nearest, distance = _nearest(generated, train)
    ranks = mannwhitneyu(distance, expected, alternative="less")
    threshold = float(np.quantile(expected, share))
    clips = {"row": np.arange(len(generated)), "nearest": nearest, "distance": distance}
    clips = pd.DataFrame(clips).assign(flagged=distance < threshold)
    return {
        "nearer": float(1.0 - ranks.statistic / (len(generated) * len(test))),
        "p_value": float(ranks.pvalue),
        "flagged": float(clips["flagged"].mean()),
        "threshold": threshold,
        "n_generated": len(generated),
        "clips": clips.sort_values("distance", kind="stable", ignore_index=True),
    }


def _nearest(a, b):
    """Row of `b` nearest to each row of `a`, and its distance."""
    blocks = _blocks(a - _centre(b), b - _centre(b))
    nearest = np.concatenate([block.argmin(axis=1) for block in blocks])
    # the expanded square of a near-copy is mostly rounding
    return nearest, np.linalg.norm(a - b[nearest], axis=1)


# --- against what, and how sure ------------------------------------------------------------------


def noise_floor(x, n=None, repeats=30, seed=0, *, metric=frechet_distance, groups=None):
    """Distances between disjoint random halves of one set: what "perfect" scores at this n.

    Parameters
    ----------
    x : array_like, shape (rows, d)
    n : int, optional
        Rows in each of the two sets; by default as many as fit.
    repeats : int, default 30
        Number of random splits, and so of distances: their mean is the floor.
    metric : callable, default frechet_distance
        One that takes ``groups_x, groups_y`` is given them.
    groups : array_like, optional
        No group is on both sides.
    """
    x = _matrix(x, "reference", least=4)
    codes = _codes(len(x), groups, "reference")
    n = _half_size(codes) if n is None else int(n)
    rng = np.random.default_rng(seed)
    splits = (_disjoint(codes, n, rng) for _ in range(repeats))
    return np.array([_measured(metric, x[a], x[b], codes[a], codes[b]) for a, b in splits])


def _measured(metric, x, y, codes_x, codes_y):
    known = {"groups_x": codes_x, "groups_y": codes_y}
    return metric(x, y, **(known if known.keys() <= signature(metric).parameters.keys() else {}))


def _half_size(codes):
    # the recording at the cut may have to stay out of the second half
    return int(len(codes) - np.bincount(codes).max() + 1) // 2


def _shuffled(codes, rng):
    """Rows in random order, those of one group next to each other."""
    place = rng.permutation(codes.max() + 1)[codes]
    return np.lexsort((rng.random(len(codes)), place))


def _first(order, codes, n):
    """The first `n` rows of an order; if all are of one recording, the last gives way to another's."""
    first, others = order[:n], order[codes[order] != codes[order[0]]]
    alone = len(first) > 1 and len(others) and (codes[first] == codes[first[0]]).all()
    return np.append(first[:-1], others[0]) if alone else first


def _disjoint(codes, n, rng):
    order = _shuffled(codes, rng)
    first = _first(order, codes, n)
    # a recording that the cut went through stays on the first side alone
    second = order[~np.isin(codes[order], codes[first])]
    if n < 2 or len(second) < n:
        raise ValueError(
            f"reference: {len(codes)} rows of {codes.max() + 1} recordings do not give two "
            f"disjoint sets of {n} (at least 2) rows; use a smaller n or more clips"
        )
    return first, _first(second, codes, n)


def _four_fifths(codes, rng):
    """Mask of the rows of a random four fifths of the recordings."""
    n = codes.max() + 1
    return np.isin(codes, rng.permutation(n)[: int(_KEPT * n)])


def _interval(value, subsampled, codes):
    """95 % from the scores of four fifths of both sets: a delete-d jackknife.

    Centred on the subsamples' mean, as their smaller n has more bias; nothing is drawn twice, since the
    bootstrap's repeated rows lift a FAD far above its value. A mean over k of n varies by (n − k)/k of
    what n rows vary by: hence the widening. Shao and Tu, "The Jackknife and Bootstrap" (1995), ch. 2.
    """
    ratios = [int(_KEPT * n) / (n - int(_KEPT * n)) for n in (code.max() + 1 for code in codes)]
    spread = np.prod(ratios) ** 0.25 * (np.array(subsampled) - np.mean(subsampled))
    low, high = np.percentile(spread, [2.5, 97.5])
    return float(value + low), float(value + high)


def fad_infinity(x, y, *, seed=0, sizes=8, draws=5, repeats=50, groups_x=None, groups_y=None):
    """Fréchet distance extrapolated to infinitely many clips.

    FAD falls about linearly with 1/n. Subsets of `sizes` different n, from a quarter of the smaller
    set to all of it and evenly spaced in 1/n, are drawn `draws` times without replacement from *both*
    sets; the line through their mean FAD, read at 1/n = 0, is the result. (Gui et al., ICASSP 2024,
    hold the reference fixed, whose own bias then stays, and draw with replacement, which adds one.)

    Returns
    -------
    dict
        ``value``, the intercept (noise can make it negative), ``slope`` and ``r2``; ``ci_low`` and
        ``ci_high``, 95 %, from `repeats` subsamples; ``curve``, a table of ``n`` and mean ``fad``;
        ``trusted``, whether the smallest subset has at least d rows: with fewer, FAD is *not* linear
        in 1/n and much of the bias stays, however good r2 looks.
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
    subsampled = []
    for _ in range(repeats):
        kept = [_four_fifths(code, rng) for code in codes]
        rest = [_codes(k.sum(), c[k], "subsample") for c, k in zip(codes, kept, strict=True)]
        subsampled.append(_line(x[kept[0]], y[kept[1]], rest, sizes, 1, rng)[-1])
    low, high = _interval(value, subsampled, codes)
    return {
        "value": float(value),
        "slope": float(slope),
        "r2": float(np.corrcoef(1.0 / n, fad)[0, 1] ** 2) if np.ptp(fad) else 1.0,
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


# --- the score table -----------------------------------------------------------------------------


_SHARES = ("precision", "recall", "density", "coverage")
METRICS = {
    "FAD": frechet_distance,
    "FAD-inf": lambda x, y: fad_infinity(x, y, repeats=2)["value"],
    "KAD": kernel_distance,
    **{k: lambda x, y, k=k: precision_recall_density_coverage(x, y)[k] for k in _SHARES},
}
"""Distances and shares that `score_table` knows, by name: functions of (reference, candidate)."""

_UPPER = {"FAD": np.inf, "density": np.inf, "precision": 1.0, "recall": 1.0, "coverage": 1.0}
SCORE_COLUMNS = [
    *("metric", "embedding", "reference", "candidate", "value", "ci_low", "ci_high"),
    *("n_reference", "n_candidate", "floor", "floor_low", "floor_high", "floor_n", "note"),
]


def score_table(
    reference, candidates, *, embedding, metrics=_BOTH, floor=None, groups=None, repeats=200, seed=0
):
    """Score candidates against one reference, each with n, interval and noise floor.

    `candidates` are embeddings [n_i, d] by name, `embedding` is the name of the network, `metrics` are
    keys of `METRICS` (KAD's bandwidth is the reference's for all candidates). `floor` [m, d] holds real
    clips that are *not* in the reference: as many of them as the candidate has are scored in its place;
    by default the floor is `noise_floor` of the reference's halves. `groups` tells the recording of
    every row, by candidate's name; the reference's under "real", of `floor` "floor". `repeats`
    subsamples give each interval, a tenth of it (at least 10) splits a floor of halves.

    One row per metric and candidate, columns `SCORE_COLUMNS`: ``value`` and how far it would move with
    other clips at this n (of equal sets up to 99 % instead of 95); ``floor``, what real clips score,
    with the same; ``floor_n``, real clips in the candidate's place. KAD of one recording alone is NaN.
    """
    import pandas as pd

    if not candidates:
        raise ValueError("score_table: no candidates given")
    if unknown := sorted(set(metrics) - set(METRICS)):
        raise ValueError(f"unknown metrics {unknown}; known: {', '.join(METRICS)}")
    groups = groups or {}
    if unknown := sorted(groups.keys() - {"real", "floor", *candidates}):
        raise ValueError(f"groups of {unknown}: there are real, floor, {', '.join(candidates)}")
    reference = _matrix(reference, "reference")
    codes = _codes(len(reference), groups.get("real"), "reference")
    sets = {name: _pair(reference, y)[1] for name, y in candidates.items()}
    if floor is not None:
        floor = _pair(reference, floor, names=("reference", "floor"))[1]
        place = _codes(len(floor), groups.get("floor"), "floor")
        place = np.argsort(np.random.default_rng(seed).permutation(place.max() + 1))[place]
        order = np.argsort(place, kind="stable")
        floor = floor[order], place[order]
    rows = []
    for name in metrics:
        metric = METRICS[name]
        if name == "KAD" and codes.max() == 0:
            metric = _undefined  # of one recording no two rows are independent
        elif name == "KAD":
            bandwidth = _median_distance(reference - _centre(reference), codes)[0]
            metric = partial(kernel_distance, bandwidth=bandwidth)
        fixed = (name, metric, reference, codes, repeats, seed)
        floor_at = cache(partial(_floor, fixed, floor))
        for candidate, y in sets.items():
            scored = _score(*fixed, y, _codes(len(y), groups.get(candidate), candidate))
            below = floor_at(None if floor is None else min(len(y), len(floor[0])))
            note = "; ".join(filter(None, [scored[-1], f"floor: {below[-1]}"]))
            sizes = len(reference), len(y)
            labels = name, embedding, "real", candidate
            rows.append((*labels, *scored[:3], *sizes, *below[:4], note))
    return pd.DataFrame(rows, columns=SCORE_COLUMNS)


def _undefined(x, y):
    return np.nan


def _score(name, metric, x, x_codes, repeats, seed, y, y_codes):
    """Value, its interval, and a note."""
    low, high, note = np.nan, np.nan, ""
    # four fifths must still hold a row and its five neighbours, or several sizes for a line
    least = 4 if name in ("FAD", "KAD") else 8
    if min(x_codes.max(), y_codes.max()) + 1 < least:
        note = f"fewer than {least} recordings: no interval"
        return _measured(metric, x, y, x_codes, y_codes), low, high, note
    if name == "FAD-inf":
        line = fad_infinity(x, y, seed=seed, groups_x=x_codes, groups_y=y_codes)
        return line["value"], line["ci_low"], line["ci_high"], "" if line["trusted"] else _UNTRUSTED
    rng, value = np.random.default_rng(seed), _measured(metric, x, y, x_codes, y_codes)
    kept = ((_four_fifths(x_codes, rng), _four_fifths(y_codes, rng)) for _ in range(repeats))
    subsampled = [_measured(metric, x[a], y[b], x_codes[a], y_codes[b]) for a, b in kept]
    low, high = _interval(value, subsampled, (x_codes, y_codes))
    if name in _UPPER:
        low, high = np.clip([low, high], 0.0, _UPPER[name])
    return value, low, high, note


def _floor(fixed, real, size):
    """What real clips score in the candidate's place: `size` others, or halves of the reference."""
    name, metric, reference, codes, repeats, seed = fixed
    if real is not None:
        kept = _first(np.arange(len(real[0])), real[1], size)
        *scored, note = _score(*fixed, real[0][kept], real[1][kept])
        return *scored, size, "; ".join(filter(None, ["real clips outside the reference", note]))
    size, splits = _half_size(codes), max(10, repeats // 10)
    try:
        values = noise_floor(reference, size, splits, seed, metric=metric, groups=codes)
    except ValueError:
        return np.nan, np.nan, np.nan, 0, "too few recordings for two halves"
    note = f"disjoint halves of the reference, {splits} splits"
    if name == "FAD-inf" and size // 4 < reference.shape[1]:
        note = f"{note}; {_UNTRUSTED}"
    return values.mean(), *np.percentile(values, [2.5, 97.5]), size, note


def score_lines(scores):
    """Write a `score_table` as people read it: n, score and floor with intervals, three digits."""

    def texts(*columns):
        return [_with_interval(*row) for row in scores[list(columns)].to_numpy(dtype=float)]

    return scores[["embedding", "metric", "reference", "candidate"]].assign(
        n=scores["n_reference"].astype(str) + " / " + scores["n_candidate"].astype(str),
        score=texts("value", "ci_low", "ci_high"),
        floor=texts("floor", "floor_low", "floor_high"),
        floor_n=scores["floor_n"],
    )


def _with_interval(*numbers):
    value, low, high = (
        np.format_float_positional(v, precision=3, fractional=False, trim="-") for v in numbers
    )
    return value if low == "nan" else f"{value} [{low}, {high}]"


# --- the form of a challenge: every window is a row ----------------------------------------------


def stack_windows(windows):
    """Lay the windows [windows, d] of all clips below each other: rows, and the clip of each."""
    windows = [np.asarray(rows) for rows in windows]
    widths = {rows.shape[1:] for rows in windows}
    if len(widths) != 1 or any(rows.ndim != 2 or not len(rows) for rows in windows):
        raise ValueError(
            f"{len(windows)} clips: expected arrays of shape (windows, dim) with one dim, got "
            f"{sorted({rows.shape for rows in windows})[:3]}"
        )
    return np.concatenate(windows), np.repeat(np.arange(len(windows)), [len(r) for r in windows])


def challenge_scores(published, candidates, networks, *, repeats=200, seed=0):
    """Score clips in the form of DCASE 2024 Task 7: FAD and KAD against its published embeddings.

    `published` [clips, windows, d] and `networks` by network, `candidates` (clips of 4 s) by model.
    Every window is a row, as there; intervals and floors draw whole clips. The challenge's evaluation
    set is not public: these are not the scores of its table (Lagrange et al., arXiv 2501.08587).
    """
    import pandas as pd

    missing = set(networks) - set(published)
    if missing:
        raise ValueError(f"no published embeddings of {sorted(missing)}; there are: {[*published]}")
    tables = []
    for network, embedding in networks.items():
        reference, clips = stack_windows(published[network])
        rows, groups = {}, {"real": clips}
        for model, sounds in candidates.items():
            rows[model], groups[model] = stack_windows(embedding.embed_windows(sounds))
        options = {"groups": groups, "repeats": repeats, "seed": seed}
        tables.append(score_table(reference, rows, embedding=network, **options))
    return pd.concat(tables, ignore_index=True).assign(reference="development set")
