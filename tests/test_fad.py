"""Distances against closed forms, reference implementations and published embeddings."""

import tracemalloc
from pathlib import Path

import mpmath
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist, pdist

from soundscapes_utils import fad

DCASE = Path(__file__).parents[2] / "shared" / "data" / "dcase2024_task7_dev" / "embeddings"
needs_dcase = pytest.mark.skipif(
    not DCASE.is_dir(), reason="the DCASE 2024 Task 7 development embeddings are not at hand"
)


def gaussian(n, d, seed=0, mean=0.0, scale=1.0):
    return np.random.default_rng(seed).normal(mean, scale, (n, d))


def whitened(n, d, seed=0):
    """Rows whose sample mean is 0 and whose sample covariance is exactly the identity."""
    x = gaussian(n, d, seed)
    x -= x.mean(axis=0)
    return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T


def frechet_by_sqrtm(x, y):
    cx, cy = np.cov(x.T), np.cov(y.T)
    shift = x.mean(0) - y.mean(0)
    return shift @ shift + np.trace(cx) + np.trace(cy) - 2 * np.trace(sqrtm(cx @ cy)).real


# --- Fréchet --------------------------------------------------------------------------------------


def test_frechet_of_shifted_and_scaled_gaussians():
    x = whitened(200, 6)
    scales, shift = np.array([0.5, 1, 2, 3, 4, 5.0]), np.arange(6.0)
    expected = (shift**2).sum() + ((scales - 1) ** 2).sum()
    assert fad.frechet_distance(x, x * scales + shift) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("n", "m", "d"), [(300, 200, 20), (60, 80, 40), (41, 500, 40)])
def test_frechet_equals_sqrtm(n, m, d):
    mixing = gaussian(d, d, 7)
    x, y = gaussian(n, d, 1) @ mixing, gaussian(m, d, 2, 0.3, 1.4)
    assert fad.frechet_distance(x, y) == pytest.approx(frechet_by_sqrtm(x, y), rel=1e-8)


def test_few_rows_in_many_dimensions_are_no_approximation():
    # rows in a 5-dimensional subspace, rotated into 300 dimensions: the distance is theirs
    x, y = gaussian(12, 5, 1), gaussian(9, 5, 2, 1.0)
    basis = np.linalg.qr(gaussian(300, 5, 3))[0]
    expected = frechet_by_sqrtm(x, y)
    assert fad.frechet_distance(x @ basis.T, y @ basis.T) == pytest.approx(expected, rel=1e-8)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 12), st.integers(0, 10_000))
def test_frechet_is_symmetric_non_negative_and_blind_to_rotation_order_shift(n, m, d, seed):
    x, y = gaussian(n, d, seed), gaussian(m, d, seed + 1, 0.5, 2.0)
    rotation = np.linalg.qr(gaussian(d, d, seed + 2))[0]
    value = fad.frechet_distance(x, y)
    assert value >= 0
    close = pytest.approx(value, rel=1e-7, abs=1e-9)
    assert fad.frechet_distance(y, x) == value
    assert fad.frechet_distance(x @ rotation + 3, y @ rotation + 3) == close
    assert fad.frechet_distance(x[::-1], y) == close
    assert fad.frechet_distance(10 * x, 10 * y) == pytest.approx(100 * value, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("n", [2, 5, 100])
def test_frechet_of_a_set_with_itself_is_zero(n, scale):
    x = scale * gaussian(n, 30, 1)
    assert 0 <= fad.frechet_distance(x, x) <= 1e-10 * (x**2).sum()


def test_frechet_of_constant_sets():
    constant = np.full((4, 3), 2.0)
    assert fad.frechet_distance(constant, constant) == 0.0
    assert fad.frechet_distance(constant, constant + np.array([0, 0, 3])) == pytest.approx(9.0)
    x = whitened(50, 3)
    assert fad.frechet_distance(x, np.zeros((5, 3))) == pytest.approx(3.0)


def test_float16_rows_are_computed_in_float64():
    x = gaussian(50, 20, 1).astype(np.float16)
    y = gaussian(50, 20, 2).astype(np.float16)
    expected = fad.frechet_distance(x.astype(np.float64), y.astype(np.float64))
    assert fad.frechet_distance(x, y) == expected


@pytest.mark.parametrize("metric", list(fad.METRICS.values()))
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((1, 3)), np.zeros((19, 3)), "reference: needs at least"),
        (np.eye(19), np.full((19, 19), np.nan), "candidate: 19 of 19 are not finite"),
        (np.eye(19), np.eye(18), "19 dimensions, candidate 18"),
        (np.zeros(19), np.zeros((19, 1)), "shape"),
        (np.zeros((19, 0)), np.zeros((19, 0)), "shape"),
    ],
)
def test_bad_input_is_named(metric, x, y, message):
    with pytest.raises(ValueError, match=message):
        metric(x, y)


