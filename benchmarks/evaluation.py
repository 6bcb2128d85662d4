"""Distances and embeddings: speed against what other toolkits do, and what the numbers are worth.

Sections, one or several in one run:

distances
    Fréchet: means, covariances and `scipy.linalg.sqrtm` of their product, as fadtk and
    frechet-audio-distance call it. KAD: kadtk's formula, `torch.pdist` for the bandwidth and three
    whole matrices, like against like in float32 (its default) and float64 (ours). Seconds are the
    least of `--repeats`, memory is the peak of all arrays, the embeddings included.
embedding
    One network with random weights over files of 44.1 kHz: in batches against a loop that reads,
    resamples and embeds one file at a time, as those toolkits do; the same network, resampler and
    threads on both sides.
oracles
    Largest relative errors against closed forms, references and definitions.
floors
    Real against real: the DCASE 2024 Task 7 development set (`--dcase`), and the folds of ESC-10
    against each other and against white noise (`--esc10`, `--yamnet`).
sensitivity
    How far the distances move when ESC-10 is changed in known ways (`--esc10`), by embedding.

    python benchmarks/evaluation.py distances embedding
    python benchmarks/evaluation.py oracles floors sensitivity --esc10 data/ESC-50 \
        --dcase data/dcase2024_task7_dev --yamnet yamnet.tflite
"""

import argparse
import tempfile
import time
import tracemalloc
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.linalg import sqrtm

from soundscapes_utils import audio, audio_networks, datasets, embeddings, fad

SOURCE_RATE = 44_100


# --- distances ------------------------------------------------------------------------------------


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


def timed(function, *args, repeats=1):
    """Return a function's value and the least seconds it took; what takes long is not repeated."""
    seconds = []
    while len(seconds) < repeats and sum(seconds) < 5:
        start = time.perf_counter()
        value = function(*args)
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
    value, seconds = timed(function, x, y, repeats=repeats)
    expected, peer_seconds = timed(peer, x, y, repeats=repeats)
    difference = abs(value - expected) / abs(expected)
    print(f"{name:34}{seconds:9.3f}{peer_seconds:9.3f}{peer_seconds / seconds:8.1f}{difference:12.1e}")


def distances(options):
    """Print one row a case: FAD and KAD, ours and the peers'."""
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


# --- oracles --------------------------------------------------------------------------------------


def whitened(n, d, rng):
    """Rows whose sample mean is 0 and whose sample covariance is exactly the identity."""
    x = rng.normal(size=(n, d))
    x -= x.mean(axis=0)
    return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T


def frechet_by_torchmetrics(x, y):
    """Return the Fréchet distance by the function inside torchmetrics' FID."""
    from torchmetrics.image.fid import _compute_fid

    moments = ((torch.from_numpy(v.mean(axis=0)), torch.from_numpy(np.cov(v.T))) for v in (x, y))
    return float(_compute_fid(*next(moments), *next(moments)))


def kad_by_definition(x, y):
    """Return KAD by loops over pairs."""
    sigma = np.median([np.linalg.norm(a - b) for a, b in combinations(x, 2)])

    def kernel(a, b):
        return np.exp(-np.sum((a - b) ** 2) / (2 * sigma**2))

    within = (np.mean([kernel(*pair) for pair in combinations(v, 2)]) for v in (x, y))
    return 100 * (sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y]))


