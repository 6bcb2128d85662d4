"""Time the distances against the formulas that other toolkits use, in one run; print ratios.

Usage: ``python benchmarks/fad.py [dim]`` (default 2048, the width of PANNs).
"""

import sys
import time

import numpy as np
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist

from soundscapes_utils import fad


def frechet_by_sqrtm(x, y):
    """Return the Fréchet distance by a general matrix root of the d × d covariances' product."""
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    shift = x.mean(axis=0) - y.mean(axis=0)
    return shift @ shift + np.trace(cov_x + cov_y) - 2 * np.trace(sqrtm(cov_x @ cov_y)).real


def kernel_at_once(x, y):
    """Return KAD from whole distance matrices."""
    within = cdist(x, x)
    sigma = np.median(within[np.triu_indices(len(x), 1)])
    k_x, k_y, k_xy = (np.exp(-(d**2) / (2 * sigma**2)) for d in (within, cdist(y, y), cdist(x, y)))
    n, m = len(x), len(y)
    unbiased = (k_x.sum() - n) / (n * (n - 1)) + (k_y.sum() - m) / (m * (m - 1))
    return 100 * (unbiased - 2 * k_xy.mean())


def timed(function, *arguments):
    """Return a function's value and the seconds it took."""
    start = time.perf_counter()
    value = function(*arguments)
    return value, time.perf_counter() - start


def main():
    """Print one row a case: seconds of both, their ratio, relative difference of the values."""
    dim = int(sys.argv[1]) if len(sys.argv) > 1 else 2048
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(dim, dim)) / np.sqrt(dim)
    fad.frechet_distance(np.eye(4), 2 * np.eye(4))  # first call loads the linear algebra
    print(f"{'':22}{'ours s':>10}{'other s':>10}{'ratio':>8}{'difference':>12}")
    for name, ours, other, sizes in (
        ("FAD against sqrtm", fad.frechet_distance, frechet_by_sqrtm, (100, 500, 3000)),
        ("KAD against cdist", fad.kernel_distance, kernel_at_once, (500, 2000)),
    ):
        for n in sizes:
            x, y = rng.normal(size=(n, dim)) @ mixing, rng.normal(0.1, 1.2, (n, dim))
            value, seconds = timed(ours, x, y)
            expected, reference = timed(other, x, y)
            difference = abs(value - expected) / abs(expected)
            print(
                f"{name} n={n:<5}{seconds:9.3f}{reference:10.2f}"
                f"{reference / seconds:8.1f}{difference:12.1e}"
            )


if __name__ == "__main__":
    main()
