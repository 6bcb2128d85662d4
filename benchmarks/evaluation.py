"""Distances: time, memory and agreement against the formulas that other toolkits use, in one run.

Fréchet: means, covariances and `scipy.linalg.sqrtm` of their product, as fadtk and
frechet-audio-distance call it. KAD: kadtk's formula, `torch.pdist` for the bandwidth and three whole
matrices, like against like in float32 (its default) and float64 (ours). What is printed are ratios
of this one run: seconds are the least of `--repeats`, memory is the peak of all arrays, the
embeddings included.

    python benchmarks/evaluation.py --dim 2048 --n 500 1000 5000 --kad-n 5000
"""

import argparse
import time
import tracemalloc
from functools import partial

import numpy as np
import torch
from scipy.linalg import sqrtm

from soundscapes_utils import fad


def frechet_by_sqrtm(x, y):
    """Return the Fréchet distance by a general matrix root of the d × d covariances' product."""
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    shift = x.mean(axis=0) - y.mean(axis=0)
    return shift @ shift + np.trace(cov_x + cov_y) - 2 * np.trace(sqrtm(cov_x @ cov_y)).real


def kad_by_whole_matrices(x, y, precision=torch.float32):
    """Return KAD as kadtk computes it: all distances at once."""
    x, y = torch.from_numpy(x).to(precision), torch.from_numpy(y).to(precision)
    sigma = torch.pdist(x).median()

    def kernel(a, b):
        squares = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * (a @ b.T)
        return torch.exp(-squares / (2 * sigma**2))

    def within(a):
        found = kernel(a, a)
        return (found - torch.diag(torch.diagonal(found))).sum() / (len(a) * (len(a) - 1))

    return float(100 * (within(x) + within(y) - 2 * kernel(x, y).mean()))


def timed(function, x, y, repeats):
    """Return a function's value and the least seconds it took."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        value = function(x, y)
        seconds.append(time.perf_counter() - start)
    return value, min(seconds)


def peak_megabytes(function, x, y):
    """Return the peak of the arrays that NumPy holds during a call, `x` and `y` included."""
    tracemalloc.start()
    function(x, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return (peak + x.nbytes + y.nbytes) / 1e6


def compare(name, function, peer, x, y, repeats):
    """Print seconds of both, their ratio and the relative difference of the values."""
    value, seconds = timed(function, x, y, repeats)
    expected, peer_seconds = timed(peer, x, y, repeats)
    difference = abs(value - expected) / abs(expected)
    print(
        f"{name:34}{seconds:9.3f}{peer_seconds:9.3f}{peer_seconds / seconds:8.1f}{difference:12.1e}"
    )


def main():
    """Print one row a case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=2048, help="width of the embedding (PANNs)")
    parser.add_argument("--n", type=int, nargs="*", default=[500, 1000, 5000], help="clips, FAD")
    parser.add_argument("--kad-n", type=int, nargs="*", default=[5000], help="clips, KAD")
    parser.add_argument("--repeats", type=int, default=3, help="of each, the least is printed")
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(options.dim, options.dim)) / np.sqrt(options.dim)

    def sets(n):
        return rng.normal(size=(n, options.dim)) @ mixing, rng.normal(0.1, 1.2, (n, options.dim))

    for function in (fad.frechet_distance, fad.kernel_distance, kad_by_whole_matrices):
        function(*sets(64))  # first calls load the linear algebra
    print(f"d = {options.dim}, {torch.get_num_threads()} threads")
    print(f"{'':34}{'ours s':>9}{'peer s':>9}{'ratio':>8}{'difference':>12}")
    for n in options.n:
        x, y = sets(n)
        name = f"FAD, sqrtm, n = {n}"
        compare(name, fad.frechet_distance, frechet_by_sqrtm, x, y, options.repeats)
    for n in options.kad_n:
        x, y = sets(n)
        for precision in ("float32", "float64"):
            ours = partial(fad.kernel_distance, dtype=precision)
            peer = partial(kad_by_whole_matrices, precision=getattr(torch, precision))
            compare(f"KAD, kadtk, {precision}, n = {n}", ours, peer, x, y, options.repeats)
            print(f"    peak of ours: {peak_megabytes(ours, x, y):.0f} MB")


if __name__ == "__main__":
    main()