def oracle_cases(rng):
    """Yield name, our value and the expected one, over random sizes and dimensions."""
    for _ in range(20):
        n, m, d = (int(v) for v in rng.integers((40, 40, 2), (200, 200, 30)))
        scales, shift = rng.uniform(0.1, 5.0, d), rng.normal(size=d)
        x = whitened(n, d, rng)
        moved = np.sum(shift**2) + np.sum((scales - 1) ** 2)
        yield ("FAD, closed form: shifted, scaled", fad.frechet_distance(x, x * scales + shift), moved)
        decades = 10.0 ** np.linspace(-6, 6, d)
        far = fad.frechet_distance(x * decades, whitened(m, d, rng) * decades[::-1])
        yield "FAD, closed form: 12 decades", far, np.sum((decades - decades[::-1]) ** 2)
        x, y = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)), rng.normal(0.3, 1.4, (m, d))
        value = fad.frechet_distance(x, y)
        yield "FAD, scipy.linalg.sqrtm", value, frechet_by_sqrtm(x, y)
        yield "FAD, torchmetrics", value, frechet_by_torchmetrics(x, y)
        kad = fad.kernel_distance(x[:40], y[:40])
        yield "KAD, by its definition", kad, kad_by_definition(x[:40], y[:40])


def oracles(options):
    """Print the largest relative error against each oracle."""
    cases = pd.DataFrame(oracle_cases(np.random.default_rng(0)), columns=["oracle", "ours", "is"])
    cases["error"] = (cases["ours"] - cases["is"]).abs() / cases["is"].abs()
    print("largest relative error over 20 random pairs of sets")
    print(cases.groupby("oracle", sort=False)["error"].max().map("{:.1e}".format).to_string())


# --- embedding ------------------------------------------------------------------------------------


def write_clips(folder, n, seconds):
    """Write `n` clips of noise at 44.1 kHz."""
    rng = np.random.default_rng(0)
    clips = rng.normal(0, 0.1, (n, round(seconds * SOURCE_RATE))).astype(np.float32)
    return [audio.save_audio(folder / f"{i}.wav", y, SOURCE_RATE) for i, y in enumerate(clips)]


def one_by_one(network, files):
    """Read, resample and embed one file after the other."""
    return np.concatenate([network.embed([file], silence="allow") for file in files])


def batched(network, files):
    """Embed files in batches."""
    return network.embed(files, batch_size=64, silence="allow")


def embedding(options):
    """Print milliseconds per clip in batches and in a loop over files, by length of the clips."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "random.pth"
        rate = embeddings.EMBEDDINGS[options.network].sample_rate
        net = audio_networks.PANN(rate, options.network == "panns-wavegram")
        torch.save({"model": net.state_dict()}, weights)
        network = embeddings.get_embedding(options.network, weights)
        print(
            f"{options.network}, {options.clips} files, {torch.get_num_threads()} threads, ms per clip"
        )
        print(f"{'':34}{'ours':>9}{'loop':>9}{'ratio':>8}{'difference':>12}")
        for seconds in options.seconds:
            files = write_clips(Path(folder) / f"{seconds}", options.clips, seconds)
            one_by_one(network, files[:2])  # the first call is slower
            rows, ours = timed(batched, network, files)
            expected, loop = timed(one_by_one, network, files)
            difference = np.abs(rows - expected).max() / np.abs(expected).max()
            each = 1e3 / len(files)
            print(
                f"{f'clips of {seconds:g} s':34}{ours * each:9.1f}{loop * each:9.1f}"
                f"{loop / ours:8.1f}{difference:12.1e}"
            )


# --- floors and sensitivity -----------------------------------------------------------------------


def dcase_floors(root):
    """Print real against real of the development embeddings: half its clips against the others."""
    _, published = datasets.load_dcase2024_task7(root)
    rows = []
    for name, windows in published.items():
        points, clips = fad.stack_windows(windows)
        for n in (10, 15, 20, 30):
            size = n * windows.shape[1]
            for metric in ("FAD", "KAD"):
                function = fad.METRICS[metric]
                values = fad.noise_floor(points, size, 30, metric=function, groups=clips)
                rows.append((name, n, metric, f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"))
    table = pd.DataFrame(rows, columns=["embedding", "clips", "metric", "floor"])
    print("DCASE 2024 Task 7 development set, n clips against n others, mean ± sd of 30 splits")
    by_size = {
        f"n = {n}": part.set_index(["embedding", "metric"])["floor"]
        for n, part in table.groupby("clips")
    }
    print(pd.DataFrame(by_size).to_string())


def esc10_rows(options, seconds=5.0):
    """Return ESC-10's clip table, its excerpts, and the embeddings that need no download."""
    clips = datasets.load_esc50(options.esc10, esc10=True)
    clips = clips.groupby("label").head(options.per_class).reset_index(drop=True)
    files = {"yamnet": options.yamnet}
    names = ["logmel-stats", "mini-clap"] + ["yamnet"] * bool(options.yamnet)
    networks = {name: embeddings.get_embedding(name, files.get(name, "")) for name in names}
    return clips, audio.excerpts(clips["path"], seconds), networks