@pytest.mark.parametrize(
    "function",
    [
        *fad.METRICS.values(),
        lambda x, y: fad.memorisation(x, y, y)["nearer"],
        lambda x, y: fad.noise_floor(y, 5, 3).tolist(),
        lambda x, y: fad.fad_infinity(x, y, repeats=2)["value"],
    ],
)
def test_complex_rows_are_refused_and_tensors_taken(function):
    import torch

    x, y = gaussian(30, 3, 1), gaussian(25, 3, 2)
    for strange in (y + 0j, (y + 1j).tolist(), torch.tensor(y + 0j)):
        with pytest.raises(ValueError, match="expected real numbers"):
            function(x, strange)
    assert function(
        torch.tensor(x, requires_grad=True), torch.tensor(y, requires_grad=True)
    ) == function(x, y)


def frechet_in_50_digits(x, y):
    """By the general eigenvalues of the covariances' product."""
    with mpmath.workdps(50):

        def moments(rows):
            rows = mpmath.matrix(rows.tolist())
            n, d = rows.rows, rows.cols
            mean = mpmath.matrix([mpmath.fsum(rows[:, j]) / n for j in range(d)])
            for i in range(n):
                rows[i, :] = rows[i, :] - mean.T
            return mean, rows.T * rows / (n - 1)

        (mean_x, cov_x), (mean_y, cov_y) = moments(x), moments(y)
        shift = mean_x - mean_y
        values = mpmath.eig(cov_x * cov_y, left=False, right=False)
        root = mpmath.fsum(mpmath.sqrt(max(mpmath.re(value), 0)) for value in values)
        traces = mpmath.fsum(cov_x[i, i] + cov_y[i, i] for i in range(len(shift)))
        return float((shift.T * shift)[0] + traces - 2 * root)


ILL = np.diag(10.0 ** np.linspace(-6, 6, 5))
SINGULAR = np.outer([1, 1, 1, 2, -1.0], [1, 2, 3, 4, 5]) + np.diag([1, 1, 0, 0, 1e-9])


@pytest.mark.parametrize(
    ("n", "m", "mix_x", "mix_y"),
    [
        (30, 20, np.eye(5), np.eye(5)),
        (4, 3, np.eye(5), np.eye(5)),  # fewer rows than dimensions, both
        (3, 40, np.eye(5), ILL),  # and one
        (30, 20, ILL, ILL),
        (30, 20, ILL, ILL[::-1]),  # what is large in one is small in the other
        (30, 20, SINGULAR, np.eye(5)),
        (30, 20, SINGULAR, SINGULAR.T),
        (30, 20, SINGULAR, ILL),
        (6, 6, 1e-120 * np.eye(5), 1e-120 * ILL),
        (6, 6, 1e120 * np.eye(5), 1e120 * np.eye(5)),
    ],
)
def test_frechet_equals_50_digits(n, m, mix_x, mix_y):
    x, y = gaussian(n, 5, 1) @ mix_x, gaussian(m, 5, 2, 0.5, 1.5) @ mix_y
    expected = frechet_in_50_digits(x, y)
    # relative to the traces: of nearly equal sets no digit of the difference is in float64 rows
    assert fad.frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_diagonal_gaussians_over_twelve_decades():
    widths_x, widths_y = 10.0 ** np.linspace(-6, 6, 30), 10.0 ** np.linspace(6, -6, 30)
    x, y = whitened(100, 30, 1) * widths_x, whitened(90, 30, 2) * widths_y
    expected = ((widths_x - widths_y) ** 2).sum()
    assert fad.frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(60, 50), (60, 15), (12, 15)])
