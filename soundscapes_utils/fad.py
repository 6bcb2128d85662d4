"""Distances between sets of embeddings, on plain arrays, each with its interval and its floor.

Throughout, `x` is the reference (real recordings), `y` the candidate, one row a clip; everything is
computed in float64 unless a call asks otherwise. Where several rows stem from one recording, hand
over `groups` (one label a row): then recordings, not rows, are drawn, so that near-duplicates never
face each other and the floor is not flattered.
"""

from functools import partial, reduce
from typing import NamedTuple

import numpy as np

_BLOCK = 512  # rows and columns of a distance matrix computed at once
_HELD_ROWS = 6000  # up to here the distances within the reference are kept: 160 MB at most
_SAMPLE_ROWS = 1024  # least number of rows whose distances tell where the median lies
_EPS = np.finfo(np.float64).eps
_TOLERANCE = 1e-8  # relative error of a FAD beyond which the slower, exact root is taken
_LARGEST = 1e150  # whose square still is a float64
_KEPT = 0.8  # share of the recordings in a subsample for an interval
_UNTRUSTED = "extrapolated from fewer clips than dimensions: biased"


def _matrix(x, name, least=2):
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{name}: expected an array of shape (clips, dim), got {x.shape}")
    if len(x) < least:
        raise ValueError(f"{name}: needs at least {least} rows (clips), got {len(x)}")
    if not _peak(x) <= _LARGEST:
        finite = np.isfinite(x).all(axis=1)
        if finite.all():
            raise ValueError(f"{name}: values beyond {_LARGEST} cannot be squared; scale them down")
        rows = np.flatnonzero(~finite)
        raise ValueError(
            f"{name}: {len(rows)} of {len(x)} rows hold NaN or infinite values (first: row "
            f"{rows[0]}); embed those clips again or leave them out"
        )
    return x


def _peak(x):
    """Largest magnitude; NaN where there is one."""
    return np.maximum(x.max(), -x.min())


def _same_width(x_width, y_width, names=("reference", "candidate")):
    if x_width != y_width:
        raise ValueError(
            f"{names[0]} has {x_width} dimensions, {names[1]} {y_width}: embed both with the "
            "same network"
        )


def _pair(x, y, least=2, names=("reference", "candidate")):
    x, y = (_matrix(rows, name, least) for rows, name in zip((x, y), names, strict=True))
    _same_width(x.shape[1], y.shape[1], names)
    return x, y


# --- Gaussians fitted to a set --------------------------------------------------------------------


class Statistics(NamedTuple):
    """Mean and covariance of a set of embeddings: all that a Fréchet distance needs of it.

    Parameters
    ----------
    mean : np.ndarray of float64, shape (d,)
        Mean embedding.
    cov : np.ndarray of float64, shape (d, d)
        Unbiased covariance (over n − 1); zero where n is 1.
    n : int
        Number of rows.

    Notes
    -----
    ``np.savez(path, **found._asdict())`` writes one, ``Statistics(**np.load(path))`` reads it.

    Examples
    --------
    >>> statistics([[0.0, 1.0], [2.0, 1.0]])
    Statistics(mean=array([1., 1.]), cov=array([[2., 0.],
           [0., 0.]]), n=2)
    """

    mean: np.ndarray
    cov: np.ndarray
    n: int


def statistics(x):
    """Mean, covariance and size of a set or of one shard of it.

    Parameters
    ----------
    x : array_like, shape (n, d)
        Embeddings, one row a clip; one row is enough, so that `merge` takes shards of any size.

    Returns
    -------
    Statistics
        In float64, for `merge` and `frechet_distance`.

    Raises
    ------
    ValueError
        No row or values that are not finite.

    Examples
    --------
    >>> found = statistics(np.random.default_rng(0).normal(size=(50, 3)))
    >>> found.cov.shape, found.n
    ((3, 3), 50)
    """
    x = _matrix(x, "statistics", least=1)
    mean = x.mean(axis=0)
    rows = x - mean
    return Statistics(mean, rows.T @ rows / max(len(x) - 1, 1), len(x))


def merge(*shards):
    """Statistics of a set from those of its disjoint shards, without its rows.

    Parameters
    ----------
    *shards : Statistics
        One or more, of any sizes; the same d.

    Returns
    -------
    Statistics
        Those of all rows together, up to rounding.

    Raises
    ------
    ValueError
        No shard, a shape, size or value that cannot be one's, different d.

    Notes
    -----
    Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances" (1979): exact, and free of the cancellation that sums of squares suffer.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(5.0, 1.0, size=(50, 3))
    >>> found = merge(statistics(x[:1]), statistics(x[1:20]), statistics(x[20:]))
    >>> found.n, bool(np.allclose(found.cov, np.cov(x.T), rtol=1e-12))
    (50, True)
    """
    if not shards:
        raise ValueError("merge: no shards given")
    return reduce(_merge_two, (_checked(s, f"shard {i}", 1) for i, s in enumerate(shards)))


def _merge_two(a, b):
    _same_width(len(a.mean), len(b.mean), ("one shard", "another"))
    n = a.n + b.n
    shift = b.mean - a.mean
    scatter = (a.n - 1) * a.cov + (b.n - 1) * b.cov + np.outer(shift, shift) * (a.n * b.n / n)
    return Statistics(a.mean + shift * (b.n / n), scatter / (n - 1), n)


def _checked(x, name, least=2):
    if not isinstance(x, Statistics):
        return _matrix(x, name, least)
    mean, cov = (np.asarray(part, dtype=np.float64) for part in x[:2])
    n = int(x.n)
    if mean.ndim != 1 or not len(mean) or cov.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{name}: expected a mean of shape (d,) and a covariance of (d, d), got "
            f"{mean.shape} and {cov.shape}"
        )
    if n < least:
        raise ValueError(f"{name}: needs at least {least} rows (clips), got statistics of {n}")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError(f"{name}: the statistics hold NaN or infinite values; compute them again")
    if np.abs(cov - cov.T).max() > 1e-8 * np.abs(cov).max():
        raise ValueError(f"{name}: the covariance is not symmetric; compute it again")
    return Statistics(mean, cov, n)


