"""Distances and embeddings: rows P2 and P3 of `all.py`, and what the numbers are worth.

P2. FAD: means, covariances and `scipy.linalg.sqrtm` of their product, as fadtk and
frechet-audio-distance call it. KAD: kadtk's formula, `torch.pdist` for the bandwidth and three whole
matrices, like against like in float32 (its default) and float64 (ours). PRDC: prdc's lines.
P3. One network with random weights over files of 44.1 kHz: in batches against a loop that reads,
resamples and embeds one file at a time, as fadtk and panns_inference do; the same network, resampler and
threads on both sides.

Sections of this script:

oracles
    Largest relative errors against closed forms, references and definitions.
floors
    Real against real: the DCASE 2024 Task 7 development set (`--dcase`), and the folds of ESC-10
    against each other and against white noise (`--esc10`, `--yamnet`).

    python benchmarks/evaluation.py oracles floors --esc10 data/ESC-50 \
        --dcase data/dcase2024_task7_dev --yamnet yamnet.tflite
"""

import argparse
import os
import time
from functools import partial
from itertools import combinations
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import soundfile as sf
import torch
from scipy.linalg import sqrtm
from sklearn.metrics import pairwise_distances

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


def prdc_by_whole_matrices(x, y, k=5):
    """Return precision, recall, density and coverage as prdc computes them."""

    def radii(rows):
        distances = pairwise_distances(rows, rows)
        return np.take_along_axis(distances, np.argpartition(distances, k, axis=1)[:, : k + 1], 1).max(1)

    x_radii, y_radii = radii(x), radii(y)
    distances = pairwise_distances(x, y)
    inside = distances < x_radii[:, None]
    recall = (distances < y_radii[None]).any(axis=1).mean()
    density, coverage = inside.sum(axis=0).mean() / k, (distances.min(axis=1) < x_radii).mean()
    shares = inside.any(axis=0).mean(), recall, density, coverage
    return dict(zip(("precision", "recall", "density", "coverage"), map(float, shares), strict=True))


def timed(function, *args, repeats=1):
    """Return a function's value and the least seconds it took; what takes long is not repeated."""
    seconds = []
    while len(seconds) < repeats and sum(seconds) < 5:
        start = time.perf_counter()
        value = function(*args)
        seconds.append(time.perf_counter() - start)
    return value, min(seconds)


def against(what, ours, peer, x, y, least):
    """One row: calls a second of both, taking turns; the note is the relative difference."""
    pairs = [(timed(ours, x, y), timed(peer[1], x, y)) for _ in range(3 if len(x) < 5000 else 1)]
    mine, theirs = (min(pair[side][1] for pair in pairs) for side in (0, 1))
    value, expected = (np.array([*v.values()] if isinstance(v, dict) else v) for (v, _) in pairs[0])
    row = {"what": what, "peer": peer[0], "theirs": 1 / theirs, "ours": 1 / mine, "unit": "calls/s"}
    apart = np.abs(value - expected).max() / max(np.abs(expected).max(), 1e-300)
    return row | {"least": least, "note": f"differ by {apart:.0e}"}


def p2(work, quick, options):
    """Distances of two sets of one width: noise that is correlated, and other noise."""
    rng, dim = np.random.default_rng(0), 64 if quick else 2048
    mixing = rng.normal(size=(dim, dim)) / np.sqrt(dim)

    def sets(n):
        return rng.normal(size=(n, dim)) @ mixing, rng.normal(0.1, 1.2, (n, dim))

    for function in (fad.frechet_distance, fad.kernel_distance, kad_by_whole_matrices, frechet_by_sqrtm):
        function(*sets(64))  # first calls load the linear algebra
    for n, least in ((50, 100), (100, 60)) if quick else ((500, 100), (1000, 60), (5000, 6)):
        peer = "sqrtm, as fadtk", frechet_by_sqrtm
        yield against(f"FAD, d {dim}, n {n}", fad.frechet_distance, peer, *sets(n), least)
    n = 100 if quick else 1000
    x, y = sets(n)
    for precision in ("float32", "float64"):
        peer = "kadtk's formula", partial(kad_by_whole_matrices, precision=getattr(torch, precision))
        ours = partial(fad.kernel_distance, dtype=precision)
        yield against(f"KAD, {precision}, n {n}", ours, peer, x, y, 1)
    peer, ours = ("prdc's formula", prdc_by_whole_matrices), fad.precision_recall_density_coverage
    yield against(f"PRDC, n {n}", ours, peer, x, y, 1)
    one = min(timed(fad.kernel_distance, x, y)[1] for _ in range(3))
    # the floor, which a table always has, is not part of the interval
    with patch.object(fad, "_floor", lambda *_: (np.nan, np.nan, np.nan, n, "")):
        table = partial(fad.score_table, embedding="noise", metrics=("KAD",), repeats=200)
        whole = timed(table, x, {"noise": y})[1]
    row = {"what": f"KAD with an interval of 200 repeats, n {n}", "peer": "one KAD", "unit": "s"}
    yield row | {"theirs": one, "ours": whole, "most": 3}
    _, seconds = timed(fad.fad_infinity, x, y)
    yield {"what": f"FAD-inf, n {n}, 50 repeats", "ours": seconds, "unit": "s", "most": 30}


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


def one_by_one(network, files):
    """Read, resample and embed one file after the other."""
    rows = []
    for file in files:
        y, rate = sf.read(file, dtype="float32")
        rows.append(network.network(audio.resample(y, rate, network.sample_rate)[None])[0])
    return np.stack(rows)


def p3(work, quick, options):
    """Clips a second in batches against a loop over files; a cache hit, and whether it reads sounds."""
    torch.manual_seed(0)
    rng, n = np.random.default_rng(0), 2 if quick else 64
    weights, name = work / "random.pth", "panns-cnn14-16k"
    net = audio_networks.PANN(embeddings.EMBEDDINGS[name].sample_rate, False)
    torch.save({"model": net.state_dict()}, weights)
    network = embeddings.get_embedding(name, weights)
    batched = partial(network.embed, batch_size=32, silence="allow")
    for seconds, least in ((1, 3), (4, 1.5), (10, 1.5)):
        files = [work / f"{seconds} s" / f"{i}.wav" for i in range(n)]
        for file in files:
            audio.save_audio(file, rng.uniform(-0.3, 0.3, seconds * SOURCE_RATE), SOURCE_RATE)
        one_by_one(network, files[:2])  # the first call is slower
        peer = "a loop a file", lambda _, files: one_by_one(network, files)
        row = against("", lambda _, files: batched(files), peer, (), files, least)
        clips = {side: row[side] * n for side in ("ours", "theirs")}
        yield row | clips | {"what": f"{name}, {n} clips of {seconds} s", "unit": "clips/s"}
    rows, _ = timed(partial(batched, cache_dir=work / "cache"), files)
    for file in files:  # other content, same size and time: who does not read it cannot know
        info = file.stat()
        file.write_bytes(bytes(info.st_size))
        os.utime(file, ns=(info.st_mtime_ns, info.st_mtime_ns))
    again, hit = timed(partial(batched, cache_dir=work / "cache"), files, repeats=5)
    note = "sounds not read" if np.array_equal(rows, again) else "sounds were read"
    row = {"what": f"cache hit, {n} clips of 10 s", "ours": 1e3 * hit / n, "unit": "ms", "note": note}
    yield row | {"most": 0.2}


ROWS = {"P2": p2, "P3": p3}


# --- floors ----------------------------------------------------------------------------------------


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


SECTIONS = {"oracles": oracles, "floors": floors}


def main():
    """Run the sections that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="section", default=["oracles"])
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