def test_frechet_equals_the_trace_form_of_torchmetrics(n, m):
    # written out: its import alone takes longer than all tests of this file
    x, y = gaussian(n, 20, 1) @ gaussian(20, 20, 3), gaussian(m, 20, 2, 0.5)
    (mx, cx), (my, cy) = ((v.mean(0), np.cov(v.T)) for v in (x, y))
    root = np.sqrt(np.linalg.eigvals(cx @ cy).astype(complex)).real.sum()
    expected = ((mx - my) ** 2).sum() + np.trace(cx) + np.trace(cy) - 2 * root
    assert fad.frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_few_rows_form_no_square_of_the_dimensions():
    x, y = gaussian(20, 3000, 1), gaussian(15, 3000, 2)
    fad.frechet_distance(x, y)
    tracemalloc.start()
    fad.frechet_distance(x, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3000 * 3000 * 8 / 10


def test_values_that_cannot_be_squared_are_refused():
    with pytest.raises(ValueError, match="candidate: values beyond 1e\\+150"):
        fad.frechet_distance(np.eye(3), 1e200 * np.eye(3))
    assert fad.frechet_distance(1e-200 * np.eye(3), 3e-200 * np.eye(3)) == 0.0


@pytest.mark.parametrize("sizes", [[2, 2, 1], [1, 1, 1], [10, 9, 1, 1], [40, 1]])
def test_a_reference_of_few_recordings_has_scores_without_a_floor_of_halves(sizes):
    x, y = gaussian(sum(sizes), 3, 1), gaussian(12, 3, 2)
    groups = {"real": np.repeat(np.arange(len(sizes)), sizes)}
    table = fad.score_table(x, {"made": y}, embedding="", metrics=["FAD"], groups=groups, repeats=20)
    assert table["value"].item() == pytest.approx(fad.frechet_distance(x, y))
    assert np.isnan(table["floor"].item()) == ("too few recordings" in table["note"].item())
    assert len(sizes) > 3 or np.isnan(table["floor"].item())


# --- KAD and manifolds ----------------------------------------------------------------------------


def brute_kad(x, y):
    def kernel(a, b):
        return np.exp(-((a - b) ** 2).sum() / (2 * sigma**2))

    pairs = [np.sqrt(((a - b) ** 2).sum()) for i, a in enumerate(x) for b in x[:i]]
    sigma = np.median(pairs)
    within_x = np.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    within_y = np.mean([kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    return 100 * (within_x + within_y - 2 * np.mean([kernel(a, b) for a in x for b in y]))


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_kad_equals_its_definition(offset):
    x, y = gaussian(25, 7, 1) + offset, gaussian(31, 7, 2, 0.4) + offset
    assert fad.kernel_distance(x, y) == pytest.approx(brute_kad(x, y), abs=1e-8)


def test_kad_takes_the_bandwidth_of_the_reference():
    x, y = gaussian(40, 5, 1), gaussian(40, 5, 2, 0, 4)
    sigma = np.median(pdist(x))
    expected = fad.kernel_distance(x, y, bandwidth=sigma)
    assert fad.kernel_distance(x, y) == pytest.approx(expected, rel=1e-12)
    assert fad.kernel_distance(x, y) != pytest.approx(fad.kernel_distance(y, x), rel=0.01)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 8), st.integers(0, 10_000))
def test_kad_is_blind_to_rotation_order_shift_and_scale(n, m, d, seed):
    x, y = gaussian(n, d, seed), gaussian(m, d, seed + 1, 0.5, 2.0)
    rotation = np.linalg.qr(gaussian(d, d, seed + 2))[0]
    close = pytest.approx(fad.kernel_distance(x, y), abs=1e-7)
    assert fad.kernel_distance(x @ rotation - 4, y @ rotation - 4) == close
    assert fad.kernel_distance(x[::-1], y) == close
    assert fad.kernel_distance(1e-3 * x, 1e-3 * y) == close


def test_kad_in_float32():
    x, y = gaussian(300, 64, 1) + 3, gaussian(200, 64, 2, 3.2)
    expected = fad.kernel_distance(x, y)
    found = fad.kernel_distance(x, y, dtype=np.float32)
    assert found != expected
    assert found == pytest.approx(expected, abs=2e-5)
    with pytest.raises(ValueError, match="cannot be squared in float32"):
        fad.kernel_distance(1e20 * x, y, dtype="float32")


@pytest.mark.parametrize(("n", "m"), [(2, 3), (3, 2), (1024, 1025), (2100, 1100)])
def test_kad_of_many_rows_equals_its_definition(n, m):
    x, y = gaussian(n, 3, n) + 50, gaussian(m, 3, m, 0.3) + 50

    def kernel(squares):
        return np.exp(-squares / (2 * np.median(pdist(x)) ** 2)).mean()

    within = kernel(pdist(x, "sqeuclidean")) + kernel(pdist(y, "sqeuclidean"))
    expected = 100 * (within - 2 * kernel(cdist(x, y, "sqeuclidean")))
    assert fad.kernel_distance(x, y) == pytest.approx(expected, abs=1e-9)


def test_kad_beyond_five_thousand_rows_holds_no_whole_matrix():
    x, y = gaussian(8000, 2, 1), gaussian(3000, 2, 2, 0.1)
    fad.kernel_distance(x[:99], y)  # what is imported on the way is not counted
    tracemalloc.start()
    value = fad.kernel_distance(x, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # a matrix of all distances takes 512 MB
    assert peak < 200e6
    # the bandwidth is that of 5,000 of the rows
    sigma = np.median(pdist(x))
    assert value == pytest.approx(fad.kernel_distance(x, y, bandwidth=sigma), rel=0.01)


def test_an_outlier_does_not_blur_the_bandwidth():
    x, y = gaussian(100, 3), gaussian(50, 3, 1)
    x[0] = 1e9
    expected = fad.kernel_distance(x, y, bandwidth=np.median(pdist(x)))
    assert fad.kernel_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_kad_leaves_out_the_pairs_of_one_recording():
    x, y = gaussian(9, 3, 1), gaussian(8, 3, 2)
    groups_x, groups_y = np.array([0, 0, 0, 1, 1, 2, 3, 4, 5]), np.array(list("aabbcdef"))

    def mean_kernel(rows, groups):
        squares, apart = cdist(rows, rows, "sqeuclidean"), groups[:, None] != groups
        return np.exp(-squares / (2 * 1.5**2))[apart].mean()

    between = np.exp(-cdist(x, y, "sqeuclidean") / (2 * 1.5**2)).mean()
    expected = 100 * (mean_kernel(x, groups_x) + mean_kernel(y, groups_y) - 2 * between)
    found = fad.kernel_distance(x, y, 1.5, groups_x, groups_y)
    assert found == pytest.approx(expected, abs=1e-10)
    alone = fad.kernel_distance(x, y, 1.5, np.arange(9), np.arange(8))
    assert alone == fad.kernel_distance(x, y, 1.5)
    with pytest.raises(ValueError, match="all rows of a set are of one group"):
        fad.kernel_distance(x, y, 1.5, groups_x=np.zeros(9))
    with pytest.raises(ValueError, match="groups of candidate: expected 8 labels"):
        fad.kernel_distance(x, y, groups_y=groups_x)


def test_kad_by_groups_is_unbiased_where_rows_of_one_recording_are_alike():
    def recordings(seed, sources=8, each=2, d=4):
        """Rows of one recording correlate by ½; every row alone is standard normal."""
        shared = np.repeat(gaussian(sources, d, seed), each, axis=0)
        return np.sqrt(0.5) * (shared + gaussian(sources * each, d, seed + 10_000))

    groups, blind, honest = np.repeat(np.arange(8), 2), [], []
    for s in range(400):
        x, y = recordings(2 * s), recordings(2 * s + 1)
        blind.append(fad.kernel_distance(x, y, bandwidth=2.8))
        honest.append(fad.kernel_distance(x, y, 2.8, groups, groups))
    assert abs(np.mean(honest)) < 3 * np.std(honest) / np.sqrt(400)
    assert np.mean(blind) > 10 * np.std(blind) / np.sqrt(400)


def test_kad_of_one_recording_alone_is_not_defined():
    x, y = gaussian(6, 3), gaussian(9, 3, 1)
    table = fad.score_table(x, {"y": y}, embedding="toy", floor=y, groups={"real": ["a"] * 6})
    kad = table.set_index("metric").loc["KAD"]
    assert np.isnan(kad[["value", "ci_low", "floor"]].astype(float)).all()
    assert "fewer than 4 recordings" in kad["note"]
    assert table.set_index("metric").loc["FAD", "value"] == fad.frechet_distance(x, y)


@settings(deadline=None, max_examples=25)
@given(st.integers(3, 12), st.integers(2, 12), st.integers(2, 5), st.integers(0, 10_000))
def test_windows_told_to_be_of_one_clip_change_no_kad(n, m, each, seed):
    x, y = gaussian(n, 3, seed), gaussian(m, 3, seed + 1, 0.5)
    # every clip gives the same window several times: the bandwidth too must be that of the clips
    windows = [np.repeat(rows, each, axis=0) for rows in (x, y)]
    groups = [np.repeat(np.arange(len(rows)), each) for rows in (x, y)]
    expected = pytest.approx(fad.kernel_distance(x, y), abs=1e-9)
    assert fad.kernel_distance(*windows, None, *groups) == expected
    order = np.random.default_rng(seed).permutation(n * each)
    assert fad.kernel_distance(windows[0][order], y, groups_x=groups[0][order]) == expected


def test_a_table_of_windows_is_one_of_clips():
    x, y, real = gaussian(20, 4, 1), gaussian(12, 4, 2, 0.3), gaussian(15, 4, 3)
    options = {"embedding": "toy", "metrics": ["KAD"], "repeats": 30}
    clips = fad.score_table(x, {"y": y}, floor=real, **options)
    double = [np.repeat(rows, 2, axis=0) for rows in (x, y, real)]
    groups = {name: np.repeat(np.arange(n), 2) for name, n in (("real", 20), ("y", 12), ("floor", 15))}
    windows = fad.score_table(double[0], {"y": double[1]}, floor=double[2], groups=groups, **options)
    numbers = ["value", "ci_low", "ci_high", "floor", "floor_low", "floor_high"]
    np.testing.assert_allclose(windows[numbers], clips[numbers], atol=1e-9)
    assert windows["floor_n"].item() == 2 * clips["floor_n"].item()
    with pytest.raises(ValueError, match=r"groups of \['flour'\]: there are real, floor, y"):
        fad.score_table(x, {"y": y}, groups={"flour": np.arange(15)}, **options)


@pytest.mark.parametrize(("recordings", "each", "n"), [(24, 2, 16), (30, 4, None), (8, 3, 6)])
def test_real_recordings_are_no_worse_than_real_ones(recordings, each, n):
    codes, floors, below = np.repeat(np.arange(recordings), each), [], []
    for seed in range(60):
        shared = np.repeat(gaussian(2 * recordings, 4, seed), each, axis=0)
        rows = np.sqrt(0.5) * (shared + gaussian(len(shared), 4, seed + 1000))
        x, y = rows[: len(codes)], rows[len(codes) :]
        table = fad.score_table(
            x, {"y": y}, embedding="toy", metrics=["KAD"], groups={"real": codes, "y": codes}, repeats=1
        )
        metric = fad.METRICS["KAD"]
        floors.append(fad.noise_floor(x, n, 3, seed, metric=metric, groups=codes).mean())
        below.append(table["value"][0] < table["floor"][0])
    # a truth of 0 for the floor, and for an equal generator an even chance to lie below it
    assert abs(np.mean(floors)) < 3.3 * np.std(floors) / np.sqrt(60)
    assert 15 <= sum(below) <= 45


def test_a_floor_of_two_rows_is_of_two_recordings():
    x, recordings = gaussian(40, 3), np.arange(40) // 4
    for n in (2, 3, 5):
        values = fad.noise_floor(x, n, 20, metric=fad.kernel_distance, groups=recordings)
        assert np.isfinite(values).all()


def test_kad_is_unbiased():
    values = [
        fad.kernel_distance(gaussian(10, 4, 2 * s), gaussian(10, 4, 2 * s + 1), bandwidth=2.8)
        for s in range(400)
    ]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(400)
    assert min(values) < 0


def test_kad_of_a_reference_without_width():
    with pytest.raises(ValueError, match="bandwidth must be positive"):
        fad.kernel_distance(np.zeros((5, 2)), gaussian(5, 2))
    with pytest.raises(ValueError, match="bandwidth must be positive"):
        fad.kernel_distance(np.r_[np.full((80, 3), 0.1), gaussian(20, 3)], gaussian(5, 3))


def brute_manifold(x, y, k):
    def distances(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    rx = np.sort(distances(x, x), axis=1)[:, k]
    ry = np.sort(distances(y, y), axis=1)[:, k]
    between = distances(x, y)
    inside = between < rx[:, None]
    return {
        "precision": inside.any(0).mean(),
        "recall": (between < ry).any(1).mean(),
        "density": inside.sum(0).mean() / k,
        "coverage": (between.min(1) < rx).mean(),
    }


@pytest.mark.parametrize(("k", "n"), [(1, 40), (3, 40), (5, 40), (5, 1100)])
def test_manifolds_equal_their_definition(k, n):
    x, y = gaussian(n, 3, 1), gaussian(50, 3, 2, 0.8, 0.7)
    found = fad.precision_recall_density_coverage(x, y, k)
    assert found == pytest.approx(brute_manifold(x, y, k))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 5), st.integers(6, 30), st.integers(6, 30), st.integers(1, 4), st.integers(0, 9999)
)
def test_manifolds_with_ties_are_those_of_prdc(k, n, m, side, seed):
    # points of a small grid, many of them equal or equally far, and some of either set in the other
    rng = np.random.default_rng(seed)
    x, y = (rng.integers(-side, side + 1, (size, 2)) for size in (n, m))
    y[: m // 3] = x[rng.integers(0, n, m // 3)]
    found = fad.precision_recall_density_coverage(x, y, k)
    assert found == pytest.approx(brute_manifold(x.astype(float), y.astype(float), k))


@pytest.mark.parametrize(("offset", "scale", "d"), [(0, 1, 3), (100, 1, 60), (0, 1e-6, 8), (1e4, 1, 3)])
def test_a_set_covers_itself_once(offset, scale, d):
    x = offset + scale * gaussian(80, d, d)
    for same in (x, x[::-1].copy(), np.r_[x[40:], x[:40]]):
        found = fad.precision_recall_density_coverage(x, same)
        # each ball holds the row itself and four neighbours, not the fifth, at which it ends
        assert found == pytest.approx(dict.fromkeys(found, 1.0))


def test_manifolds_tell_collapse_from_noise():
    x = gaussian(100, 4, 1)
    collapsed = fad.precision_recall_density_coverage(x, 0.01 * gaussian(100, 4, 2))
    spread = fad.precision_recall_density_coverage(x, gaussian(100, 4, 2, 0, 5))
    assert collapsed["precision"] > 0.9 > 0.2 > collapsed["recall"]
    assert spread["recall"] > 0.9 > 0.3 > spread["precision"]


# --- other scores ---------------------------------------------------------------------------------


def test_memorisation_tells_copies_from_new_clips():
    train, test, new = gaussian(150, 16, 1), gaussian(80, 16, 2), gaussian(70, 16, 3)
    fresh = fad.memorisation(train, test, new)
    assert abs(fresh["nearer"] - 0.5) < 0.15
    assert fresh["p_value"] > 0.01
    assert fresh["flagged"] < 0.2
    copied = np.r_[train[[5, 9]], new]
    found = fad.memorisation(train, test, copied)
    assert found["clips"]["nearest"][:2].tolist() == [5, 9]
    assert found["clips"]["distance"][:2].tolist() == [0.0, 0.0]
    assert found["clips"]["flagged"][:2].all()
    all_copied = fad.memorisation(train, test, train[:40] + 0.01 * new[:40])
    assert (all_copied["nearer"], all_copied["flagged"]) == (1.0, 1.0)
    assert all_copied["p_value"] < 1e-9


def test_memorisation_equals_its_definition():
    train, test, new = gaussian(50, 3, 1), gaussian(40, 3, 2), gaussian(30, 3, 3)
    found = fad.memorisation(train, test, new, share=0.25)
    own, theirs = cdist(test, train).min(1), cdist(new, train)
    nearer = (theirs.min(1)[:, None] < own).mean()
    assert found["nearer"] == pytest.approx(nearer)
    assert found["threshold"] == pytest.approx(np.quantile(own, 0.25))
    assert found["flagged"] == (theirs.min(1) < found["threshold"]).mean()
    clips = found["clips"].set_index("row").sort_index()
    assert clips["nearest"].tolist() == theirs.argmin(1).tolist()
    assert found["n_generated"] == 30


def test_memorisation_refuses():
    x = gaussian(9, 2)
    with pytest.raises(ValueError, match="training set has 2 dimensions, generated set 3"):
        fad.memorisation(x, x, gaussian(9, 3))
    with pytest.raises(ValueError, match="test set: 1 of 9 are not finite, the first is row 4"):
        fad.memorisation(x, np.where(np.arange(9)[:, None] == 4, np.nan, x), x)
    with pytest.raises(ValueError, match="range"):
        fad.memorisation(x, x, x, share=5)


# --- intervals and floors -------------------------------------------------------------------------


def interval(x, y, metric="FAD", repeats=200, seed=0, groups=None):
    """Value and interval of the score table, which has no floor to compute here."""
    options = {"repeats": repeats, "seed": seed, "groups": groups, "floor": x[:3]}
    table = fad.score_table(x, {"y": y}, embedding="toy", metrics=[metric], **options)
    return tuple(table.loc[0, ["value", "ci_low", "ci_high"]])


@pytest.mark.parametrize("name", ["FAD", "KAD"])
def test_interval_covers_the_mean_score_of_other_samples(name):
    metric = fad.METRICS[name]

    def draw(seed):
        return gaussian(40, 6, 2 * seed), gaussian(40, 6, 2 * seed + 1, 0.6)

    expected = np.mean([metric(*draw(1000 + s)) for s in range(300)])
    intervals = [interval(*draw(s), name, repeats=80) for s in range(60)]
    hits = sum(low <= expected <= high for _, low, high in intervals)
    # 95 % nominal: of 60, fewer than 51 has probability < .001
    assert hits >= 51
    # and it is no catch-all: as wide as the spread over samples, not much wider
    width = np.mean([high - low for _, low, high in intervals]) / 3.92
    assert width < 1.6 * np.std([metric(*draw(s)) for s in range(60)])


def test_interval_of_repeated_rows_is_wider_by_group():
    # 20 recordings, 5 nearly equal rows each: rows are no independent clips
    x = np.repeat(gaussian(20, 4, 1), 5, axis=0) + gaussian(100, 4, 2, 0, 0.01)
    y, recording = gaussian(100, 4, 3, 0.5), np.repeat(np.arange(20), 5)
    _, low, high = interval(x, y)
    _, low_g, high_g = interval(x, y, groups={"real": recording})
    assert high_g - low_g > 1.5 * (high - low)


def test_interval_needs_four_recordings():
    few = {"y": np.arange(20) % 3}
    value, *ends = interval(gaussian(20, 2), gaussian(20, 2), groups=few)
    assert np.isfinite(value)
    assert np.isnan(ends).all()


def test_results_are_seeded():
    x, y = gaussian(30, 3, 1), gaussian(30, 3, 2)
    assert interval(x, y, seed=3) == interval(x, y, seed=3)
    assert interval(x, y, seed=3) != interval(x, y, seed=4)
    assert (fad.noise_floor(x, seed=3) == fad.noise_floor(x, seed=3)).all()
    first, again = (fad.fad_infinity(x, y, seed=3, repeats=5) for _ in range(2))
    pd.testing.assert_frame_equal(first.pop("curve"), again.pop("curve"))
    assert first == again


def test_floor_of_many_rows_approaches_zero_like_one_over_n():
    x = gaussian(4000, 6)
    small, large = (fad.noise_floor(x, n, 20).mean() for n in (100, 1000))
    assert small / large == pytest.approx(10, rel=0.25)


def test_floor_keeps_recordings_on_one_side():
    seen = []

    def record(x, y):
        seen.append((set(x[:, 0]), set(y[:, 0])))
        return 0.0

    recording = np.repeat([1.0, 2, 3, 4, 5, 6, 7], [1, 5, 2, 3, 1, 4, 3])
    fad.noise_floor(np.c_[recording, gaussian(19, 1)], metric=record, groups=recording)
    assert len(seen) == 30
    assert all(not (left & right) for left, right in seen)


def test_floor_of_near_duplicates_is_too_low_without_groups():
    x = np.repeat(gaussian(30, 8, 1), 4, axis=0) + gaussian(120, 8, 2, 0, 0.01)
    blind = fad.noise_floor(x, 60).mean()
    honest = fad.noise_floor(x, 60, groups=np.repeat(np.arange(30), 4)).mean()
    assert honest > 1.5 * blind


def test_floor_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="disjoint sets of 6"):
        fad.noise_floor(gaussian(10, 2), 6)
    with pytest.raises(ValueError, match="expected 10 labels"):
        fad.noise_floor(gaussian(10, 2), groups=[1, 2])


def test_fad_infinity_removes_the_bias_of_n():
    found = [
        fad.fad_infinity(gaussian(200, 8, 2 * s), gaussian(200, 8, 2 * s + 1), draws=2, repeats=2)
        for s in range(30)
    ]
    values = np.array([f["value"] for f in found])
    raw = np.mean([f["curve"]["fad"].iloc[-1] for f in found])
    # equal distributions: the truth is 0, the plain FAD is mostly bias
    assert raw == pytest.approx(0.265, rel=0.1)
    assert abs(values.mean()) < 0.2 * raw


def test_fad_infinity_of_a_known_distance():
    found = fad.fad_infinity(gaussian(300, 8, 1), gaussian(300, 8, 2, 0.5))
    assert found["ci_low"] < 8 * 0.25 < found["ci_high"]
    assert found["slope"] > 0
    assert found["r2"] > 0.9
    assert found["trusted"]
    assert found["curve"]["n"].agg(["min", "max"]).tolist() == [75, 300]


def test_fad_infinity_says_when_it_is_not_to_be_trusted():
    found = fad.fad_infinity(gaussian(100, 64, 1), gaussian(100, 64, 2), repeats=5)
    assert found["r2"] > 0.9
    assert found["value"] > 5
    assert not found["trusted"]


def test_fad_infinity_refuses_tiny_sets():
    with pytest.raises(ValueError, match="at least 8 independent"):
        fad.fad_infinity(gaussian(7, 2), gaussian(50, 2))
    with pytest.raises(ValueError, match="at least 8 independent"):
        fad.fad_infinity(gaussian(30, 2), gaussian(30, 2), groups_x=np.arange(30) % 7)
    with pytest.raises(ValueError, match="at least 3 sizes"):
        fad.fad_infinity(gaussian(30, 2), gaussian(30, 2), sizes=2)


# --- published embeddings -------------------------------------------------------------------------


def dcase(network):
    clips = [np.load(file) for file in sorted((DCASE / network).glob("*.npy"))]
    frames = [clip.reshape(-1, clip.shape[-1]) for clip in clips]
    return np.concatenate(frames), np.repeat(np.arange(len(frames)), [len(f) for f in frames])


@needs_dcase
@pytest.mark.parametrize(
    ("network", "floor", "spread"),
    [("panns-wavegram-logmel", 62.9, 4.1), ("vggish", 7.0, 0.7), ("clap-2023", 310.0, 18.0)],
)
def test_floor_of_the_dcase_development_set(network, floor, spread):
    # frames are rows and a clip's frames stay together: 30 clips against the other 30
    frames, clips = dcase(network)
    values = fad.noise_floor(frames, len(frames) // 2, 30, groups=clips)
    # the published figures are rounded means over splits of their own
    assert values.mean() == pytest.approx(floor, abs=0.5 * spread)
    assert 0.5 * spread < values.std(ddof=1) < 1.6 * spread


@needs_dcase
def test_size_dependence_on_the_dcase_development_set():
    frames, clips = dcase("panns-wavegram-logmel")
    means = [fad.noise_floor(frames, n, 20, groups=clips).mean() for n in (10, 15, 20, 30)]
    assert means == pytest.approx([96.6, 83.4, 74.1, 62.6], rel=0.05)
    kad = fad.noise_floor(frames, 30, 30, groups=clips, metric=fad.kernel_distance)
    assert abs(kad.mean()) < 0.4


@needs_dcase
def test_frames_drawn_singly_flatter_the_floor_on_the_dcase_set():
    frames, clips = dcase("clap-2023")
    honest = fad.noise_floor(frames, 120, 10, groups=clips).mean()
    assert fad.noise_floor(frames, 120, 10).mean() < 0.5 * honest


# --- tables ---------------------------------------------------------------------------------------


def test_score_table_has_the_columns_and_a_floor_for_every_n():
    candidates = {"good": gaussian(20, 4, 2), "bad": gaussian(30, 4, 3, 3), "few": gaussian(3, 4, 4)}
    table = fad.score_table(
        gaussian(40, 4, 1), candidates, embedding="toy", floor=gaussian(25, 4, 5), repeats=20
    )
    assert list(table.columns) == fad.SCORE_COLUMNS
    assert table.groupby("metric")["floor_n"].agg(list).tolist() == [[20, 25, 3]] * 2
    assert table[["floor", "reference", "note"]].notna().all(axis=None)
    good, bad = (table[(table.metric == "FAD") & (table.candidate == c)] for c in ("good", "bad"))
    assert good["ci_high"].item() < bad["ci_low"].item()
    few = table[table.candidate == "few"]
    assert few["value"].notna().all()
    assert few["ci_low"].isna().all()
    assert few["note"].str.contains("no interval").all()


def test_score_table_extrapolates():
    x, y = gaussian(80, 4, 1), gaussian(60, 4, 2, 1)
    table = fad.score_table(
        x, {"y": y}, embedding="toy", metrics=("FAD-inf",), floor=gaussian(60, 4, 3), seed=5
    )
    expected = fad.fad_infinity(x, y, seed=5)
    row = table[table.candidate == "y"].iloc[0]
    assert [row.value, row.ci_low, row.ci_high] == [
        expected[key] for key in ("value", "ci_low", "ci_high")
    ]
    wide = fad.score_table(
        gaussian(40, 90), {"y": gaussian(40, 90)}, embedding="toy", metrics=("FAD-inf",)
    )
    # of the score, and of its floor
    assert wide["note"].str.count("fewer clips than dimensions").tolist() == [2]


def test_intervals_stay_within_what_a_metric_can_be():
    table = fad.score_table(
        gaussian(30, 3, 1), {"y": gaussian(30, 3, 2, 1.5)}, embedding="toy", repeats=60,
        metrics=("precision", "recall", "coverage", "density", "FAD"), floor=gaussian(30, 3, 3),
    )  # fmt: skip
    assert (table["ci_low"] >= 0).all()
    shares = table[table["metric"].isin(["precision", "recall", "coverage"])]
    assert (shares["ci_high"] <= 1).all()
    assert (table["ci_low"] < table["ci_high"]).all()


def test_score_table_gives_every_candidate_the_bandwidth_of_the_reference():
    x, y = gaussian(40, 4, 1), gaussian(30, 4, 2, 1)
    table = fad.score_table(x, {"y": y}, embedding="toy", metrics=("KAD",), repeats=10)
    assert table["value"].item() == fad.kernel_distance(x, y)


def test_score_table_draws_by_recording():
    x, recording = np.repeat(gaussian(20, 4, 1), 4, axis=0), np.repeat(np.arange(20), 4)
    arguments = ({"y": gaussian(80, 4, 2)},)
    blind = fad.score_table(x, *arguments, embedding="toy", metrics=("FAD",))
    honest = fad.score_table(
        x, *arguments, embedding="toy", metrics=("FAD",), groups={"real": recording}
    )
    assert honest["floor"][0] > 1.5 * blind["floor"][0]
    assert honest["value"][0] == blind["value"][0]


def test_score_table_refuses():
    with pytest.raises(ValueError, match="no candidates"):
        fad.score_table(gaussian(9, 2), {}, embedding="toy")
    with pytest.raises(ValueError, match=r"unknown metrics \['FDA'\]; known: FAD"):
        fad.score_table(gaussian(9, 2), {"y": gaussian(9, 2)}, embedding="toy", metrics=["FDA"])


def test_every_score_has_the_floor_of_its_n():
    x, real = gaussian(40, 3, 1), gaussian(30, 3, 4)
    candidates = {"a": gaussian(10, 3, 2), "b": gaussian(20, 3, 3), "c": gaussian(20, 3, 5)}
    table = fad.score_table(x, candidates, embedding="toy", floor=real, repeats=20)
    assert table["floor_n"].tolist() == [10, 20, 20] * 2
    order = np.random.default_rng(0).permutation(30)
    for row in table.itertuples():
        alone = fad.score_table(
            x, {"real": real[order[: row.floor_n]]}, embedding="toy", metrics=[row.metric],
            floor=real, repeats=20,
        )  # fmt: skip
        expected = alone.loc[0, ["value", "ci_low", "ci_high"]].tolist()
        assert [row.floor, row.floor_low, row.floor_high] == expected
    halves = fad.score_table(x, candidates, embedding="toy", repeats=20)
    assert set(halves["floor_n"]) == {20}
    values = fad.noise_floor(x, 20, 10)
    assert halves["floor"][0] == pytest.approx(values.mean())
    assert halves["note"].str.contains("floor: disjoint halves of the reference, 10 splits").all()


def test_scores_are_written_as_people_read_them():
    row = dict.fromkeys(fad.SCORE_COLUMNS, "x")
    row |= {"value": 12.3456, "ci_low": 0.00012345, "ci_high": 1234.5, "floor": -0.5}
    row |= {"floor_low": np.nan, "floor_high": np.nan, "floor_n": 7}
    row |= {"n_reference": 40, "n_candidate": 9}
    lines = fad.score_lines(pd.DataFrame([row, row], index=[0, 0]))
    assert lines["score"].tolist() == ["12.3 [0.000123, 1230]"] * 2
    assert lines["floor"].tolist() == ["-0.5"] * 2
    assert lines["n"].tolist() == ["40 / 9"] * 2


# --- the challenge's form -------------------------------------------------------------------------


def test_points_know_their_clips():
    points, clips = fad.stack_windows([[[1.0, 2]], [[3, 4], [5, 6]]])
    np.testing.assert_array_equal(points, [[1, 2], [3, 4], [5, 6]])
    np.testing.assert_array_equal(clips, [0, 1, 1])
    for wrong in ([], [[[1.0]], [[1.0, 2]]], [np.zeros((0, 2))], [np.zeros(3)]):
        with pytest.raises(ValueError, match="expected arrays of shape"):
            fad.stack_windows(wrong)


def test_challenge_scores_count_windows_and_draw_clips():
    class Toy:
        """Four windows a clip, as the challenge's VGGish."""

        def embed_windows(self, clips):
            return [np.repeat(clip, 4, axis=0) + 0.01 * gaussian(4, 3, 5) for clip in clips]

    published = {"vggish": np.repeat(gaussian(20, 3, 1)[:, None], 4, axis=1)}
    near, far = gaussian(20, 3, 2)[:, None], gaussian(20, 3, 3, 9.0)[:, None]
    found = fad.challenge_scores(
        published, {"near": near, "far": far}, {"vggish": Toy()}, repeats=20
    ).set_index(["metric", "candidate"])
    assert list(found.reset_index().columns.sort_values()) == sorted(fad.SCORE_COLUMNS)
    assert (found["n_candidate"] == 80).all()
    assert (found["reference"] == "development set").all()
    assert found.loc[("FAD", "far"), "value"] > 20 * found.loc[("FAD", "near"), "value"]
    points, clips = fad.stack_windows(published["vggish"])
    floor = fad.noise_floor(points, 38, 10, groups=clips).mean()
    assert found.loc[("FAD", "near"), "floor"] == pytest.approx(floor, rel=0.1)
    with pytest.raises(ValueError, match=r"no published embeddings of \['panns'\]"):
        fad.challenge_scores(published, {"near": near}, {"panns": Toy()})