def as_points(windows):
    """Lay the windows of all clips below each other, and say whose each is.

    Several networks give a row for every window of a clip, and challenges score all of them as one
    set. Their clips belong into `groups`: windows of one clip are near-copies of each other.

    Parameters
    ----------
    windows : sequence of array_like, shape (windows, d)
        One array a clip, from `Embedding.embed_windows` or `datasets.load_dcase2024_task7`.

    Returns
    -------
    points : np.ndarray, shape (all windows, d)
        In the order of the clips.
    groups : np.ndarray of int, shape (all windows,)
        Place of every row's clip.

    Raises
    ------
    ValueError
        No clip, a clip without windows, or different d.

    Examples
    --------
    >>> points, groups = as_points([np.zeros((4, 2)), np.ones((1, 2))])
    >>> points.shape, groups.tolist()
    ((5, 2), [0, 0, 0, 0, 1])
    """
    windows = [np.asarray(rows) for rows in windows]
    shapes = {rows.shape[1:] for rows in windows}
    if len(shapes) != 1 or any(rows.ndim != 2 or not len(rows) for rows in windows):
        raise ValueError(
            f"{len(windows)} clips: expected arrays of shape (windows, dim) with one dim, got "
            f"{sorted({rows.shape for rows in windows})[:3]}"
        )
    return np.concatenate(windows), np.repeat(np.arange(len(windows)), [len(r) for r in windows])


# --- distances -----------------------------------------------------------------------------------


def frechet_distance(x, y):
    """Fréchet distance of the Gaussians fitted to two sets (FAD where the rows embed audio).

    ``|m_x − m_y|² + tr C_x + tr C_y − 2 tr (C_x C_y)^½`` with unbiased covariances. The eigenvalues
    of C_x C_y are those of a symmetric matrix, n × n where a set has no more rows than dimensions
    (then no d × d matrix is formed) and d × d otherwise; a bound of their rounding error goes with
    them. Where that could be seen in the result (singular or ill-scaled covariances), the trace is
    taken from the singular values of ``F_x F_yᵀ`` with ``C = Fᵀ F`` instead, which never squares
    what it needs. So the result is real, not negative and finite at every n, and the same to the
    last bit with `x` and `y` exchanged.

    Parameters
    ----------
    x, y : array_like, shape (n_x, d) and (n_y, d), or Statistics
        Embeddings, one row a clip, or what `statistics` and `merge` made of them.

    Returns
    -------
    float
        In squared units of the embedding. Biased upwards by about tr(C)·(1/n_x + 1/n_y) or more:
        compare only with scores of the same n, and see `noise_floor` and `fad_infinity`.

    Raises
    ------
    ValueError
        Fewer than two rows, values that are not finite, different d; of statistics, shapes that do
        not fit or a covariance that is not symmetric and positive semi-definite.

    Notes
    -----
    Kilgour et al., "Fréchet Audio Distance", Interspeech 2019; Dowson and Landau 1982.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(50, 8))
    >>> round(frechet_distance(x, x + 2.0), 6)  # a shift of 2 in each of 8 dimensions
    32.0
    """
    a, b = _sides(x, y)
    shift = a.mean - b.mean
    apart = shift @ shift + a.total + b.total
    return a.unit**2 * max(0.0, float(apart - 2.0 * _root_trace(a, b, apart)))


class _Side(NamedTuple):
    """A set in units of `unit`; its covariance is ``rows.T @ rows`` or, without rows, `cov`."""

    name: str
    unit: float
    n: int
    mean: np.ndarray
    rows: np.ndarray | None
    cov: np.ndarray | None

    @property
    def total(self):
        """Trace of the covariance."""
        return np.trace(self.cov) if self.rows is None else np.vdot(self.rows, self.rows)


def _sides(x, y):
    """Both sets, the one with fewer rows first."""
    sets = {"reference": _checked(x, "reference"), "candidate": _checked(y, "candidate")}
    _same_width(
        *(v.cov.shape[1] if isinstance(v, Statistics) else v.shape[1] for v in sets.values())
    )
    largest = max(
        max(_peak(v.mean), np.sqrt(_peak(v.cov))) if isinstance(v, Statistics) else _peak(v)
        for v in sets.values()
    )
    # a power of two: squares neither overflow nor vanish, and no digit changes
    unit = 2.0 ** int(np.frexp(largest)[1])
    return sorted(
        (_side(value, name, unit) for name, value in sets.items()),
        key=lambda side: (side.n, side.total),
    )


def _side(x, name, unit):
    if not isinstance(x, Statistics):
        mean = x.mean(axis=0)
        rows = x - mean
        rows /= unit * np.sqrt(len(x) - 1)
        return _Side(name, unit, len(x), mean / unit, rows, None)
    side = _Side(name, unit, x.n, x.mean / unit, None, x.cov / unit / unit)
    # of fewer rows than dimensions the covariance is singular: only a factor of it serves
    return side._replace(rows=_factor(side), cov=None) if x.n <= len(x.mean) else side


def _root_trace(a, b, apart):
    """Trace of (C_a C_b)^½; `a` has fewer rows."""
    total, error = _quick_root_trace(a, b)
    if 2.0 * error <= _TOLERANCE * (apart - 2.0 * total):
        return total
    return np.linalg.svd(_factor(a) @ _factor(b).T, compute_uv=False).sum()


def _quick_root_trace(a, b):
    """Trace of the root by symmetric eigenvalues, and a bound of its rounding error."""
    from scipy.linalg import lapack

    if a.n > len(a.mean):
        cov_a, cov_b = _covariance(a), _covariance(b)
        # C_a C_b shares its eigenvalues with Lᵀ C_a L where C_b = L Lᵀ; the two LAPACK calls take
        # three fifths of the time of scipy's generalised eigvalsh
        lower, singular = lapack.dpotrf(cov_b.T, lower=1)
        if singular:
            return 0.0, np.inf
        found = np.linalg.eigvalsh(lapack.dsygst(cov_a.T, lower, itype=2, lower=1)[0])
        size = np.linalg.norm(cov_a) * np.linalg.norm(cov_b)
    else:
        if b.rows is None:
            product = a.rows @ b.cov @ a.rows.T
        else:
            product = a.rows @ b.rows.T
            product = product @ product.T
        found = np.linalg.eigvalsh(product)
        size = np.linalg.norm(product) if b.rows is not None else a.total * np.linalg.norm(b.cov)
    noise = 16.0 * _EPS * size
    if found[0] < -noise:
        return 0.0, np.inf
    roots = np.sqrt(np.maximum(found, 0.0))
    # |√λ − √μ| ≤ |λ − μ|/√λ, and ≤ √|λ − μ| where λ is lost in the noise
    return roots.sum(), np.minimum(np.sqrt(noise), noise / np.maximum(roots, 1e-300)).sum()


def _covariance(side):
    return side.rows.T @ side.rows if side.cov is None else side.cov


def _factor(side):
    """Matrix of at most d rows whose product with itself is the covariance."""
    d = len(side.mean)
    if side.rows is not None:
        return side.rows if len(side.rows) <= d else np.linalg.qr(side.rows, mode="r")
    values, vectors = np.linalg.eigh(side.cov)
    if values[0] < -1e-8 * max(values[-1], 0.0):
        raise ValueError(
            f"{side.name}: the covariance has negative eigenvalues (least: "
            f"{values[0] * side.unit**2:.3g}); compute it again, in float64"
        )
    rank = min(side.n - 1, d)
    return (vectors[:, -rank:] * np.sqrt(np.maximum(values[-rank:], 0.0))).T