def fold_distances(options):
    """Print FAD and KAD of ESC-10's folds against each other and against white noise."""
    clips, sounds, networks = esc10_rows(options)
    rng = np.random.default_rng(0)
    n = int(clips["fold"].value_counts().min())
    noise = [rng.normal(0, 0.1, len(sounds[0])).astype(np.float32) for _ in range(n)]
    rows = []
    for name, network in networks.items():
        points = network.embed(sounds, silence="allow")
        folds = [points[clips["fold"] == fold] for fold in sorted(clips["fold"].unique())]
        hiss = network.embed(noise)
        for metric in ("FAD", "KAD"):
            function = fad.METRICS[metric]
            within = [function(a, b) for a, b in combinations(folds, 2)]
            apart = [function(fold, hiss) for fold in folds]
            rows.append((name, metric, np.mean(within), min(within), max(within), np.mean(apart)))
    columns = ["embedding", "metric", "fold to fold", "least", "most", "white noise"]
    print(f"ESC-10, folds of {n} clips against each other and against {n} of white noise")
    print(pd.DataFrame(rows, columns=columns).round(3).to_string(index=False))


def floors(options):
    """Print real against real, on the sets that were given."""
    if options.dcase:
        dcase_floors(options.dcase)
    if options.esc10:
        fold_distances(options)


def sensitivity(options):
    """Print how far FAD and KAD move under known changes of ESC-10, by embedding."""
    clips, sounds, networks = esc10_rows(options)
    tables = []
    for name, network in networks.items():
        embed = partial(network.embed, silence="allow")
        rows = {change: embed(embeddings.changed(sounds, change)) for change in embeddings.CHANGES}
        labels, groups = clips["label"], clips["source_id"].astype(str)
        tables.append(fad.sensitivity(embed(sounds), rows, embedding=name, labels=labels, groups=groups))
    print(pd.concat(tables).round(3).to_string(index=False))


SECTIONS = {
    "distances": distances,
    "embedding": embedding,
    "oracles": oracles,
    "floors": floors,
    "sensitivity": sensitivity,
}


def main():
    """Run the sections that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="section", default=["distances", "embedding"])
    parser.add_argument("--dim", type=int, default=2048, help="width of the embedding (PANNs)")
    parser.add_argument("--n", type=int, nargs="*", default=[500, 1000, 5000], help="clips, FAD")
    parser.add_argument("--kad-n", type=int, nargs="*", default=[5000], help="clips, KAD")
    parser.add_argument("--repeats", type=int, default=3, help="of each, the least is printed")
    parser.add_argument("--network", default="panns-cnn14-16k", help="which of the PANNs to embed with")
    parser.add_argument("--clips", type=int, default=200, help="files to embed")
    parser.add_argument("--seconds", type=float, nargs="*", default=[1, 4], help="their lengths")
    parser.add_argument("--esc10", type=Path, help="folder of ESC-10 or ESC-50")
    parser.add_argument("--dcase", type=Path, help="folder of the DCASE 2024 Task 7 set")
    parser.add_argument("--yamnet", default="", help="YAMNet's TFLite file")
    parser.add_argument("--per-class", type=int, default=40, help="clips of ESC-10 per class")
    options = parser.parse_args()
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"unknown sections {sorted(unknown)}; there are: {', '.join(SECTIONS)}")
    for section in options.sections:
        SECTIONS[section](options)


if __name__ == "__main__":
    main()