def clip_contributions(x, y, groups=None):
    """How much each candidate clip adds to the Fréchet distance: exact leave-one-out.

    Parameters
    ----------
    x, y : array_like, shape (n_x, d) and (n_y, d)
        Embeddings, `x` the reference; at least three rows of `y`.
    groups : array_like, shape (n_y,), optional
        Clip of every row of `y`: all rows of a clip are left out together.

    Returns
    -------
    pandas.DataFrame
        One row a clip, largest contribution first: ``clip`` (row number of `y`, or its label);
        ``rows``, how many it has; ``without``, the distance of the set without it;
        ``contribution``, the whole set's distance less that. Positive: the set is nearer to the
        reference without it. Fewer clips mean more bias, so the typical clip is slightly negative:
        compare clips with each other.

    Raises
    ------
    ValueError
        As `frechet_distance`; fewer than three rows of `y`, or fewer than two beside a clip's.

    Notes
    -----
    The peers' "individual" FAD compares a clip's own frames with the reference: it needs many
    frames a clip, grows as they get fewer, and does not add to the set's score. Leaving a clip out
    asks what that score would be. One row less is a rank-one change of ``P = C_x^½ C_y C_x^½``, so
    the change of the root's trace is ``1/π ∫ log det((P' + s²)/(P + s²)) ds`` over s > 0, one sum
    over the eigenvalues for each node of the quadrature: all clips cost about as much as one
    distance. The trapezoid rule in log s is exact to rounding here. With `groups` the distance is
    computed anew for each clip.

    Examples
    --------
    >>> y = np.random.default_rng(0).normal(size=(40, 3))
    >>> y[7] += 10.0
    >>> int(clip_contributions(np.random.default_rng(1).normal(size=(40, 3)), y)["clip"][0])
    7
    """
    import pandas as pd

    x, y = _pair(x, y)
    if len(y) < 3:
        raise ValueError(f"candidate: leaving one out needs at least 3 rows, got {len(y)}")
    whole = frechet_distance(x, y)
    if groups is None:
        clips, counts, without = np.arange(len(y)), 1, _without_each_row(x, y)
    else:
        codes = _codes(len(y), groups, "candidate")
        clips, counts = np.unique(np.asarray(groups), return_counts=True)
        without = [frechet_distance(x, y[codes != code]) for code in range(len(clips))]
    found = pd.DataFrame({"clip": clips, "rows": counts, "without": without})
    found["contribution"] = whole - found["without"]
    return found.sort_values("contribution", ascending=False, kind="stable", ignore_index=True)


def _without_each_row(x, y):
    unit = 2.0 ** int(np.frexp(max(_peak(x), _peak(y)))[1])
    a, b = _side(x, "reference", unit), _side(y, "candidate", unit)
    n = b.n
    values, right = np.linalg.svd(_factor(a) @ b.rows.T, full_matrices=False)[1:]
    grown = (n - 1) / (n - 2)
    shift, norms = a.mean - b.mean, (b.rows**2).sum(axis=1)
    shifts = shift @ shift + 2.0 * (b.rows @ shift) / np.sqrt(n - 1) + norms / (n - 1)
    totals = grown * (b.total - n / (n - 1) * norms)
    roots = np.sqrt(grown) * (values.sum() + _root_changes(values, right, n))
    return unit**2 * np.maximum(shifts + a.total + totals - 2.0 * roots, 0.0)


def _root_changes(values, right, n):
    """Change of the root's trace as each row leaves, before the covariance is divided by n − 2."""
    if values[0] == 0.0:
        return np.zeros(right.shape[1])
    step = 0.25
    nodes = values[0] ** 2 * np.exp(2.0 * np.arange(np.log(1e-17), np.log(1e14), step))
    kept = values > 1e-13 * values[0]
    squares = values[kept, None] ** 2
    weights = n / (n - 1) * (right[kept] ** 2).T
    lost = weights @ (squares / (squares + nodes))
    # the determinants' ratio is 1 − lost; where a row's leaving lowers the rank it goes to 0 with s,
    # so there it is summed from positive terms
    beyond = 1.0 - weights.sum(axis=1, keepdims=True)
    stays = np.where(beyond > 1e-14, beyond, 0.0) + weights @ (nodes / (squares + nodes))
    logs = np.where(lost < 0.5, np.log1p(-np.minimum(lost, 0.5)), np.log(stays))
    return logs @ np.sqrt(nodes) * (step / np.pi)


# --- distances of pairs of rows -------------------------------------------------------------------


def _centre(x):
    # near most rows, so that the expanded square does not cancel; one far row does not move it
    return np.median(x[np.linspace(0, len(x) - 1, min(len(x), 256)).astype(int)], axis=0)


def _augmented(x, centre, dtype=np.float64):
    """Rows [x − c, 1, |x − c|²]: one product with `_turned` rows gives squared distances."""
    rows = np.empty((len(x), x.shape[1] + 2), dtype)
    centred = rows[:, :-2]
    np.subtract(x, centre, out=centred, casting="same_kind")
    rows[:, -2] = 1.0
    rows[:, -1] = np.einsum("ij,ij->i", centred, centred, dtype=np.float64, casting="same_kind")
    return rows


def _turned(rows):
    turned = -2.0 * rows
    turned[:, -2] = rows[:, -1]
    turned[:, -1] = 1.0
    return turned


def _squared_distances(a, b):
    """Squared distances of a block of `a` to all of `b`, block after block, with its first row."""
    centre = _centre(b)
    right = _augmented(b, centre)
    for start in range(0, len(a), _BLOCK):
        squares = _turned(_augmented(a[start : start + _BLOCK], centre)) @ right.T
        yield start, np.maximum(squares, 0.0, out=squares)


def _tiles(a, b=None):
    """Squared distances between augmented rows, tile by tile; of one set only i ≤ j.

    Yields how often a tile counts in the whole matrix (1, or 2 with its mirror image) and the tile.
    """
    right = a if b is None else b
    for i in range(0, len(a), _BLOCK):
        left = _turned(a[i : i + _BLOCK])
        for j in range(i if b is None else 0, len(right), _BLOCK):
            tile = left @ right[j : j + _BLOCK].T
            yield 2 if b is None and i < j else 1, np.maximum(tile, 0.0, out=tile)


def median_distance(x):
    """Median Euclidean distance between the rows of a set: the bandwidth of `kernel_distance`.

    Parameters
    ----------
    x : array_like, shape (n, d)
        Embeddings.

    Returns
    -------
    float
        In units of the embedding; 0 where most rows are equal.

    Raises
    ------
    ValueError
        Fewer than two rows or values that are not finite.

    Notes
    -----
    Exact at every n without holding all distances: a sample of rows tells between which two values
    the median lies, and only distances between them are kept.

    Examples
    --------
    >>> median_distance([[0.0], [1.0], [3.0]])
    2.0
    """
    x = _matrix(x, "reference")
    rows = _augmented(x, _centre(x))
    return _median_distance(rows, partial(_tiles, rows))


def _median_distance(rows, tiles):
    """Median from augmented rows; `tiles` gives their tiles, anew at each call."""
    size = max(_SAMPLE_ROWS, len(rows) // 8)
    margin = 0.5
    if len(rows) > size:
        sample = rows[np.linspace(0, len(rows) - 1, size).astype(int)]
        sample = np.concatenate([_upper(*found) for found in _tiles(sample)])
        margin = 1.6 / np.sqrt(size)
    pairs = len(rows) * (len(rows) - 1) // 2
    while True:
        ends = (0.0, np.inf)
        if margin < 0.5:
            ends = np.quantile(sample, [0.5 - margin, 0.5 + margin])
        below, between = 0, []
        for found in tiles():
            squares = _upper(*found)
            below += np.count_nonzero(squares < ends[0])
            between.append(squares[(squares >= ends[0]) & (squares <= ends[1])])
        between = np.concatenate(between)
        middle = [(pairs - 1) // 2 - below, pairs // 2 - below]
        if middle[0] >= 0 and middle[1] < len(between):
            break
        margin *= 2.0
    squares = np.partition(between, middle)[middle].astype(np.float64)
    # equal rows are at 0 only up to the rounding of their expanded square
    if squares[1] <= 500.0 * np.finfo(rows.dtype).eps * np.median(rows[:, -1]):
        return 0.0
    return float(np.sqrt(squares).mean())


def _upper(count, tile):
    """Distances of a tile, each pair once."""
    return tile.ravel() if count == 2 else tile[~np.tri(len(tile), dtype=bool)]


def kernel_distance(x, y, bandwidth=None, dtype=np.float64):
    """Kernel audio distance (KAD): 100 × the unbiased squared MMD under a Gaussian kernel.

    Parameters
    ----------
    x, y : array_like, shape (n_x, d) and (n_y, d)
        Embeddings, `x` the reference.
    bandwidth : float, optional
        σ in ``exp(−|a − b|²/(2σ²))``; by default the median distance within `x`. Candidates that
        are to be compared must share it.
    dtype : {numpy.float64, numpy.float32}, default float64
        Of the distances; sums are in float64. For thousands of rows float32 takes about half the
        time. It errs by some 10⁻⁶, and by more where outliers lie hundreds of bandwidths away.

    Returns
    -------
    float
        Dimensionless, at most 200. Its expectation at equal distributions is 0 at every n, so it
        *can be negative*: that means "no difference seen at this n", never "better than real".

    Raises
    ------
    ValueError
        As `frechet_distance`; a bandwidth that is not positive, or a reference whose rows are
        mostly equal, so that it has none; another dtype, or values too large for float32.

    Notes
    -----
    Chung et al., "KAD: No More FAD!", arXiv 2502.15602: median over the *reference*. Distances
    are computed in tiles of 512 × 512, each pair within a set once; beside the rows only those
    within a reference of up to 6,000 rows are kept, between the search for their median and the
    sum over their kernel.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x, near, far = rng.normal(size=(3, 200, 4)) + np.array([0, 0, 3])[:, None, None]
    >>> abs(kernel_distance(x, near)) < 1.5 < kernel_distance(x, far)
    True
    """
    x, y = _pair(x, y)
    dtype = np.dtype(dtype)
    if dtype not in (np.float64, np.float32):
        raise ValueError(f"dtype must be float64 or float32, got {dtype}")
    if dtype == np.float32 and max(_peak(x), _peak(y)) > 1e15:
        raise ValueError("values beyond 1e15 cannot be squared in float32; take float64")
    centre = _centre(x)
    rows = _augmented(x, centre, dtype)
    sigma, within_x = _within_reference(rows, bandwidth)
    others = _augmented(y, centre, dtype)
    within_y = _kernel_sum(_tiles(others), sigma)
    between = _kernel_sum(_tiles(rows, others), sigma)
    n, m = len(x), len(y)
    # each row's kernel with itself is 1 and must not count in the unbiased estimate
    within = (within_x - n) / (n * (n - 1)) + (within_y - m) / (m * (m - 1))
    return 100.0 * (within - 2.0 * between / (n * m))


def _within_reference(rows, bandwidth):
    """Bandwidth, and the sum of the kernel over all pairs of the reference."""
    tiles = partial(_tiles, rows)
    if bandwidth is None and len(rows) <= _HELD_ROWS:
        held = list(tiles())
        tiles = partial(iter, held)
    sigma = _median_distance(rows, tiles) if bandwidth is None else float(bandwidth)
    if not (np.isfinite(sigma) and sigma > 0):
        raise ValueError(
            f"kernel bandwidth must be positive, got {sigma}; where most rows of the "
            "reference are equal, give one by hand"
        )
    return sigma, _kernel_sum(tiles(), sigma)


def _kernel_sum(tiles, sigma):
    total = 0.0
    for count, tile in tiles:
        tile /= -2.0 * sigma**2
        total += count * float(np.exp(tile, out=tile).sum(dtype=np.float64))
    return total


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


def _nearest(a, b):
    """Row of `b` nearest to each row of `a`, and its distance."""
    nearest = np.concatenate([block.argmin(axis=1) for _, block in _squared_distances(a, b)])
    # the expanded square of a near-copy is mostly rounding
    return nearest, np.linalg.norm(a - b[nearest], axis=1)


def memorisation(train, test, generated, share=0.05):
    """Do generated clips lie nearer to the training clips than unseen real clips do?

    Parameters
    ----------
    train, test, generated : array_like, shape (n_i, d)
        Embeddings of what the generator was trained on, of real clips it never saw (no recording
        in common with `train`), and of its output.
    share : float, default 0.05
        Between 0 and 1: a generated clip is flagged where it is nearer to its training clip than
        this share of the test clips are to theirs.

    Returns
    -------
    dict
        ``nearer``, probability that a generated clip is nearer than a test clip (½: no copying
        seen; 1: every one is); ``p_value`` of that, one-sided; ``flagged``, share of generated
        clips below ``threshold`` (without copying about `share`); ``n_train``, ``n_test``,
        ``n_generated``; ``clips``, a table of ``row``, ``nearest`` (row of `train`), ``distance``
        and ``flagged``, the nearest first: listen to those.

    Raises
    ------
    ValueError
        As `frechet_distance`, or a share outside (0, 1).

    Notes
    -----
    The rank test of Meehan, Chaudhuri and Dasgupta, "A Non-Parametric Test to Detect Data-Copying
    in Generative Models", AISTATS 2020, over the whole space. A generator of low diversity that
    sits where training clips are dense is seen as near too, without a copy: see `vendi_score`.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> train, test = rng.normal(size=(2, 100, 8))
    >>> memorisation(train, test, train[:20] + 0.01)["nearer"]
    1.0
    """
    import pandas as pd
    from scipy.stats import mannwhitneyu

    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, got {share}")
    train, test = _pair(train, test, names=("training set", "test set"))
    generated = _pair(train, generated, names=("training set", "generated set"))[1]
    expected = _nearest(test, train)[1]
    nearest, distance = _nearest(generated, train)
    ranks = mannwhitneyu(distance, expected, alternative="less")
    threshold = float(np.quantile(expected, share))
    clips = pd.DataFrame(
        {"row": np.arange(len(generated)), "nearest": nearest, "distance": distance}
    ).assign(flagged=distance < threshold)
    return {
        "nearer": float(1.0 - ranks.statistic / (len(generated) * len(test))),
        "p_value": float(ranks.pvalue),
        "flagged": float(clips["flagged"].mean()),
        "threshold": threshold,
        "n_train": len(train),
        "n_test": len(test),
        "n_generated": len(generated),
        "clips": clips.sort_values("distance", kind="stable", ignore_index=True),
    }


# --- scores of pairs of clips, and of one set -----------------------------------------------------


def clap_score(text, audio):
    """CLAP score: cosine between each clip's audio embedding and that of its prompt.

    Parameters
    ----------
    text, audio : array_like, shape (n, d)
        Embeddings by the two towers of one CLAP, row i of both for clip i.

    Returns
    -------
    dict
        ``value``, the mean cosine, between −1 and 1; ``ci_low`` and ``ci_high``, 95 % over clips;
        ``n``; ``mismatched``, the mean over every clip with every *other* clip's prompt, so what a
        clip scores that ignores its prompt; ``per_clip``, the n cosines.

    Raises
    ------
    ValueError
        As `frechet_distance`, numbers of rows that differ, or a row of zeros.

    Notes
    -----
    Wu et al. (LAION-CLAP), arXiv 2211.06687; the score as in Huang et al. (Make-An-Audio), arXiv
    2301.12661. A generator that picks its best of several clips by the same CLAP scores itself.

    Examples
    --------
    >>> found = clap_score(np.eye(3), np.eye(3))
    >>> found["value"], found["mismatched"]
    (1.0, 0.0)
    """
    names = ("text", "audio")
    text, audio = _pair(text, audio, names=names)
    _same_length(text, audio, names)
    text, audio = _directions(text, "text"), _directions(audio, "audio")
    cosines = np.einsum("ij,ij->i", text, audio)
    return _paired_score(cosines, text.sum(axis=0) @ audio.sum(axis=0))


def _same_length(x, y, names):
    if len(x) != len(y):
        raise ValueError(
            f"{names[0]} has {len(x)} rows, {names[1]} {len(y)}: row i of both must be of one clip"
        )


def _directions(x, name):
    # dividing by the largest value first keeps the norm of tiny rows from vanishing
    peaks = np.abs(x).max(axis=1, keepdims=True)
    if not peaks.all():
        raise ValueError(f"{name}: row {int(peaks.argmin())} is all zeros and has no direction")
    x = x / peaks
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _paired_score(values, sum_over_all_pairs):
    from soundscapes_utils.stats import bootstrap_ci

    n = len(values)
    low, high = bootstrap_ci(values)
    return {
        "value": float(values.mean()),
        "ci_low": low,
        "ci_high": high,
        "n": n,
        "mismatched": float((sum_over_all_pairs - values.sum()) / (n * (n - 1))),
        "per_clip": values,
    }


def _probabilities(p, name, multilabel):
    p = _matrix(p, name)
    if p.min() < 0 or p.max() > 1 + 1e-6:
        raise ValueError(f"{name}: probabilities lie between 0 and 1, got {p.min()} to {p.max()}")
    if multilabel:
        # every class is a question of its own, with the answers yes and no
        return np.stack([np.minimum(p, 1.0), 1.0 - np.minimum(p, 1.0)], axis=2)
    sums = p.sum(axis=1, keepdims=True)
    if np.abs(sums - 1.0).max() > 1e-3:
        raise ValueError(
            f"{name}: rows sum to {sums.min():.3g} to {sums.max():.3g}, not 1; give the softmax "
            "of one label a clip, or multilabel=True for independent (sigmoid) scores"
        )
    return (p / sums)[:, None, :]


def tagger_divergence(x, y, multilabel=False):
    """KL divergence of a tagger's view of each real clip from its view of the generated one.

    Parameters
    ----------
    x, y : array_like, shape (n, classes)
        Probabilities by one tagger (PANNs, YAMNet …), between 0 and 1; row i of `x` is the real
        clip and row i of `y` the one generated for the same prompt.
    multilabel : bool, default False
        False: each row is one distribution over classes (softmax; sums to 1). True: each class is
        present or not, by itself (sigmoid); then the divergences of all classes are added.

    Returns
    -------
    dict
        ``value``, the mean of KL(x_i ‖ y_i) in nats, not negative; ``ci_low`` and ``ci_high``, 95 %
        over clips; ``n``; ``mismatched``, the mean over every real clip with every *other*
        generated clip, so what ignoring the prompts gives; ``per_clip``.

    Raises
    ------
    ValueError
        As `frechet_distance`, numbers of rows that differ, values that are no probabilities.

    Notes
    -----
    As audioldm_eval's paired KL (softmax or sigmoid); Iashin and Rahtu, arXiv 2110.08791 ("MKL").
    10⁻⁶ is added to every probability, which are then scaled to sum to 1 again: no answer is
    impossible, so the divergence is finite.

    Examples
    --------
    >>> p = [[0.9, 0.1], [0.2, 0.8]]
    >>> tagger_divergence(p, p)["value"]
    0.0
    """
    names = ("reference", "candidate")
    _same_length(*_pair(x, y, names=names), names)
    x, y = (
        _smoothed(_probabilities(p, name, multilabel))
        for p, name in zip((x, y), names, strict=True)
    )
    logs = np.log(y)
    own = (x * np.log(x)).sum(axis=(1, 2))
    divergences = (x * (np.log(x) - logs)).sum(axis=(1, 2))
    over_all_pairs = len(x) * own.sum() - np.vdot(x.sum(axis=0), logs.sum(axis=0))
    return _paired_score(divergences, over_all_pairs)


def _smoothed(p):
    return (p + 1e-6) / (1.0 + 1e-6 * p.shape[-1])


def inception_score(p, multilabel=False):
    """Inception score on a tagger's probabilities: clear clips of many classes score high.

    Parameters
    ----------
    p : array_like, shape (n, classes)
        Probabilities by one tagger, between 0 and 1, one row a clip.
    multilabel : bool, default False
        As in `tagger_divergence`.

    Returns
    -------
    float
        ``exp`` of the mean KL of a clip's probabilities from the set's mean: between 1 (all clips
        alike) and the number of classes (2 to its power if `multilabel`), never above n. It knows
        no reference: score the real set too, at the same n; `bootstrap_score` gives the interval.

    Raises
    ------
    ValueError
        Fewer than two rows or values that are no probabilities.

    Notes
    -----
    Salimans et al., arXiv 1606.03498, over one split. It grows with n, and sees neither copies
    within a class nor sounds that the tagger does not know.

    Examples
    --------
    >>> round(inception_score(np.eye(4)), 6)
    4.0
    """
    from scipy.special import rel_entr

    p = _probabilities(p, "candidate", multilabel)
    return float(np.exp(rel_entr(p, p.mean(axis=0)).sum(axis=(1, 2)).mean()))


def vendi_score(y, bandwidth=None):
    """Vendi score: the effective number of different clips in a set.

    Parameters
    ----------
    y : array_like, shape (n, d)
        Embeddings.
    bandwidth : float, optional
        σ of a Gaussian kernel, such as `median_distance` of the reference; by default two clips
        are as similar as the cosine of their embeddings.

    Returns
    -------
    float
        Between 1 (all clips alike) and n (no two alike). It knows no reference, and noise is
        diverse: score the real set too, at the same n; `bootstrap_score` gives the interval.

    Raises
    ------
    ValueError
        Fewer than two rows, values that are not finite, a bandwidth that is not positive; without
        bandwidth, a row of zeros.

    Notes
    -----
    Friedman and Dieng, "The Vendi Score", arXiv 2210.02410: ``exp(−Σ λ log λ)`` over the
    eigenvalues of K/n. By the cosine they are taken from the smaller of K and the d × d matrix
    that shares them; a Gaussian kernel needs n × n numbers.

    Examples
    --------
    >>> round(vendi_score([[1.0, 0], [1, 0], [0, 1], [0, 1]]), 6)  # two kinds of clip
    2.0
    """
    from scipy.special import entr

    y = _matrix(y, "candidate")
    if bandwidth is None:
        rows = _directions(y, "candidate")
        kernel = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    elif not 0 < bandwidth < np.inf:
        raise ValueError(f"kernel bandwidth must be positive, got {bandwidth}")
    else:
        blocks = [block for _, block in _squared_distances(y, y)]
        kernel = np.exp(np.concatenate(blocks) / (-2.0 * bandwidth**2))
    shares = np.maximum(np.linalg.eigvalsh(kernel / len(y)), 0.0)
    return float(np.exp(entr(shares / shares.sum()).sum()))


# --- metrics by name -------------------------------------------------------------------------------


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
    return np.prod(ratios) ** (0.5 / len(ratios))


def _resampled(codes, rng):
    """Rows of as many recordings as there are, drawn with replacement."""
    n = codes.max() + 1
    times = np.bincount(rng.integers(0, n, n), minlength=n)
    return np.repeat(np.arange(len(codes)), times[codes])


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
    method="subset",
):
    """Distance with an interval from subsamples or resamples.

    By default each repeat keeps random four fifths of both sets and repeats nothing; the spread of
    the repeats, widened by √(k/(n − k)) = 2 as a mean of k out of n rows demands, is put round the
    value (a delete-d jackknife). Centring on the repeats' own mean takes out the bias of their
    smaller n. The ordinary bootstrap repeats rows, which shrinks covariances and lifts a FAD far
    above the value that it should surround, by an amount that varies with the draw; it is centred
    in the same way, and trustworthy only with many more clips than dimensions.

    Parameters
    ----------
    x, y : array_like, shape (n_x, d) and (n_y, d)
        Embeddings, `x` the reference.
    metric : callable, default frechet_distance
        Maps (x, y) to a number.
    groups_x, groups_y : array_like, optional
        Recording of every row; what is drawn are then recordings.
    repeats : int, default 200
        Number of subsamples or resamples.
    confidence : float, default 0.95
        Between 0 and 1.
    seed : int, default 0
        The same seed gives the same interval.
    method : {"subset", "bootstrap"}, default "subset"
        Four fifths without, or all with replacement. Nearest neighbours and medians see the
        repeated rows as copies: only "subset" suits `precision_recall_density_coverage`.

    Returns
    -------
    tuple of float
        ``(value, ci_low, ci_high)``: how far the score *at this n* would move with other clips. It
        does not contain the bias of a finite n, for which see `noise_floor` and `fad_infinity`. For
        Gaussian clouds of 40 clips it held the mean score in 95 to 99 of 100 trials.

    Raises
    ------
    ValueError
        As the metric, fewer than four rows (recordings) in a set, or an unknown method.

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
        _enough_recordings(code, name)
    if method not in _DRAWS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(_DRAWS)}")
    draw, value, rng = _DRAWS[method], metric(x, y), np.random.default_rng(seed)
    repeated = [metric(x[draw(codes[0], rng)], y[draw(codes[1], rng)]) for _ in range(repeats)]
    widening = _widening(codes) if method == "subset" else 1.0
    return (value, *_interval(value, repeated, widening, confidence))


_DRAWS = {"subset": _four_fifths, "bootstrap": _resampled}


def _enough_recordings(codes, name):
    if codes.max() < 3:
        raise ValueError(
            f"{name}: an interval needs at least 4 independent clips, got {codes.max() + 1}"
        )


def _interval(value, repeated, widening, confidence=0.95):
    tail = 50.0 * (1.0 - confidence)
    spread = widening * (np.array(repeated) - np.mean(repeated))
    low, high = np.percentile(spread, [tail, 100.0 - tail])
    return float(value + low), float(value + high)


def bootstrap_score(y, score, *, groups=None, repeats=200, confidence=0.95, seed=0):
    """Score of one set with an interval from subsamples, as `bootstrap_distance` has it of two.

    Parameters
    ----------
    y : array_like, shape (n, d)
        Embeddings, or probabilities for `inception_score`.
    score : callable
        Maps rows to a number: `vendi_score`, `inception_score`.
    groups : array_like, optional
        Recording of every row; what is drawn are then recordings.
    repeats, confidence, seed
        As in `bootstrap_distance`.

    Returns
    -------
    tuple of float
        ``(value, ci_low, ci_high)``, at this n. Of means of 40 Gaussian rows it held the truth in
        90 of 100 trials: with few clips it is slightly narrow.

    Raises
    ------
    ValueError
        As the score, or fewer than four rows (recordings).

    Examples
    --------
    >>> y = np.random.default_rng(0).normal(size=(60, 4))
    >>> value, low, high = bootstrap_score(y, vendi_score)
    >>> low < value < high
    True
    """
    y = _matrix(y, "candidate")
    codes = _codes(len(y), groups, "candidate")
    _enough_recordings(codes, "candidate")
    value, rng = score(y), np.random.default_rng(seed)
    repeated = [score(y[_four_fifths(codes, rng)]) for _ in range(repeats)]
    return (value, *_interval(value, repeated, _widening([codes]), confidence))


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


def sensitivity(
    clean,
    changed,
    *,
    embedding,
    labels=None,
    groups=None,
    metrics=("FAD", "KAD"),
    splits=10,
    seed=0,
):
    """How far a distance moves when the sounds are changed in a known way: does the ruler work?

    Each split deals the recordings into two halves. The clean first half is the reference; the
    second half is scored as it is (the floor) and with every change, at the same n.

    Parameters
    ----------
    clean : array_like, shape (n, d)
        Embeddings of real clips.
    changed : dict of str to array_like, shape (n, d)
        Embeddings of the same clips, row by row, after each change (`embeddings.CHANGES`).
    embedding : str
        Name of the embedding, for the table.
    labels : array_like, shape (n,), optional
        Class of every clip. Halves then hold all classes alike, and a further change, "wrong class",
        scores clips of every class against the next class's: its floor, at the same smaller n, is
        that of every class against itself.
    groups : array_like, shape (n,), optional
        Recording of every row: no recording is in both halves.
    metrics : sequence of str
        Keys of `METRICS`.
    splits : int, default 10
        Random ways to deal; at least 2.
    seed : int, default 0
        The same seed deals in the same way.

    Returns
    -------
    pandas.DataFrame
        One row a metric and change: ``embedding, metric, change, n`` (clips on each side, their mean
        over splits and classes); ``floor`` and ``floor_sd``; ``value`` and ``value_sd``, means and
        standard deviations over the splits; ``seen``, share of splits in which the change scores
        worse than every floor; ``spreads``, how many ``floor_sd`` the value lies above the floor.
        The splits deal the same clips anew, so their spread is a lower bound of that of new clips.

    Raises
    ------
    ValueError
        As the metrics; unknown metrics, fewer than two splits, or sets that are not of the same
        clips.

    Notes
    -----
    What changes a good distance should follow: Kilgour et al., Interspeech 2019; Gui et al., ICASSP
    2024. The set as a whole cannot show classes that change places: hence "wrong class" by class.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(60, 4))
    >>> table = sensitivity(x, {"shift": x + 1.0, "none": x}, embedding="toy", metrics=["FAD"])
    >>> table["seen"].tolist()[0], table["spreads"].tolist()[1]
    (1.0, 0.0)
    """
    import pandas as pd

    clean = _matrix(clean, "clean clips", least=4)
    sets = {name: _aligned(clean, y, name) for name, y in changed.items()}
    unknown = set(metrics) - set(METRICS)
    if unknown or splits < 2:
        raise ValueError(
            f"sensitivity: at least 2 splits, got {splits}; metrics out of {', '.join(METRICS)}, "
            f"got also {sorted(unknown)}"
        )
    codes = _codes(len(clean), groups, "clean clips")
    classes = np.zeros(len(clean), int) if labels is None else _codes(len(clean), labels, "classes")
    rng = np.random.default_rng(seed)
    halves = [_balanced_halves(codes, classes, rng) for _ in range(splits)]
    even = [[half[: min(map(len, pair))] for half in pair] for pair in halves]
    rows = []
    for name in metrics:
        metric = METRICS[name]
        floor = [metric(clean[a], clean[b]) for a, b in even]
        size = np.mean([len(a) for a, _ in even])
        for change, y in sets.items():
            values = [metric(clean[a], y[b]) for a, b in even]
            rows.append(_moved(name, change, size, floor, values))
        if classes.any():
            rows.append(_moved(name, "wrong class", *_wrong_class(clean, halves, classes, metric)))
    return pd.DataFrame(rows).assign(embedding=embedding)[SENSITIVITY_COLUMNS]


SENSITIVITY_COLUMNS = [
    *("embedding", "metric", "change", "n", "floor", "floor_sd", "value", "value_sd"),
    *("seen", "spreads"),
]


def _aligned(clean, y, name):
    y = _pair(clean, y, names=("clean clips", name))[1]
    _same_length(clean, y, ("clean clips", name))
    return y


def _balanced_halves(codes, classes, rng):
    """Rows of two halves that share no recording; of every class's recordings, half are in each."""
    first = np.unique(codes, return_index=True)[1]
    order = rng.permutation(len(first))
    order = order[np.argsort(classes[first][order], kind="stable")]
    side = np.empty(len(order), int)
    side[order] = np.arange(len(order)) % 2
    halves = [rng.permutation(np.flatnonzero(side[codes] == half)) for half in (0, 1)]
    if min(map(len, halves)) < 2:
        raise ValueError("clean clips: two halves of at least 2 rows need more recordings")
    return halves


def _wrong_class(x, halves, classes, metric):
    """Mean size, and for every split the mean over classes of right and of wrong class."""
    n, right, wrong = [], [], []
    for halved in halves:
        a, b = ([half[classes[half] == c] for c in range(classes.max() + 1)] for half in halved)
        pairs = list(zip(a, b, b[1:] + b[:1], strict=True))
        sizes = [min(map(len, pair)) for pair in pairs]
        if min(sizes) < 2:
            raise ValueError(
                "clean clips: of each class, both halves need 2 rows; take more clips, or no labels"
            )
        cut = [[x[rows[:k]] for rows in pair] for pair, k in zip(pairs, sizes, strict=True)]
        n.append(np.mean(sizes))
        right.append(np.mean([metric(ref, own) for ref, own, _ in cut]))
        wrong.append(np.mean([metric(ref, other) for ref, _, other in cut]))
    return np.mean(n), right, wrong


def _moved(metric, change, n, floor, values):
    spread = float(np.std(floor, ddof=1))
    rise = float(np.mean(values) - np.mean(floor))
    return {
        "metric": metric,
        "change": change,
        "n": float(n),
        "floor": float(np.mean(floor)),
        "floor_sd": spread,
        "value": float(np.mean(values)),
        "value_sd": float(np.std(values, ddof=1)),
        "seen": float(np.mean(np.array(values) > np.max(floor))),
        "spreads": rise / spread if spread > 0 else np.nan,
    }


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
    low, high = _interval(value, subsamples, _widening(codes))
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
    metrics=("FAD", "KAD"),
    floor=None,
    groups=None,
    repeats=200,
    seed=0,
):
    """Score candidates against one reference, each with n, interval and noise floor.

    Parameters
    ----------
    reference : array_like, shape (n, d)
        Embeddings of held-out real clips; the column ``reference`` says "real" until the caller
        assigns another name.
    candidates : dict of str to array_like, shape (n_i, d)
        Embeddings to score, by name.
    embedding : str
        Name of the embedding, for the table.
    metrics : sequence of str
        Keys of `METRICS`. KAD's bandwidth is the reference's for all candidates.
    floor : array_like, shape (m, d), optional
        Real clips that are *not* in the reference: as many of them as the candidate has are
        scored in its place. By default the floor is `noise_floor` of the reference's halves.
    groups : dict of str to array_like, optional
        Recording of every row, by candidate's name; the reference's under "real".
    repeats : int, default 200
        Subsamples for each interval; a tenth of it (at least 10) splits for a floor of halves.
    seed : int, default 0
        Of intervals and floors.

    Returns
    -------
    pandas.DataFrame
        One row per metric and candidate, columns `SCORE_COLUMNS`: ``value`` with its interval,
        ``floor`` (what real clips score) with its own, ``floor_n`` real clips in the candidate's
        place. The interval is empty where a set has too few recordings for one, and the note says
        so.

    Raises
    ------
    ValueError
        As the metrics, an unknown metric, or no candidate.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> noisy = rng.normal(0, 2, (20, 4))
    >>> table = score_table(rng.normal(size=(40, 4)), {"noisy": noisy}, embedding="toy")
    >>> (table["floor"] < table["value"]).tolist()
    [True, True]
    """
    import pandas as pd

    if not candidates:
        raise ValueError("score_table: no candidates given")
    unknown = set(metrics) - set(METRICS)
    if unknown:
        raise ValueError(f"unknown metrics {sorted(unknown)}; known: {', '.join(METRICS)}")
    groups = groups or {}
    reference_groups = groups.get("real")
    rows = []
    for name in metrics:
        metric = METRICS[name]
        if metric is kernel_distance:
            metric = partial(kernel_distance, bandwidth=median_distance(reference))
        score = partial(_score, name, reference, reference_groups, metric, repeats, seed)
        if floor is None:
            halves = _floor_of_halves(reference, reference_groups, metric, repeats, seed)
        else:
            sets = _floor_sets(floor, candidates, seed)
            floors = {len(real): score("floor", real, None) for real in sets}
        for candidate, y in candidates.items():
            row = score(candidate, y, groups.get(candidate))
            if floor is None:
                below, origin = halves, halves["note"]
            else:
                below = floors[min(len(y), len(floor))]
                origin = "; ".join(
                    filter(None, ["real clips outside the reference", below["note"]])
                )
            row |= {
                "floor": below["value"],
                "floor_low": below["ci_low"],
                "floor_high": below["ci_high"],
                "floor_n": below["n_candidate"],
                "note": "; ".join(filter(None, [row["note"], f"floor: {origin}"])),
            }
            rows.append({"metric": name, **row})
    table = pd.DataFrame(rows).assign(embedding=embedding, reference="real")
    return table[SCORE_COLUMNS]


SCORE_COLUMNS = [
    *("metric", "embedding", "reference", "candidate", "value", "ci_low", "ci_high"),
    *("n_reference", "n_candidate", "floor", "floor_low", "floor_high", "floor_n", "note"),
]


def _score(name, reference, reference_groups, metric, repeats, seed, candidate, y, y_groups):
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
        "note": note,
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
    return {"value": values.mean(), "ci_low": low, "ci_high": high, "n_candidate": n, "note": note}


def challenge_scores(published, candidates, networks, *, repeats=200, seed=0):
    """Score clips in the form of DCASE 2024 Task 7: against its published embeddings.

    Parameters
    ----------
    published : dict of str to np.ndarray, shape (clips, windows, d)
        From `datasets.load_dcase2024_task7`: what each network made of the reference recordings.
    candidates : dict of str to sequence of path or np.ndarray
        Clips of 4 s, one for each caption, by model.
    networks : dict of str to embeddings.Embedding
        By the names in `published` (`embeddings.CHALLENGE` names the ones that were used).
    repeats, seed
        As in `score_table`.

    Returns
    -------
    pandas.DataFrame
        As from `score_table`, FAD and KAD for each network. Every window is a row, as in the
        challenge, so n counts windows; intervals and floors draw whole clips.

    Raises
    ------
    ValueError
        As `score_table`, or a network that `published` lacks.

    Notes
    -----
    Lagrange et al., "Sound Scene Synthesis at the DCASE 2024 Challenge", arXiv 2501.08587. The
    challenge's evaluation set is not public: scores against the development set are not those of
    its table.
    """
    import pandas as pd

    missing = set(networks) - set(published)
    if missing:
        raise ValueError(f"no published embeddings of {sorted(missing)}; there are: {[*published]}")
    tables = []
    for network, embedding in networks.items():
        reference, clips = as_points(published[network])
        points, groups = {}, {"real": clips}
        for model, sounds in candidates.items():
            points[model], groups[model] = as_points(embedding.embed_windows(sounds))
        table = score_table(
            reference, points, embedding=network, groups=groups, repeats=repeats, seed=seed
        )
        tables.append(table.assign(reference="development set"))
    return pd.concat(tables, ignore_index=True)


def score_lines(scores):
    """Write scores as people read them: three digits, intervals in brackets, n next to them.

    Parameters
    ----------
    scores : pandas.DataFrame
        From `score_table`, or several of them concatenated.

    Returns
    -------
    pandas.DataFrame
        ``embedding, metric, reference, candidate``; ``n`` (of reference / candidate); ``score`` and
        ``floor``, both with interval; ``floor_n``, real clips in the candidate's place.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> noisy = rng.normal(0, 2, (20, 4))
    >>> table = score_table(rng.normal(size=(40, 4)), {"noisy": noisy}, embedding="toy")
    >>> score_lines(table)["n"].tolist()
    ['40 / 20', '40 / 20']
    """
    sizes = zip(scores["n_reference"], scores["n_candidate"], strict=True)
    return scores[["embedding", "metric", "reference", "candidate"]].assign(
        n=[f"{reference} / {candidate}" for reference, candidate in sizes],
        score=[_with_interval(*row) for row in scores[["value", "ci_low", "ci_high"]].to_numpy()],
        floor=[_with_interval(*r) for r in scores[["floor", "floor_low", "floor_high"]].to_numpy()],
        floor_n=scores["floor_n"],
    )


def _with_interval(value, low, high):
    value, low, high = (
        np.format_float_positional(v, precision=3, fractional=False, trim="-")
        for v in (value, low, high)
    )
    return value if low == "nan" else f"{value} [{low}, {high}]"
